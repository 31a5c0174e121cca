"""Token files: nanoGPT's flat .bin, and llm.c's shards with their 1024-byte header.

A flat file is uint16, or the `dtype` that a data.json beside it names; a header says which of the two its file is.
A folder is a `Path`, or the URL of one in a bucket.
"""

import contextlib
import fnmatch
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Integer

from gptjax.data import remote
from gptjax.errors import UserError
from gptjax.files import replacing

MANIFEST = "data.json"
UINT16, UINT32 = np.dtype("<u2"), np.dtype("<u4")
_HEADER = np.dtype(("<i4", 256))
_DTYPE: dict[tuple[int, ...], np.dtype] = {(20240520, 1): UINT16, (20240801, 7): UINT32}  # llm.c's magic and version
_MOST_TOKENS = 2**31 - 1  # that the header's integer can hold
_MAGIC = {dtype: magic for magic, dtype in _DTYPE.items()}


def dtype_for(vocab_size: int) -> np.dtype:
    """The narrower of the two dtypes that hold every id."""
    return UINT16 if vocab_size <= 65536 else UINT32


class Tokens:
    """Token files read as one sequence; memory-mapped, so larger than memory is fine."""

    def __init__(self, paths: Sequence[Path], flat_dtype: np.dtype = UINT16) -> None:
        self.paths: tuple[Path | str, ...] = tuple(paths)
        self._shards = [_map(path, flat_dtype) for path in paths]
        self._measure([len(shard) for shard in self._shards], [shard.dtype for shard in self._shards])

    def _measure(self, lengths: Sequence[int], dtypes: Sequence[np.dtype]) -> None:
        if len(set(dtypes)) > 1:
            raise UserError(f"{self.paths[0]} and its like are partly uint16, partly uint32: keep them in two folders")
        self.dtype: np.dtype = dtypes[0]
        self._ends = np.cumsum(lengths)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def window(self, start: int, length: int) -> Integer[np.ndarray, " _"]:
        """Tokens start to start + length, fewer at the end; a view of the file where one shard holds them all."""
        first = int(self._ends.searchsorted(start, "right"))
        if first == len(self._shards):
            return np.zeros(0, self.dtype)
        shard = self._shards[first]
        offset = start - int(self._ends[first]) + len(shard)
        part = shard[offset : offset + length]
        if len(part) == length or first + 1 == len(self._shards):
            return part
        return np.concatenate([part, self.window(start + len(part), length - len(part))])

    def windows(self, starts: Sequence[int], length: int) -> list[Integer[np.ndarray, " _"]]:
        """The window of each start."""
        return [self.window(start, length) for start in starts]

    def fingerprint(self) -> str:
        """A sha256 over the number of tokens and both ends of every shard; the same wherever they lie.

        An end is a MiB; of more than 64 shards it is less, so that thousands do not take minutes.
        """
        digest = hashlib.sha256(f"{len(self)} {self.dtype}".encode())
        n = (64 << 20) // self.dtype.itemsize // max(64, len(self.paths))
        for head, tail in self._both_ends(n):
            digest.update(head)
            digest.update(tail)
        return digest.hexdigest()

    def _both_ends(self, n: int) -> Iterable[tuple[bytes, bytes]]:
        return ((shard[:n].tobytes(), shard[-n:].tobytes()) for shard in self._shards)


class RemoteTokens(Tokens):
    """Token files behind URLs, of which nothing is kept: each call reads its ranges at once, in one round trip."""

    def __init__(self, sizes: dict[str, int], flat_dtype: np.dtype = UINT16) -> None:
        """Open the files of these URLs, of so many bytes each."""
        self.paths = urls = tuple(sizes)
        heads = remote.read_ranges(urls, [0] * len(sizes), [min(n, _HEADER.itemsize) for n in sizes.values()])
        layouts = [_layout(url, head, sizes[url], flat_dtype) for url, head in zip(urls, heads, strict=True)]
        self._offsets = [offset for _, offset in layouts]
        lengths = [(sizes[url] - offset) // dtype.itemsize for url, (dtype, offset) in zip(urls, layouts, strict=True)]
        self._measure(lengths, [dtype for dtype, _ in layouts])
        self._begins = self._ends - lengths

    def window(self, start: int, length: int) -> Integer[np.ndarray, " _"]:
        return self.windows([start], length)[0]

    def windows(self, starts: Sequence[int], length: int) -> list[Integer[np.ndarray, " _"]]:
        pieces = [list(self._pieces(start, min(start + length, len(self)))) for start in starts]
        read = iter(self._read([piece for window in pieces for piece in window]))
        joined = [b"".join(itertools.islice(read, len(window))) for window in pieces]
        return [np.frombuffer(data, self.dtype) for data in joined]

    def _both_ends(self, n: int) -> Iterable[tuple[bytes, bytes]]:
        lengths = (self._ends - self._begins).tolist()
        read = self._read([p for i, k in enumerate(lengths) for p in ((i, 0, min(n, k)), (i, max(k - n, 0), k))])
        return zip(read[::2], read[1::2], strict=True)

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(shard, first, last) of the tokens start to stop."""
        while start < stop:
            shard = int(self._ends.searchsorted(start, "right"))
            end = min(stop, int(self._ends[shard]))
            yield shard, start - int(self._begins[shard]), end - int(self._begins[shard])
            start = end

    def _read(self, pieces: Sequence[tuple[int, int, int]]) -> list[bytes]:
        width, offsets = self.dtype.itemsize, self._offsets
        return remote.read_ranges(
            [str(self.paths[shard]) for shard, _, _ in pieces],
            [offsets[shard] + first * width for shard, first, _ in pieces],
            [offsets[shard] + last * width for shard, _, last in pieces],
        )


def shards(folder: Path | str, split: str) -> list[str]:
    """The names of a split's files, 'train' or 'val': nanoGPT's one, or else llm.c's in order."""
    names = remote.list_files(folder) if isinstance(folder, str) else [path.name for path in folder.glob("*.bin")]
    flat = f"{split}.bin"
    return [flat] if flat in names else sorted(fnmatch.filter(names, f"*{split}*.bin"))


def side_file(folder: Path | str, name: str) -> str | None:
    """The text of a file beside the token files, `None` where there is none."""
    if isinstance(folder, str):
        return remote.read_text(f"{folder}/{name}") if name in remote.list_files(folder) else None
    return (folder / name).read_text(encoding="utf-8") if (folder / name).exists() else None


def open_split(folder: Path | str, split: str) -> Tokens:
    """Open the token files of a split.

    Raises `UserError` where one is damaged, or where some of those that data.json promises are still to be made.
    """
    manifest = json.loads(side_file(folder, MANIFEST) or "{}")
    flat_dtype = np.dtype(manifest.get("dtype", "uint16")).newbyteorder("<")
    names = shards(folder, split)
    if len(names) < (n_parts := manifest.get("parts", 0)):
        raise UserError(
            f"{folder} holds {len(names)} of {n_parts} {split} shards: run the `python -m gptjax.data tokenize` that "
            "began it again, and it makes the rest"
        )
    if isinstance(folder, str):
        sizes = remote.list_files(folder)
        return RemoteTokens({f"{folder}/{name}": sizes[name] for name in names}, flat_dtype)
    return Tokens([folder / name for name in names], flat_dtype)


def write_split(
    folder: Path,
    split: str,
    arrays: Iterable[np.ndarray],
    dtype: np.dtype,
    form: Literal["nanogpt", "llmc"] = "nanogpt",
    shard_tokens: int = 100_000_000,
) -> int:
    """Write ids as nanoGPT's one file, or as llm.c's shards of `shard_tokens`, and return how many ids there were."""
    if form == "nanogpt":
        return write_tokens(folder / f"{split}.bin", arrays, dtype)
    numbered = itertools.groupby(_by_shard(arrays, shard_tokens), key=lambda pair: pair[0])
    return sum(
        write_tokens(folder / f"{split}_{number:06d}.bin", (ids for _, ids in pairs), dtype, header=True)
        for number, pairs in numbered
    )


def write_tokens(path: Path, arrays: Iterable[np.ndarray], dtype: np.dtype, *, header: bool = False) -> int:
    """Write arrays of ids one after another, flat or behind llm.c's header, and return how many ids there were."""
    n = 0
    with token_writer(path, dtype, header=header) as write:
        for array in arrays:
            write(array)
            n += len(array)
    return n


@contextlib.contextmanager
def token_writer(path: Path, dtype: np.dtype, *, header: bool = True) -> Iterator[Callable[[np.ndarray], None]]:
    """A function that appends ids to a token file, which takes its name when the block ends well."""
    n = 0
    with replacing(path) as temporary, open(temporary, "wb") as file:

        def write(ids: np.ndarray) -> None:
            nonlocal n
            file.write(ids.astype(dtype).data)  # not `tofile`: its error does not say that the disk is full
            n += len(ids)
            if header and n > _MOST_TOKENS:
                raise UserError(f"{path} would have over {_MOST_TOKENS:,} tokens, more than its header can say")

        if header:
            file.write(bytes(_HEADER.itemsize))
        yield write
        if header:
            file.seek(0)
            file.write(np.array([*_MAGIC[dtype], n], "<i4").data)


def _by_shard(arrays: Iterable[np.ndarray], size: int) -> Iterator[tuple[int, np.ndarray]]:
    n = 0
    for array in arrays:
        while len(array):
            part, array = np.split(array, [size - n % size])
            yield n // size, part
            n += len(part)


def _map(path: Path, flat_dtype: np.dtype) -> np.ndarray:
    try:
        data = np.memmap(path, np.uint8, "r").view(np.ndarray) if path.stat().st_size else np.zeros(0, np.uint8)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    dtype, offset = _layout(path, data[: _HEADER.itemsize].tobytes(), len(data), flat_dtype)
    return data[offset:].view(dtype)


def _layout(path: Path | str, head: bytes, n_bytes: int, flat_dtype: np.dtype) -> tuple[np.dtype, int]:
    """The type of a file's tokens and the byte at which they begin, from its first KiB and its size."""
    dtype = _DTYPE.get(tuple(np.frombuffer(head[:8], "<i4").tolist())) if len(head) >= 8 else None
    if dtype is None:
        if n_bytes % flat_dtype.itemsize:
            raise UserError(f"{path} has {n_bytes} bytes, no whole number of {flat_dtype}: it was cut; copy it again")
        return flat_dtype, 0
    n_bytes -= _HEADER.itemsize
    promised = int(np.frombuffer(head[8:12], "<i4")[0]) if n_bytes >= 0 else 0
    if n_bytes < 0 or n_bytes != promised * dtype.itemsize:
        raise UserError(
            f"{path} has {max(n_bytes, 0)} bytes after its header, which promises {promised} tokens of {dtype}: "
            "it is cut short; copy it again"
        )
    return dtype, _HEADER.itemsize
