"""The one exception for a user's mistake, and how the commands report it."""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator


class UserError(Exception):
    """A mistake that the user can mend; the message is one line: what, where, and the way out."""


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn what `exit_code_and_message` knows inside the block into one line on stderr and an exit code."""
    try:
        yield
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains again at exit
        sys.exit(141)
    except BaseException as error:
        known = exit_code_and_message(error)
        if known is None:
            raise
        sys.stdout.flush()
        print("error: " + " ".join(known[1].split()), file=sys.stderr)
        sys.exit(known[0])


def exit_code_and_message(error: BaseException) -> tuple[int, str] | None:
    """The exit code of a user's mistake or a full disk, 2, or of Ctrl-C, 130, and what to say; None for a bug."""
    if isinstance(error, UserError):
        return 2, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    if not isinstance(error, OSError):
        return None
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    if not full and error.filename is None:
        return None
    where = f"{error.filename}: " if error.filename is not None else ""
    way_out = "; make room, and go on with --resume" if full else "; name another path"
    return 2, f"{where}{error.strerror}{way_out}"
