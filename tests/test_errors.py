"""Mistakes, and limits of the machine, that end a command with one line."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from jax.errors import JaxRuntimeError

from gptjax.errors import UserError, exit_code_and_message

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (UserError("a=1 is odd"), 2, "a=1 is odd"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "free some space"),
        (OSError(errno.EFBIG, "File too large", "a.bin"), 2, "a.bin: File too large: a limit on the size of files"),
        (PermissionError(errno.EACCES, "Permission denied", "a.bin"), 2, "a.bin: Permission denied"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"), 2, "Out of memory allocating 9 bytes"),
        (MemoryError(), 2, "not enough memory"),
        (JaxRuntimeError("INTERNAL: No valid engine configs for __cudnn$fmha"), 2, "--model.attention blockwise"),
    ],
)
def test_what_a_user_can_mend_is_one_line(error, code, words):
    found, message = exit_code_and_message(error)
    assert found == code and words in message


def test_ctrl_c_during_an_import_ends_the_process_in_one_line(tmp_path):
    """Also where the module, as an extension may, swallows KeyboardInterrupt."""
    (tmp_path / "greedy.py").write_text(
        "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\nexcept KeyboardInterrupt:\n    pass\n"
    )
    program = """
import signal
from gptjax.errors import one_line_errors
signal.signal(signal.SIGINT, signal.SIG_DFL)
with one_line_errors():
    import greedy
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env=ENVIRONMENT, cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (130, "error: interrupted\n")


def test_a_bug_keeps_its_traceback():
    assert exit_code_and_message(ValueError("x")) is None and exit_code_and_message(OSError(errno.EIO, "I/O")) is None


def test_a_message_is_one_line_whatever_a_file_put_into_it():
    error = UserError("the token '#\x0c\x1b[31m'\n of a\u2028file")
    assert str(error) == r"the token '# \x1b[31m' of a file" and len(str(error).splitlines()) == 1
