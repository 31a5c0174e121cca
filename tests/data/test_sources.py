"""Which files of a folder are read, and what a file without UTF-8 text is said to be."""

import bz2
import gzip
import io
import lzma
import os
import re
import shutil
import sqlite3
import subprocess
import zipfile

import pytest

from gptjax.config import DataConfig
from gptjax.data.at_scale.documents import documents, find_files, parts_of
from gptjax.data.corpora import open_corpus
from gptjax.errors import UserError

TEXT = "Grüße, dear friend.\n" * 30


def test_both_commands_read_the_same_files_of_a_folder_and_say_what_they_leave_out(tmp_path, capsys):
    top = tmp_path / "top"
    others = "run/config.json run/checkpoints/q.txt h.py i.csv j k.rst"
    for name in "a.txt b.TXT sub/c.md .d.txt sub/.e/f.txt __MACOSX/g.txt".split() + others.split():
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_text(name)
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "l.txt").write_text("l.txt")
    for name, target in {"sub/up": top, "m": tmp_path / "linked", "n.txt": top / "a.txt", "o.txt": top / "no"}.items():
        (top / name).symlink_to(target)
    os.mkfifo(top / "p.txt")
    left = r"5 no file, linked twice or made by gptjax, 3 hidden, 1 \.py, 1 \.csv, 1 without a suffix, 1 \.rst"
    said = f"top: 4 files; left out: {left}\n"
    parts = parts_of(find_files([str(top)]), 1 << 30)
    read = ["".join(document) for part in parts for piece in part for document in documents(piece, "text")]
    assert re.search(said, capsys.readouterr().out)
    assert sorted(read) == ["a.txt", "b.TXT", "l.txt", "sub/c.md"]
    assert sorted(open_corpus(DataConfig(source=str(top))).chunks()) == sorted(read)
    assert re.search(said, capsys.readouterr().out)


def zipped() -> bytes:
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as archive:
        archive.writestr("a.txt", TEXT)
    return buffer.getvalue()


def database() -> bytes:
    connection = sqlite3.connect(":memory:")
    connection.execute("CREATE TABLE texts (text)")
    return connection.serialize()


KINDS = {
    "UTF-16": TEXT.encode("utf-16"),
    "UTF-32": TEXT.encode("utf-32"),
    "UTF-16LE without": TEXT.encode("utf-16-le"),
    "UTF-16BE without": "Привет, мир".encode("utf-16-be"),
    "UTF-32LE without": TEXT.encode("utf-32-le"),
    "not UTF-8 at byte 2 .*CP1252": TEXT.encode("cp1252"),
    "not UTF-8 at byte .*damaged": TEXT.encode() * 50 + b"\xff",
    "gzip": gzip.compress(TEXT.encode()),
    "bzip2": bz2.compress(TEXT.encode()),
    "xz": lzma.compress(TEXT.encode()),
    "zstd": b"\x28\xb5\x2f\xfd\x24\x05",
    "a ZIP archive": zipped(),
    "a PDF": b"%PDF-1.4\n%\xe2\xe3\n",
    "rich text": rb"{\rtf1 text}",
    "an SQLite": database(),
    "a Parquet": b"PAR1\x15\x04",
    "a picture": b"\x89PNG\r\n\x1a\n",
    "a program": b"\x7fELF\2",
    "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "a zero byte": TEXT.encode() * 9000 + b"\0\0\0",
}


@pytest.mark.parametrize("what", KINDS)
def test_a_file_that_is_no_utf8_text_is_named_with_a_command_that_makes_one(tmp_path, what):
    path = tmp_path / "it's a.txt"
    path.write_bytes(KINDS[what])
    with pytest.raises(UserError, match=what) as error:
        list(open_corpus(DataConfig(source=str(path))).chunks())
    command = re.search("`((iconv|gzip|bzip2|xz|tr) .*)`", str(error.value))
    if command and shutil.which(command[2]):
        subprocess.run(command[1], shell=True, check=True, cwd=tmp_path)
        [made] = [each for each in tmp_path.iterdir() if each != path]
        text = "".join(open_corpus(DataConfig(source=str(made))).chunks())
        assert text.removeprefix(TEXT) == "" or set(text) <= set(TEXT) or text == "Привет, мир"


@pytest.mark.parametrize("name", ["a.jsonl", "a.NDJSON", "a.json.gz", "a.parquet"])
def test_a_file_of_documents_is_not_read_as_plain_text(tmp_path, name):
    (tmp_path / name).write_text('{"text": "a"}\n')
    with pytest.raises(UserError, match=rf"{name} .*`python -m gptjax.data tokenize \S*{name} --out data/a"):
        open_corpus(DataConfig(source=str(tmp_path / name)))
