"""UserError, for mistakes that the user can fix, and how a command reports it: one line and an exit code."""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator


class UserError(Exception):
    """A mistake that the user can fix. Its message is one line: the problem, its place and the fix."""


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Exit with one line on stderr where the block raises an error that `exit_code_and_message` knows."""
    try:
        yield
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python reports the error again at exit
        sys.exit(141)
    except BaseException as error:
        known = exit_code_and_message(error)
        if known is None:
            raise
        sys.stdout.flush()
        print("error: " + " ".join(known[1].split()), file=sys.stderr)
        sys.exit(known[0])


def exit_code_and_message(error: BaseException) -> tuple[int, str] | None:
    """The exit code and message of a user's mistake or a full disk (2) or of Ctrl-C (130); None for a bug."""
    if isinstance(error, UserError):
        return 2, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        place = f"{error.filename}: " if error.filename is not None else ""
        return 2, f"{place}{error.strerror}; free some space and continue with --resume"
    if isinstance(error, OSError) and error.filename is not None:
        return 2, f"{error.filename}: {error.strerror}; name another path"
    return None


def first_line(error: BaseException) -> str:
    """The first line of the error's message, at most 200 characters of it, or else the error's type."""
    return str(error).partition("\n")[0][:200] or type(error).__name__
