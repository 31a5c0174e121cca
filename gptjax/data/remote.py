"""Read files behind URLs (gs://, s3://, memory://, ...) through fsspec."""

from collections.abc import Sequence
from typing import Any

from gptjax.errors import UserError

Range = tuple[str, int, int]  # bytes start to stop of a file: (URL, start, stop)


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

    The filesystem repeats a request that fails. Raises `UserError` for one that fails in the end.
    """
    wanted = [each for each in ranges if each[1] < each[2]]
    if not wanted:
        return [b""] * len(ranges)
    urls, starts, stops = map(list, zip(*wanted, strict=True))
    files, _ = filesystem(urls[0])
    try:
        answers = files.cat_ranges([files._strip_protocol(url) for url in urls], starts, stops, on_error="return")
    except Exception as error:  # some filesystems raise it in spite of `on_error`
        answers = [error] * len(wanted)
    for (url, start, stop), answer in zip(wanted, answers, strict=True):
        if isinstance(answer, Exception):
            raise UserError(f"cannot read {url}: {_reason(answer)}") from answer
        if len(answer) != stop - start:
            raise UserError(f"cannot read {url}: {len(answer)} bytes came of {stop - start}")
    received = iter(answers)
    return [next(received) if start < stop else b"" for _, start, stop in ranges]


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
