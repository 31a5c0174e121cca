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
    """Turn a `UserError`, a full disk or Ctrl-C inside the block into one line on stderr and an exit code.

    Exit codes: 2 for a mistake or a full disk, 130 for Ctrl-C, 141 for a closed pipe (`| head`).
    """
    try:
        yield
    except UserError as error:
        sys.exit(_report(str(error), 2))
    except KeyboardInterrupt:
        sys.exit(_report("interrupted", 130))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains again at exit
        sys.exit(141)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not full and error.filename is None:
            raise
        where = f"{error.filename}: " if error.filename is not None else ""
        way_out = "; make room, and go on with --resume" if full else "; name another path"
        sys.exit(_report(f"{where}{error.strerror}{way_out}", 2))


def _report(message: str, code: int) -> int:
    sys.stdout.flush()
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return code
