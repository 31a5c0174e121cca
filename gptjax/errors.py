"""UserError, for mistakes that the user can fix, and how a command reports it: one line and an exit code."""

import contextlib
import errno
import io
import os
import re
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any, TextIO


class UserError(Exception):
    """A mistake that the user can fix. Its message is one line: the problem, its place and the fix."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def one_line(text: str) -> str:
    """The text with its white space as single spaces and control characters, as a file may hold them, as escapes.

    >>> one_line("bad\\n  token \\x1b[31m")
    'bad token \\\\x1b[31m'
    """
    visible = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(text.split()))
    return "".join(visible)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Exit with one line on stderr where the block raises an error that `exit_code_and_message` knows.

    A stream that was closed before the process began, whose number a data file could take, is /dev/null in the block;
    a character that the terminal's encoding lacks is written as an escape, and invalid input is read as U+FFFD.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # as train.py has it while it imports
        signal.signal(signal.SIGINT, _interrupt)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream := getattr(sys, name), io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        discard(sys.stdout)
        sys.exit(141)
    except BaseException as error:
        known = exit_code_and_message(error)
        if known is None:
            raise
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        try:
            print("error: " + one_line(known[1]), file=sys.stderr, flush=True)
        except OSError:
            discard(sys.stderr)
        sys.exit(known[0])


def _interrupt(signum: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt, but end the process at once during an import, where an extension may swallow it."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            os.write(2, b"error: interrupted\n")
            os._exit(130)
        frame = frame.f_back
    raise KeyboardInterrupt


def discard(stream: TextIO) -> None:
    """Send a stream that can't be written any more to /dev/null, also what Python flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class LenientOutput:
    """A stream that discards all output once a write fails: the run matters more than its terminal, pipe or log."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write the text, or discard it; return the number of its characters."""
        try:
            return self._stream.write(text)
        except OSError:
            discard(self._stream)
            return len(text)

    def flush(self) -> None:
        """Flush the stream, or discard what it holds."""
        try:
            self._stream.flush()
        except OSError:
            discard(self._stream)


def exit_code_and_message(error: BaseException) -> tuple[int, str] | None:
    """The exit code and message of a user's mistake or too little space (2) or of Ctrl-C (130); None for a bug."""
    if isinstance(error, UserError):
        return 2, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    place = f"{error.filename}: " if isinstance(error, OSError) and error.filename is not None else ""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return 2, f"{place}{error.strerror}; free some space and continue with --resume"
    if isinstance(error, OSError) and error.errno == errno.EFBIG:
        return 2, f"{place}{error.strerror}: a limit on the size of files, as of ulimit -f; raise it and continue"
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in first_line(error):
        return 2, f"not enough memory ({first_line(error)}): choose a smaller model, batch or context"
    if type(error).__name__ == "JaxRuntimeError" and re.search(r"__cudnn\$fmha|No valid engine configs", str(error)):
        return 2, f"cuDNN refuses attention ({first_line(error)}): pass --model.attention blockwise, or update cuDNN"
    if isinstance(error, OSError) and place:
        return 2, f"{place}{error.strerror}; name another path"
    return None


def first_line(error: BaseException) -> str:
    """The first line of the error's message, at most 200 characters of it, or else the error's type."""
    with contextlib.suppress(Exception):  # of an odd __str__
        return str(error).partition("\n")[0][:200] or type(error).__name__
    return type(error).__name__
