"""Files behind a URL (gs://, s3://, memory://, ...), by whichever fsspec filesystem serves it."""

import time
from collections.abc import Sequence
from typing import Any

from gptjax.errors import UserError

_WAITS = (0.5, 2, 8, 30)  # seconds before a failed read is tried again


def is_url(source: str) -> bool:
    """Whether a source is fsspec's to read, as bucket and object; web pages, which are fetched whole, are not."""
    return "://" in source and not source.startswith(("http://", "https://"))


def filesystem(url: str) -> tuple[Any, str]:
    """The filesystem of a URL or a local path, and the path in it.

    Raises `UserError` where the package that serves the URL is not installed, or none is known.
    """
    try:
        import fsspec

        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        way_out = "pip install 'gptjax[data]'"
        raise UserError(f"{url} takes a package that is not installed ({error}): {way_out}") from error
    except Exception as error:  # an unknown protocol, no credentials: each filesystem has classes of its own
        raise UserError(f"cannot open {url}: {_reason(error)}") from error


def list_files(folder: str) -> dict[str, int]:
    """Name -> size in bytes of each file right in a folder; none where there is no such folder."""
    files, path = filesystem(folder)
    try:
        entries = files.ls(path, detail=True)
    except FileNotFoundError:
        return {}
    except Exception as error:
        raise UserError(f"cannot list {folder}: {_reason(error)}") from error
    return {entry["name"].rsplit("/", 1)[-1]: int(entry["size"]) for entry in entries if entry["type"] == "file"}


def read_ranges(urls: Sequence[str], starts: Sequence[int], stops: Sequence[int]) -> list[bytes]:
    """Bytes start to stop of each file of one filesystem, all asked for at once; what fails is tried again.

    At once means 128 at a time in the buckets of Google and Amazon; some filesystems read one after another.

    Raises `UserError` when it still fails after 40 seconds, or at once where a file is missing or forbidden.
    """
    found: list[bytes] = [b""] * len(urls)
    missing = [i for i, (start, stop) in enumerate(zip(starts, stops, strict=True)) if start < stop]
    if not missing:
        return found
    files, _ = filesystem(urls[missing[0]])
    paths = [str(files._strip_protocol(url)) for url in urls]
    for wait in (*_WAITS, None):
        answers = _answers(files, [(paths[i], starts[i], stops[i]) for i in missing])
        failures: dict[int, str] = {}
        for i, answer in zip(missing, answers, strict=True):
            n = stops[i] - starts[i]
            if isinstance(answer, Exception):
                failures[i] = _reason(answer)
            elif len(answer) == n:
                found[i] = answer
            else:
                failures[i] = f"{len(answer)} bytes came of {n}"
            if i in failures and (wait is None or isinstance(answer, (FileNotFoundError, PermissionError))):
                raise UserError(f"cannot read {urls[i]}: {failures[i]}")
        missing = list(failures)
        if not missing or wait is None:
            break
        time.sleep(wait)
    return found


def read_text(url: str) -> str:
    """A UTF-8 file, whole."""
    size = list_files(url.rsplit("/", 1)[0]).get(url.rsplit("/", 1)[1], 0)
    return read_ranges([url], [0], [size])[0].decode()


def _answers(files: Any, ranges: Sequence[tuple[str, int, int]]) -> Sequence[bytes | Exception]:
    paths, starts, stops = map(list, zip(*ranges, strict=True))
    try:
        return files.cat_ranges(paths, starts, stops, on_error="return")
    except Exception as error:  # some raise all the same, each a class of its own
        return [error] * len(ranges)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
