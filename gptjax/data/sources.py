"""Choose the files of a source to read, report those left out, and recognize files that are not text."""

import os
import re
import shlex
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

from gptjax.errors import UserError


def format_of(name: str) -> str:
    """Return the ending of a file's name that says its format, such as "parquet", "txt.gz" or "md", or ""."""
    found = re.search(r"\.(parquet|md|(jsonl|ndjson|json|txt)(\.gz|\.zst)?)$", name.lower())
    return found[1] if found else ""


def is_plain(name: str) -> bool:
    """Return whether the name is that of a text that needs no unpacking."""
    return format_of(name) in ("txt", "md")


def files_below(folder: Path) -> dict[str, int | None]:
    """Return the size of each file by its path below `folder`, `None` if it is met again under another name.

    Linked folders are followed. A hidden folder, one that is met again, one that gptjax made (a run, or token files), a
    broken link and a pipe have `None` too.
    """
    info = folder.stat()
    found, seen = dict[str, int | None](), {(info.st_dev, info.st_ino)}

    def size(path: Path) -> int | None:
        if is_hidden(path.name) or not (path.is_file() or path.is_dir()):
            return None
        info = path.stat()
        again = (info.st_dev, info.st_ino) in seen
        seen.add((info.st_dev, info.st_ino))
        return None if again else info.st_size

    def fail(error: OSError) -> None:
        raise error

    for root, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        ours = {"data.json", "tokenizer.json"} <= {*files} or {"config.json", "checkpoints"} <= {*files, *folders}
        if ours and Path(root) != folder:
            found[Path(root).relative_to(folder).as_posix()], folders[:] = None, []
            continue
        sizes = {name: size(Path(root, name)) for name in sorted([*folders, *files])}
        folders[:] = [name for name in sorted(folders) if sizes[name] is not None]
        below, entered = Path(root).relative_to(folder), set(folders)
        found |= {(below / name).as_posix(): sizes[name] for name in sizes if name not in entered}
    return found


def chosen(found: Mapping[str, int | None], fits: Callable[[str], object], source: str) -> list[str]:
    """Return the names, by their paths below `source`, of the files to read, and print what is left out and why.

    Hidden files and folders are copies and metadata of other programs, so they are never read.
    """
    kept, left = [], Counter[str]()
    for name, size in sorted(found.items()):
        if any(map(is_hidden, name.split("/"))):
            left["hidden"] += 1
        elif size is None:
            left["no file, linked twice or made by gptjax"] += 1
        elif not fits(name):
            left[Path(name).suffix.lower() or "without a suffix"] += 1
        else:
            kept.append(name)
    others = ", ".join(f"{n:,} {why}" for why, n in left.most_common(8))
    print(f"{source}: {len(kept):,} file{'s' * (len(kept) != 1)}" + (f"; left out: {others}" if others else ""))
    return kept


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is left out of a corpus."""
    return name.startswith(".") or name == "__MACOSX"


_ICONV = "convert it with `iconv -f {} -t UTF-8 {{path}} > utf8-{{name}}`"
_UNPACK = "unpack it with `{} -dc {{path}} > unpacked-{{name}}`"
_PANDOC = "convert it with `pandoc -t plain {path} -o {name}.txt`"
_NO_TEXT = "name a file of text"
# The first bytes of files that are no UTF-8 text, what they are, and what makes text of them.
_MAGIC: dict[bytes, tuple[str, str]] = {
    rb"\xff\xfe\0\0|\0\0\xfe\xff": ("UTF-32", _ICONV.format("UTF-32")),
    rb"\xff\xfe|\xfe\xff": ("UTF-16", _ICONV.format("UTF-16")),
    rb"\x1f[\x8b\x9d]": ("compressed by gzip", _UNPACK.format("gzip")),
    rb"\x28\xb5\x2f\xfd": ("compressed by zstd", _UNPACK.format("zstd")),
    rb"BZh[1-9]1AY&SY": ("compressed by bzip2", _UNPACK.format("bzip2")),
    rb"\xfd7zXZ\0": ("compressed by xz", _UNPACK.format("xz")),
    rb"\x04\x22\x4d\x18": ("compressed by lz4", _UNPACK.format("lz4")),
    rb"PK\x03\x04.{26}(mimetype|\[Content_Types|word/)": ("a document such as .docx, .odt or .epub", _PANDOC),
    rb"PK\x03\x04|PK\x05\x06": ("a ZIP archive", "pass the folder that `unzip {path} -d unpacked-{name}` makes"),
    rb"7z\xbc\xaf\x27\x1c|Rar!\x1a": ("an archive", "pass the folder that `7z x {path} -ounpacked-{name}` makes"),
    rb".{257}ustar": ("a tar archive", "unpack it with `tar -xf {path}` and pass its folder"),
    rb"%PDF-": ("a PDF", "convert it with `pdftotext -enc UTF-8 {path} {name}.txt`"),
    rb"\{\\rtf": ("rich text", _PANDOC.replace("pandoc", "pandoc -f rtf")),
    rb"\xd0\xcf\x11\xe0": ("a document of an old office program", "save it as text"),
    rb"PAR1\x15": ("a Parquet file", "name it .parquet and pass it to `python -m gptjax.data tokenize`"),
    rb"ARROW1\0\0": ("an Arrow file", "save it as Parquet and pass that to `python -m gptjax.data tokenize`"),
    rb"SQLite format 3\0": ("an SQLite database", "select its text into a file (`sqlite3 {path} .schema` lists it)"),
    rb"\x93NUMPY": ("a NumPy array", _NO_TEXT),
    rb"\x89PNG|\xff\xd8\xff|GIF8[79]a|RIFF.{4}WEBP|BM.{4}\0\0\0\0": ("a picture", _NO_TEXT),
    rb"RIFF.{4}(WAVE|AVI )|OggS|ID3[\2-\4]|fLaC|\0\0\0.ftyp|\x1aE\xdf\xa3": ("a sound or a film", _NO_TEXT),
    rb"\x7fELF": ("a program", _NO_TEXT),
    rb"\0\x05\x16[\0\7]": ("metadata of macOS", "remove it"),
    rb"version https://git-lfs": ("a pointer of Git LFS", "run `git lfs pull` in its repository"),
}
# Which of four bytes in turn are mostly zero, in texts without a byte order mark.
_WIDE: dict[tuple[int, ...], str] = {
    (0, 1, 0, 1): "UTF-16LE",
    (1, 0, 1, 0): "UTF-16BE",
    (0, 1, 1, 1): "UTF-32LE",
    (1, 1, 1, 0): "UTF-32BE",
}


def kind_of(head: bytes) -> tuple[str, str]:
    """Return what a file is that begins like this, and how to make text of it; two empty texts for a text."""
    found = (kind for magic, kind in _MAGIC.items() if re.match(magic, head, re.DOTALL))
    return next(found, ("", ""))


def require_text(block: bytes, path: str, begins: bool = False) -> None:
    """Raise `UserError`, with a command that helps, if a block of a file is not UTF-8 text for a known reason."""
    what, fix = kind_of(block) if begins else ("", "")
    if not what and b"\0" in block:
        zeros = [block[i::4].count(0) for i in range(4)]
        many = 100 * max(zeros) > len(block)
        encoding = _WIDE.get(tuple(int(4 * n > max(zeros)) for n in zeros)) if many else None
        what = f"{encoding} without a byte order mark" if encoding else "no text, or damaged: it holds a zero byte"
        fix = _ICONV.format(encoding) if encoding else "`tr -d '\\0' < {path} > clean-{name}` drops them"
    if what:
        name = re.sub(r"\.(gz|zst|bz2|xz|lz4|zip|7z|rar|Z)$", "", path.rsplit("/", 1)[-1])
        raise UserError(f"{path} is {what}: {fix.format(path=shlex.quote(path), name=shlex.quote(name))}")


def not_utf8(path: str, at: int, error: UnicodeDecodeError) -> UserError:
    """Return the error of a file whose byte `at` begins no character."""
    name, quoted = shlex.quote(path.rsplit("/", 1)[-1]), shlex.quote(path)
    fix = f"convert it, if it is Western European with `iconv -f CP1252 -t UTF-8 {quoted} > utf8-{name}`"
    if not error.object[: error.start].isascii():
        fix = f"it is damaged there; `iconv -c -f UTF-8 -t UTF-8 {quoted} > utf8-{name}` leaves such bytes out"
    return UserError(f"{path} is not UTF-8 at byte {at} ({error.reason}): {fix}")
