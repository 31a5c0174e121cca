"""Folders are locked against other processes."""

import subprocess
import sys

import pytest

from gptjax.files import InUse, locked

HOLDER = """
import pathlib, sys
from gptjax.files import locked
with locked(pathlib.Path(sys.argv[1])):
    print(flush=True)
    input()
"""


def test_a_folder_is_locked_while_its_process_lives(tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "-c", HOLDER, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        with pytest.raises(InUse, match=rf"run is in use by process {holder.pid} on "), locked(folder):
            pass
        holder.kill()
    with locked(folder):
        (folder / "file").touch()
    assert folder.exists()


def test_a_folder_that_holds_only_its_lock_is_removed(tmp_path):
    with locked(tmp_path / "new"):
        assert (tmp_path / "new").exists()
    assert not (tmp_path / "new").exists()
