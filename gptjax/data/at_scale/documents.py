"""Documents in: Parquet, JSON lines and text files, local or behind URLs, in parts of a bounded size.

A file is cut by bytes: a document belongs to the part in which it, or its Parquet row group, begins. So the parts
follow from the names and sizes of the files alone.
"""

import gzip
import io
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

from gptjax.data.corpora import decoded
from gptjax.data.remote import filesystem
from gptjax.errors import UserError

_KINDS = ("parquet", "jsonl", "json", "txt")
_COMPRESSIONS = ("gz", "zst")
_BLOCK = 1 << 20  # bytes read at once
_ROWS = 64  # of a Parquet file, decoded at once


class Piece(NamedTuple):
    """The documents that begin in bytes start to stop of a file."""

    file: str
    start: int
    stop: int


Part = tuple[Piece, ...]
Document = Iterable[str]  # its text, in chunks; can be read again


class Unreadable(UserError):
    """A read that failed for no fault of the file's that is known; another try may do."""


def find_files(sources: Sequence[str]) -> dict[str, int]:
    """Each file of the sources and its size in bytes, those of a folder or a pattern by name.

    A source is a file, a folder, of which every file of a known kind counts, or a pattern with * ? [ ]; local or a URL
    of fsspec's. Raises `UserError` where there is none, or one is empty or of another kind.
    """
    files: dict[str, int] = {}
    for source in sources:
        found = _find(source)
        if not found:
            kinds = ", ".join(f".{kind}" for kind in _KINDS)
            raise UserError(f"{source} does not exist, or holds none of {kinds}, which may end in .gz or .zst")
        for name, size in found.items():
            if _kind(name) is None:
                raise UserError(f"{name} is no Parquet (.parquet), JSON lines (.jsonl, .json) or text (.txt) file")
            if not size:
                raise UserError(f"{name} is empty: fetch it again, or remove it")
        files |= found
    return files


def parts_of(files: dict[str, int], part_bytes: int) -> list[Part]:
    """Cut files into parts of at most `part_bytes`, small ones put together, and no compressed one or text cut."""
    parts: list[Part] = []
    together: list[Piece] = []
    for file, size in files.items():
        n = -(-size // part_bytes) if _can_cut(file) else 1
        if n > 1:
            parts += [(Piece(file, size * i // n, size * (i + 1) // n),) for i in range(n)]
            continue
        if together and sum(piece.stop for piece in together) + size > part_bytes:
            parts.append(tuple(together))
            together = []
        together.append(Piece(file, 0, size))
    return [*parts, tuple(together)] if together else parts


def documents(piece: Piece, column: str) -> Iterator[Document]:
    """The documents of a piece in order, without empty ones; `column` is the field that holds the text.

    Raises `UserError` that names the file, and the line or the row: not JSON, no such column, no text, not UTF-8.
    """
    read = {"parquet": _parquet, "txt": _text}.get(_kind(piece.file) or "", _json_lines)
    try:
        yield from read(piece, column)
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{piece.file} is gone") from error
    except Exception as error:  # each filesystem and each compression has classes of its own
        raise Unreadable(f"cannot read {piece.file}: {type(error).__name__}: {error}") from error


def _find(source: str) -> dict[str, int]:
    files, path = filesystem(source)
    try:
        if files.isfile(path):
            found = {path: files.info(path)}
        elif files.isdir(path):
            found = {name: info for name, info in files.find(path, detail=True).items() if _kind(name)}
        else:
            found = {name: info for name, info in files.glob(path, detail=True).items() if info["type"] != "directory"}
    except UserError:
        raise
    except Exception as error:  # forbidden, offline, ...
        raise UserError(f"cannot list {source}: {type(error).__name__}: {error}") from error
    remote = "://" in source
    return {files.unstrip_protocol(name) if remote else name: int(found[name]["size"]) for name in sorted(found)}


def _kind(file: str) -> str | None:
    endings = file.lower().rsplit("/", 1)[-1].split(".")[1:]
    if endings and endings[-1] in _COMPRESSIONS and endings[-2:-1] != ["parquet"]:
        endings.pop()
    return endings[-1] if endings and endings[-1] in _KINDS else None


def _can_cut(file: str) -> bool:
    return file.lower().endswith((".parquet", ".jsonl", ".json"))


def _open(file: str) -> io.BufferedReader:
    """A file's bytes, of a .gz or .zst those inside it."""
    files, path = filesystem(file)
    raw = files.open(path, "rb", block_size=8 * _BLOCK)
    if file.lower().endswith(".gz"):
        return io.BufferedReader(gzip.GzipFile(fileobj=raw), _BLOCK)
    if file.lower().endswith(".zst"):
        return io.BufferedReader(_pyarrow(file).CompressedInputStream(raw, "zstd"), _BLOCK)
    return io.BufferedReader(raw, _BLOCK)


def _pyarrow(file: str) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{file} takes pyarrow: pip install 'gptjax[data]'") from error
    return pyarrow


@dataclass(frozen=True)
class _TextFile:
    file: str

    def __iter__(self) -> Iterator[str]:
        with _open(self.file) as stream:
            yield from decoded(stream, self.file)


def _text(piece: Piece, column: str) -> Iterator[Document]:
    text = _TextFile(piece.file)
    if next(iter(text), ""):
        yield text


def _json_lines(piece: Piece, column: str) -> Iterator[Document]:
    position, stop = piece.start, piece.stop if _can_cut(piece.file) else math.inf
    with _open(piece.file) as stream:
        if position:
            stream.seek(position - 1)
            position += len(stream.readline()) - 1  # the line that begins before belongs to the piece before
        while position < stop and (line := stream.readline()):
            if text := _text_of_line(line, piece.file, column, position):
                yield (text,)
            position += len(line)


def _text_of_line(line: bytes, file: str, column: str, position: int) -> str:
    """The text that a line holds, empty where there is none or it is null."""
    if not line.strip():
        return ""
    try:
        row = json.loads(line.decode("utf-8-sig" if position == 0 else "utf-8"))
    except ValueError as error:
        reason = f"is not UTF-8 ({error.reason})" if isinstance(error, UnicodeDecodeError) else f"is no JSON: {error}"
        _raise_at(file, position, reason)
    if not isinstance(row, dict):
        _raise_at(file, position, f"is a JSON {type(row).__name__}, not an object: each line is one document")
    if column not in row:
        _raise_at(file, position, f"has no {column!r}, but {', '.join(map(repr, row)) or 'nothing'}: pass --column")
    text = row[column]
    if text is not None and not isinstance(text, str):
        _raise_at(file, position, f"has a {column!r} that is no text but {type(text).__name__}: pass --column")
    if text and b"\\ud" in line.lower():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            _raise_at(file, position, f"is no Unicode: half a surrogate pair at index {error.start} of {column!r}")
    return text or ""


def _raise_at(file: str, position: int, complaint: str) -> NoReturn:
    number = 1
    with _open(file) as stream:
        while position > 0 and (block := stream.read(min(_BLOCK, position))):
            number += block.count(b"\n")
            position -= len(block)
    raise UserError(f"{file}, line {number}, {complaint}")


def _parquet(piece: Piece, column: str) -> Iterator[Document]:
    pyarrow = _pyarrow(piece.file)
    with _open(piece.file) as stream:
        try:
            table = pyarrow.parquet.ParquetFile(stream, buffer_size=8 * _BLOCK, pre_buffer=False)
        except pyarrow.ArrowInvalid as error:
            raise UserError(f"{piece.file} is no whole Parquet file ({error}): fetch it again") from error
        _require_text(pyarrow, table.schema_arrow, piece.file, column)
        row = 0
        for i in range(table.num_row_groups):
            group = table.metadata.row_group(i)
            if piece.start <= group.column(0).data_page_offset < piece.stop:
                yield from _rows(table, i, row, piece.file, column)
            row += group.num_rows


def _rows(table: Any, group: int, row: int, file: str, column: str) -> Iterator[Document]:
    """The texts of a row group, whose first row is number `row` of the file."""
    for batch in table.iter_batches(_ROWS, row_groups=[group], columns=[column], use_threads=False):
        try:
            texts = batch.column(0).to_pylist()
        except UnicodeDecodeError as error:
            raise UserError(f"{file}, rows {row} to {row + batch.num_rows - 1}: not UTF-8: {error}") from error
        yield from ((text,) for text in texts if text)
        row += batch.num_rows


def _require_text(pyarrow: Any, schema: Any, file: str, column: str) -> None:
    if column not in schema.names:
        raise UserError(f"{file} has no column {column!r}, but {', '.join(map(repr, schema.names))}: pass --column")
    kind = schema.field(column).type
    kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise UserError(f"column {column!r} of {file} is no text but {kind}: pass --column")
