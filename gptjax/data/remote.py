"""Read files behind URLs (gs://, s3://, memory://, ...) through fsspec."""

import time
from collections.abc import Sequence
from typing import Any

from gptjax.errors import UserError

Range = tuple[str, int, int]  # bytes start to stop of a file: (URL, start, stop)
_WAITS = (0.5, 2, 8, 30)  # seconds before a failed read is tried again


def is_url(source: str) -> bool:
    """Return whether fsspec reads a source in place; web pages are downloaded instead."""
    return "://" in source and not source.startswith(("http://", "https://"))


def filesystem(url: str) -> tuple[Any, str]:
    """Return the filesystem of a URL or a local path, and the path in it. Raises `UserError` if it cannot be used."""
    try:
        import fsspec

        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise UserError(f"{url} needs a missing package ({error}): pip install 'gptjax[data]'") from error
    except Exception as error:  # an unknown protocol, no credentials: each filesystem has its own classes
        raise UserError(f"cannot open {url}: {_reason(error)}") from error


def list_files(folder: str) -> dict[str, int]:
    """Return the name and the size in bytes of each file directly in a folder, none if there is no folder."""
    files, path = filesystem(folder)
    try:
        entries = files.ls(path, detail=True)
    except FileNotFoundError:
        return {}
    except Exception as error:
        raise UserError(f"cannot list {folder}: {_reason(error)}") from error
    return {entry["name"].rsplit("/", 1)[-1]: int(entry["size"]) for entry in entries if entry["type"] == "file"}


def read_ranges(ranges: Sequence[Range]) -> list[bytes]:
    """Return the bytes of each range of the files of one filesystem, requested together (docs/data.md).

    Failed reads are tried again for 40 seconds. Raises `UserError` after that, or at once if a file is missing or
    forbidden.
    """
    found = {i: b"" for i, (_, start, stop) in enumerate(ranges) if start >= stop}
    for wait in (*_WAITS, None):
        missing = [i for i in range(len(ranges)) if i not in found]
        answers = _request([ranges[i] for i in missing]) if missing else []
        for i, answer in zip(missing, answers, strict=True):
            if not isinstance(answer, Exception):
                found[i] = answer
            elif wait is None or isinstance(answer, (FileNotFoundError, PermissionError)):
                raise UserError(f"cannot read {ranges[i][0]}: {_reason(answer)}")
        if wait is None or len(found) == len(ranges):
            break
        time.sleep(wait)
    return [found[i] for i in range(len(ranges))]


def _request(ranges: Sequence[Range]) -> list[bytes | Exception]:
    """Return the bytes of each range, or the exception that it failed with."""
    urls, starts, stops = map(list, zip(*ranges, strict=True))
    files, _ = filesystem(urls[0])
    try:
        answers = list(files.cat_ranges([files._strip_protocol(url) for url in urls], starts, stops, on_error="return"))
    except Exception as error:  # some filesystems raise it in spite of `on_error`
        return [error] * len(ranges)
    for i, (answer, start, stop) in enumerate(zip(answers, starts, stops, strict=True)):
        if not isinstance(answer, Exception) and len(answer) != stop - start:
            answers[i] = EOFError(f"{len(answer)} bytes came of {stop - start}")
    return answers


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
