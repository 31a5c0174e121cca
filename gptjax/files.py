"""Read JSON files with one-line errors, replace files atomically, and lock folders."""

import contextlib
import errno
import json
import os
import secrets
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from gptjax.errors import UserError

with contextlib.suppress(ImportError):  # Windows has none: no locks there
    import fcntl

LOCK = ".lock"


class InUse(UserError):
    """Another process holds a folder's lock."""


def read_json(path: Path, missing_ok: bool = False) -> dict[str, Any]:
    """Return the object in a JSON file, with `missing_ok` an empty one if there is no file.

    Raises `UserError` if the file cannot be read or holds something else.
    """
    if missing_ok and not path.exists():
        return {}
    try:
        return parse_json(path.read_bytes(), path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error


def parse_json(data: str | bytes, path: Path | str) -> dict[str, Any]:
    """Return the object in the data of a JSON file; `path` names the file in errors."""
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no JSON object")
    return values


def write_atomically(path: Path, text: str) -> None:
    """Replace a file at once: a reader, or a crash, finds the old text or the new one."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_new(path: Path, text: str) -> None:
    """Write a file at once unless there is one: of several processes that do so at a time, one succeeds."""
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.link(part, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path; its file replaces `path` when the block succeeds, and is removed when it fails.

    The new file is on disk before it replaces the old one, so a power cut leaves one of them. A lock on the temporary
    file tells `remove_leftovers` that its process lives.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    with contextlib.ExitStack() as stack:
        if sys.platform != "win32":  # which replaces no open files
            _ = claim(stack.enter_context(temporary.open("ab")))
        stack.callback(temporary.unlink, missing_ok=True)
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)


def remove_leftovers(folder: Path, pattern: str = "*") -> None:
    """Remove the temporary files that `replacing` left for the files of a pattern, where their process is gone."""
    for path in folder.glob(f"{pattern}.????????.part"):
        with contextlib.suppress(OSError), path.open("ab") as file:
            if claim(file):
                path.unlink()


def claim(file: IO[Any]) -> bool:
    """Lock a file for this process; False if another one has the lock, or if there are no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (OSError, NameError):
        return False
    return True


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the folder and hold its lock during the block.

    The lock is flock's on FOLDER/.lock, which network file systems share between hosts and which ends with its process.
    What killed processes left unfinished in the folder is removed, and so is, after the block, a folder that holds
    nothing else. Raises `InUse` if another process has the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise InUse(f"{folder} is in use by {holder}: wait until that ends, or name another folder") from error
        except (OSError, NameError):
            print(f"note: {folder} has no file locks: two processes that write there would not notice each other")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        remove_leftovers(folder)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                if os.listdir(folder) == [LOCK]:
                    (folder / LOCK).unlink()
                    folder.rmdir()


def user_cache(name: str) -> Path:
    """The folder for files that can be made again: ~/.cache/gptjax/NAME (XDG_CACHE_HOME replaces ~/.cache).

    Raises `FileNotFoundError` where no home folder is known.
    """
    parent = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if parent.startswith("~"):
        raise FileNotFoundError(errno.ENOENT, "no home folder is known", parent)
    return Path(parent, "gptjax", name)


def shipped(folder: str) -> Path:
    """The folder "configs" or "prompts" that comes with gptjax: in its package, or beside that in a checkout."""
    package = Path(__file__).parent
    return package / folder if (package / folder).is_dir() else package.parent / folder


PROMPTS = shipped("prompts") / "case_study.txt"  # one on each line


def sync(path: Path) -> None:
    """Return when the file or folder is on disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError:
        if not path.is_dir():  # Windows opens no folders, and some network file systems sync none
            raise
