"""Token files: nanoGPT's flat .bin, and llm.c's shards with their 1024-byte header.

A flat file is uint16, or the `dtype` that a data.json beside it names; a header says which of the two its file is.
"""

import contextlib
import hashlib
import itertools
import json
import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Integer

from gptjax.errors import UserError

MANIFEST = "data.json"
UINT16, UINT32 = np.dtype("<u2"), np.dtype("<u4")
_HEADER = np.dtype(("<i4", 256))
_DTYPE: dict[tuple[int, ...], np.dtype] = {(20240520, 1): UINT16, (20240801, 7): UINT32}  # llm.c's magic and version
_MAGIC = {dtype: magic for magic, dtype in _DTYPE.items()}


def dtype_for(vocab_size: int) -> np.dtype:
    """The narrower of the two dtypes that hold every id."""
    return UINT16 if vocab_size <= 65536 else UINT32


class Tokens:
    """Token files read as one sequence; memory-mapped, so larger than memory is fine."""

    def __init__(self, paths: Sequence[Path], flat_dtype: np.dtype = UINT16) -> None:
        self.paths = tuple(paths)
        self._shards = [_map(path, flat_dtype) for path in self.paths]
        if len({shard.dtype for shard in self._shards}) > 1:
            raise UserError(f"{self.paths[0]} and its like are partly uint16, partly uint32: keep them in two folders")
        self.dtype: np.dtype = self._shards[0].dtype
        self._ends = np.cumsum([len(shard) for shard in self._shards])

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

    def fingerprint(self) -> str:
        """A sha256 over the number of tokens and the first and last MiB of every shard; the same wherever they lie."""
        digest = hashlib.sha256(f"{len(self)} {self.dtype}".encode())
        for shard in self._shards:
            n = (1 << 20) // shard.itemsize
            digest.update(shard[:n].tobytes() + shard[-n:].tobytes())
        return digest.hexdigest()


def shards(folder: Path, split: str) -> list[Path]:
    """The files of a split, 'train' or 'val': nanoGPT's one, or else llm.c's in order."""
    flat = folder / f"{split}.bin"
    return [flat] if flat.exists() else sorted(folder.glob(f"*{split}*.bin"))


def open_split(folder: Path, split: str) -> Tokens:
    """Open the token files of a split."""
    manifest = folder / MANIFEST
    name = json.loads(manifest.read_text(encoding="utf-8")).get("dtype", "uint16") if manifest.exists() else "uint16"
    return Tokens(shards(folder, split), np.dtype(name).newbyteorder("<"))


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
    with replacing(path) as temporary, open(temporary, "wb") as file:
        if header:
            file.write(bytes(_HEADER.itemsize))
        for array in arrays:
            file.write(array.astype(dtype).data)  # not `tofile`: its error does not say that the disk is full
            n += len(array)
        if header:
            file.seek(0)
            file.write(np.array([*_MAGIC[dtype], n], "<i4").data)
    return n


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path whose file takes `path`'s name when the block ends well, and is removed when it does not."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
    magic = tuple(data[:8].view("<i4").tolist()) if len(data) >= 8 else ()
    if magic in _DTYPE:
        return _behind_header(path, data, _DTYPE[magic])
    if len(data) % flat_dtype.itemsize:
        raise UserError(f"{path} has {len(data)} bytes, no whole number of {flat_dtype}: it was cut; copy it again")
    return data.view(flat_dtype)


def _behind_header(path: Path, data: np.ndarray, dtype: np.dtype) -> np.ndarray:
    n_bytes = len(data) - _HEADER.itemsize
    promised = int(data[8:12].view("<i4")[0]) if n_bytes >= 0 else 0
    if n_bytes < 0 or n_bytes != promised * dtype.itemsize:
        raise UserError(
            f"{path} has {max(n_bytes, 0)} bytes after its header, which promises {promised} tokens of {dtype}: "
            "it is cut short; copy it again"
        )
    return data[_HEADER.itemsize :].view(dtype)
