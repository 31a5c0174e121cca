"""Folders are locked against other processes, and what dead ones left is removed."""

import subprocess
import sys

import pytest

from gptjax.files import InUse, locked, remove_leftovers, replacing, write_new

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


def test_unfinished_files_are_removed_once_their_process_is_dead(tmp_path):
    writer = HOLDER.replace("locked", "replacing")
    command = [sys.executable, "-c", writer, str(tmp_path / "a.bin")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        (tmp_path / "mine.part").touch()
        remove_leftovers(tmp_path)
        assert len(list(tmp_path.glob("a.bin.*.part"))) == 1
        process.kill()
    with replacing(tmp_path / "b.bin") as own:
        remove_leftovers(tmp_path)
        assert set(tmp_path.iterdir()) == {own, tmp_path / "mine.part"}


def test_the_first_of_several_writers_wins(tmp_path):
    for text in ("first", "second"):
        write_new(tmp_path / "a", text)
    assert (tmp_path / "a").read_text() == "first" and [*tmp_path.iterdir()] == [tmp_path / "a"]
