"""Read the documents of Parquet, JSON lines and text files, local or behind URLs, in parts of bounded size.

The parts depend on the names and sizes of the files only: a file is cut at bytes, and a document belongs to the part
in which it, or its Parquet row group, begins.
"""

import gzip
import io
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from gptjax.data.corpora import decoded
from gptjax.data.remote import filesystem
from gptjax.data.sources import chosen, files_below, format_of, require_text
from gptjax.errors import UserError

_FORMATS = ".parquet, .md, .txt, .jsonl, .ndjson or .json, the last four also as .gz or .zst"
_BLOCK = 1 << 20  # bytes read at once
_ROWS = 64  # of a Parquet file decoded at once


class Piece(NamedTuple):
    """The documents that begin in bytes start to stop of a file."""

    file: str
    start: int
    stop: int


Part = tuple[Piece, ...]  # what one worker turns into one shard of each split
Document = Iterable[str]  # its text in chunks; can be read several times


def find_files(sources: Sequence[str]) -> dict[str, int]:
    """Return each file of the sources and its size in bytes; those of one source are sorted by name.

    A source is a file, a folder (all files of a known format in it) or a pattern with * ? [ ], local or a URL that
    fsspec serves. Raises `UserError` if a source has no files, or a file is empty or of another format.
    """
    found: dict[str, int] = {}
    for source in sources:
        if not (sizes := _find(source)):
            raise UserError(f"{source} does not exist, or holds no {_FORMATS}")
        for name, size in sizes.items():
            if not format_of(name):
                raise UserError(f"{name} is not {_FORMATS}")
            if not size:
                raise UserError(f"{name} is empty: fetch it again, or remove it")
        found |= sizes
    return found


def parts_of(files: dict[str, int], part_bytes: int) -> list[Part]:
    """Cut files into parts of at most `part_bytes`; small files share one, compressed and text files are not cut."""
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
    """Yield the non-empty documents of a piece in order; `column` is the field that holds the text.

    Raises `UserError`, with the file and the byte or row, for damaged files and for fields that are missing or no text.
    """
    read = {"parquet": _parquet, "txt": _text, "md": _text}.get(format_of(piece.file).split(".")[0], _json_lines)
    try:
        yield from filter(any, read(piece, column))
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{piece.file} is gone") from error
    except Exception as error:  # each filesystem and compression has its own classes
        raise UserError(f"cannot read {piece.file}: {type(error).__name__}: {error}") from error


def _find(source: str) -> dict[str, int]:
    files, path = filesystem(source)
    try:
        if files.isfile(path):
            found, below = {path: files.info(path)["size"]}, None
        elif not files.isdir(path):
            sizes = files.glob(path, detail=True).items()
            found = {name: info["size"] for name, info in sizes if info["type"] != "directory"}
            below = "/".join(itertools.takewhile(lambda part: not set(part) & set("*?["), path.split("/"))) + "/"
        elif "file" in files.protocol:
            found, below = {f"{path}/{name}": size for name, size in files_below(Path(path)).items()}, f"{path}/"
        else:
            found, below = {name: info["size"] for name, info in files.find(path, detail=True).items()}, f"{path}/"
    except Exception as error:  # forbidden, offline, ...
        raise UserError(f"cannot list {source}: {type(error).__name__}: {error}") from error
    names = sorted(found)
    if below is not None and found:
        inside = {name.removeprefix(below): size for name, size in found.items()}
        fits = format_of if below == f"{path}/" else bool  # a file of another format that a pattern names is an error
        names = [below + name for name in chosen(inside, fits, source)]
    remote = "://" in source
    return {files.unstrip_protocol(name) if remote else name: int(found[name] or 0) for name in names}


def _can_cut(file: str) -> bool:
    return format_of(file) in ("parquet", "jsonl", "ndjson", "json")


def _open(file: str) -> io.BufferedReader:
    """Open the bytes of a file, decompressed if it is .gz or .zst."""
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
        raise UserError(f"{file} needs pyarrow: pip install 'gptjax[data]'") from error
    return pyarrow


@dataclass(frozen=True)
class _TextFile:
    file: str

    def __iter__(self) -> Iterator[str]:
        with _open(self.file) as stream:
            yield from decoded(stream, self.file)


def _text(piece: Piece, column: str) -> Iterator[Document]:
    yield _TextFile(piece.file)


def _json_lines(piece: Piece, column: str) -> Iterator[Document]:
    position, stop = piece.start, piece.stop if _can_cut(piece.file) else math.inf
    with _open(piece.file) as stream:
        require_text(stream.peek(512), piece.file, begins=True)
        if position:
            stream.seek(position - 1)
            position += len(stream.readline()) - 1  # this line begins in the previous piece
        while position < stop and (line := stream.readline()):
            try:
                text = _text_of_line(line, column)
            except ValueError as error:
                raise UserError(f"{piece.file}: the line at byte {position} is no JSON document: {error}") from error
            yield (text,)
            position += len(line)


def _text_of_line(line: bytes, column: str) -> str:
    """Return the text in a line of JSON, "" for a blank line or null. Raises `ValueError` if it is something else."""
    if not line.strip():
        return ""
    row = json.loads(line.decode("utf-8-sig"))
    if not isinstance(row, dict):
        raise ValueError(f"it is a {type(row).__name__}, not an object; each line is one document")
    if column not in row:
        raise ValueError(f"it has no {column!r}, but {', '.join(map(repr, row)) or 'nothing'}: pass --column")
    text = "" if row[column] is None else row[column]
    if not isinstance(text, str):
        raise ValueError(f"its {column!r} is not text but {type(text).__name__}: pass --column")
    text.encode()  # raises UnicodeEncodeError for half a surrogate pair, which an escape such as \ud83d can make
    return text


def _parquet(piece: Piece, column: str) -> Iterator[Document]:
    file, pyarrow = piece.file, _pyarrow(piece.file)
    with _open(file) as stream:
        try:
            table = pyarrow.parquet.ParquetFile(stream, buffer_size=8 * _BLOCK, pre_buffer=False)
        except pyarrow.ArrowInvalid as error:
            raise UserError(f"{file} is not a complete Parquet file ({error}): fetch it again") from error
        schema = table.schema_arrow
        if column not in schema.names:
            raise UserError(f"{file} has no column {column!r}, but {', '.join(map(repr, schema.names))}: pass --column")
        kind = schema.field(column).type
        kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
        if kind not in (pyarrow.string(), pyarrow.large_string()):
            raise UserError(f"column {column!r} of {file} is not text but {kind}: pass --column")
        row = 0
        for i in range(table.num_row_groups):
            group = table.metadata.row_group(i)
            if piece.start <= group.column(0).data_page_offset < piece.stop:
                yield from _rows(table, i, row, file, column)
            row += group.num_rows


def _rows(table: Any, group: int, row: int, file: str, column: str) -> Iterator[Document]:
    """Yield the texts of a row group whose first row is number `row` of the file."""
    for batch in table.iter_batches(_ROWS, row_groups=[group], columns=[column], use_threads=False):
        try:
            texts = batch.column(0).to_pylist()
        except UnicodeDecodeError as error:
            raise UserError(f"{file}, rows {row} to {row + batch.num_rows - 1}: not UTF-8: {error}") from error
        yield from zip(texts)
        row += batch.num_rows
