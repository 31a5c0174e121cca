"""Token files: nanoGPT's flat .bin, and llm.c's shards with their 1024-byte header.

The tokens of a flat file are uint16, or have the `dtype` in a data.json beside it; a header states the type itself.
A folder of token files is a `Path`, or the URL of a folder in a bucket.
"""

import bisect
import contextlib
import fnmatch
import hashlib
import itertools
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Integer

from gptjax.data import remote
from gptjax.errors import UserError
from gptjax.files import parse_json, replacing

MANIFEST = "data.json"
UINT16, UINT32 = np.dtype("<u2"), np.dtype("<u4")
Arrays = Iterable[np.ndarray]
Span = tuple[int, int, int]  # tokens first to last of a shard: (shard, first, last)
_HEADER_BYTES = 1024
# the number and the version that begin llm.c's header
_MAGIC: dict[np.dtype, bytes] = {UINT16: struct.pack("<2i", 20240520, 1), UINT32: struct.pack("<2i", 20240801, 7)}
_DTYPE = {magic: dtype for dtype, magic in _MAGIC.items()}
_NO_TOKENS = re.compile(rb"\x93NUMPY|version https://git-lfs|<!DOCTYPE|<html", re.IGNORECASE)
_MOST_TOKENS = 2**31 - 1  # the header's integer holds no more


def dtype_for(vocab_size: int) -> np.dtype:
    """Return the narrower of the two types that hold every id."""
    return UINT16 if vocab_size <= 65536 else UINT32


class Tokens:
    """Token files read as one sequence; they are memory-mapped, so they may be larger than memory."""

    def __init__(self, paths: Sequence[Path], flat_dtype: np.dtype = UINT16) -> None:
        files = [np.memmap(path, np.uint8, "r") if path.stat().st_size else np.zeros(0, np.uint8) for path in paths]
        self._index(paths, [len(data) for data in files], [bytes(data[:_HEADER_BYTES]) for data in files], flat_dtype)
        pairs = zip(files, self._offsets, strict=True)
        self._shards = [data[offset:].view(np.ndarray).view(self.dtype) for data, offset in pairs]

    def _index(self, paths: Sequence[Path | str], sizes: Iterable[int], heads: list[bytes], flat: np.dtype) -> None:
        """Find the tokens of each file, given its size in bytes and its first KiB."""
        layouts = [_layout(*file, flat) for file in zip(paths, sizes, heads, strict=True)]
        if len({dtype for dtype, _, _ in layouts}) > 1:
            raise UserError(f"{paths[0]} and its like are partly uint16, partly uint32: keep them in two folders")
        self.paths, self.dtype, self._offsets = tuple(paths), layouts[0][0], [offset for _, offset, _ in layouts]
        self._bounds = [0, *itertools.accumulate(n for _, _, n in layouts)]  # of shard i: bounds[i] and bounds[i + 1]

    def __len__(self) -> int:
        return self._bounds[-1]

    def window(self, start: int, length: int) -> Integer[np.ndarray, " _"]:
        """Return tokens start to start + length, fewer at the end; a read-only view of a local file if in one shard."""
        return self.windows([start], length)[0]

    def windows(self, starts: Sequence[int], length: int) -> list[Integer[np.ndarray, " _"]]:
        """Return `window` for each start; the files behind URLs are read in one round trip."""
        spans = [self._spans(start, min(start + length, len(self))) for start in starts]
        read = iter(self._read(list(itertools.chain(*spans))))
        parts = [list(itertools.islice(read, len(window))) for window in spans]
        return [each[0] if len(each) == 1 else np.concatenate([np.zeros(0, self.dtype), *each]) for each in parts]

    def fingerprint(self) -> str:
        """Return a SHA-256 of the number of tokens and of both ends of every shard, wherever the files are.

        An end is a MiB, or less of more than 64 shards, as thousands of them would take minutes.
        """
        digest = hashlib.sha256(f"{len(self)} {self.dtype}".encode())
        n = (64 << 20) // self.dtype.itemsize // max(64, len(self.paths))
        sizes = [end - begin for begin, end in itertools.pairwise(self._bounds)]
        spans = [((i, 0, min(n, size)), (i, max(size - n, 0), size)) for i, size in enumerate(sizes)]
        for tokens in self._read(list(itertools.chain(*spans))):
            digest.update(tokens.tobytes())
        return digest.hexdigest()

    def files(self) -> dict[Path, np.ndarray]:
        """Return the tokens of each local file."""
        return {Path(path): tokens for path, tokens in zip(self.paths, self._shards, strict=True)}

    def _spans(self, start: int, stop: int) -> list[Span]:
        """Split tokens start to stop into one span per shard."""
        spans = []
        while start < stop:
            shard = bisect.bisect_right(self._bounds, start) - 1
            begin, end = self._bounds[shard], min(stop, self._bounds[shard + 1])
            spans.append((shard, start - begin, end - begin))
            start = end
        return spans

    def _read(self, spans: Sequence[Span]) -> Sequence[np.ndarray]:
        return [self._shards[shard][first:last] for shard, first, last in spans]


class RemoteTokens(Tokens):
    """Token files behind URLs. Nothing is cached: each call reads all its spans in one round trip."""

    def __init__(self, sizes: dict[str, int], flat_dtype: np.dtype = UINT16) -> None:
        """Open the files of these URLs, given their sizes in bytes."""
        heads = remote.read_ranges([(url, 0, min(size, _HEADER_BYTES)) for url, size in sizes.items()])
        self._index(tuple(sizes), sizes.values(), heads, flat_dtype)

    def files(self) -> dict[Path, np.ndarray]:
        """Return no files: none is local."""
        return {}

    def _read(self, spans: Sequence[Span]) -> Sequence[np.ndarray]:
        width, ranges = self.dtype.itemsize, list[remote.Range]()
        for shard, first, last in spans:
            offset = self._offsets[shard]
            ranges.append((str(self.paths[shard]), offset + first * width, offset + last * width))
        return [np.frombuffer(data, self.dtype) for data in remote.read_ranges(ranges)]


def shards(folder: Path | str, split: str) -> list[str]:
    """Return the file names of a split ('train' or 'val'): nanoGPT's single file, or else llm.c's shards in order.

    Raises `UserError` if a shard's name fits both splits.
    """
    found = remote.list_files(folder) if isinstance(folder, str) else [path.name for path in folder.glob("*.bin")]
    names, flat = [name for name in found if not name.startswith(".")], f"{split}.bin"
    if flat in names:
        return [flat]
    for name in fnmatch.filter(fnmatch.filter(names, "*train*.bin"), "*val*.bin"):
        raise UserError(f"{folder}/{name} fits both the train and the val split: name it after one of them")
    return sorted(fnmatch.filter(names, f"*{split}*.bin"))


def side_file(folder: Path | str, name: str) -> bytes | None:
    """Return the content of a file beside the token files, or `None` if there is none."""
    if isinstance(folder, Path):
        return (folder / name).read_bytes() if (folder / name).exists() else None
    size = remote.list_files(folder).get(name)
    return None if size is None else remote.read_ranges([(f"{folder}/{name}", 0, size)])[0]


def open_split(folder: Path | str, split: str, default: np.dtype = UINT16) -> Tokens:
    """Open the token files of a split; flat ones without a data.json that states their type have the default.

    Raises `UserError` if a file is damaged, or shards or tokens are missing that data.json promises.
    """
    manifest: dict[str, Any] = parse_json(side_file(folder, MANIFEST) or b"{}", f"{folder}/{MANIFEST}")
    n_parts, dtype = manifest.get("parts", 0), manifest.get("dtype", default.name)
    if dtype not in ("uint16", "uint32") or type(n_parts) is not int:
        raise UserError(f"{folder}/{MANIFEST} is damaged (dtype={dtype!r}, parts={n_parts!r}): copy it again")
    flat_dtype = UINT16 if dtype == "uint16" else UINT32
    names = shards(folder, split)
    if len(names) < n_parts:
        found = f"{folder} holds {len(names)} of {n_parts} {split} shards"
        raise UserError(f"{found}: run the `python -m gptjax.data tokenize` that began it again, for the rest")
    if isinstance(folder, Path):
        tokens = Tokens([folder / name for name in names], flat_dtype)
    else:
        sizes = remote.list_files(folder)
        tokens = RemoteTokens({f"{folder}/{name}": sizes[name] for name in names}, flat_dtype)
    if (promised := manifest.get(f"{split}_tokens", len(tokens))) != len(tokens):
        found = f"{folder} holds {len(tokens)} {split} tokens, but its {MANIFEST} promises {promised}"
        raise UserError(f"{found}: delete {folder} to make it again, or copy it again")
    return tokens


def write_tokens(path: Path, arrays: Arrays, dtype: np.dtype, *, header: bool = False) -> int:
    """Write arrays of ids one after another, flat or behind llm.c's header, and return the number of ids."""
    with token_writer(path, dtype, header=header) as write:
        return sum(write(ids) for ids in arrays)


@contextlib.contextmanager
def token_writer(path: Path, dtype: np.dtype, *, header: bool = True) -> Iterator[Callable[[np.ndarray], int]]:
    """Yield a function that appends ids to a file, named when the block succeeds, and returns their number."""
    n = 0
    with replacing(path) as temporary, open(temporary, "wb") as file:

        def write(ids: np.ndarray) -> int:
            nonlocal n
            file.write(ids.astype(dtype).data)  # the errors of `tofile` have no errno
            n += len(ids)
            if header and n > _MOST_TOKENS:
                raise UserError(f"{path} would have more than the {_MOST_TOKENS:,} tokens that its header can count")
            return len(ids)

        if header:
            file.write(bytes(_HEADER_BYTES))
        yield write
        if header:
            file.seek(0)
            file.write(_MAGIC[dtype] + struct.pack("<i", n))


def _layout(path: Path | str, n_bytes: int, head: bytes, flat_dtype: np.dtype) -> tuple[np.dtype, int, int]:
    """Return the type of a file's tokens, the byte where they begin and their number."""
    dtype = _DTYPE.get(head[:8])
    if dtype is None:
        _require_flat(path, head, flat_dtype)
        if n_bytes % flat_dtype.itemsize:
            raise UserError(f"{path} has {n_bytes} bytes, no multiple of a {flat_dtype}: it is cut; copy it again")
        return flat_dtype, 0, n_bytes // flat_dtype.itemsize
    n_tokens, n_bytes = int.from_bytes(head[8:12], "little", signed=True), max(n_bytes - _HEADER_BYTES, 0)
    if n_bytes != n_tokens * dtype.itemsize or len(head) < _HEADER_BYTES:
        found = f"{path} has {n_bytes} bytes after its header, which promises {n_tokens} tokens of {dtype}"
        raise UserError(f"{found}: it is cut; copy it again")
    return dtype, _HEADER_BYTES, n_tokens


def _require_flat(path: Path | str, head: bytes, dtype: np.dtype) -> None:
    """Raise `UserError` if a file that begins like this holds something else than ids of this type."""
    if head[:4] in {magic[:4] for magic in _DTYPE}:
        known = " and ".join(str(int.from_bytes(magic[4:], "little")) for magic in _DTYPE)
        version = int.from_bytes(head[4:8], "little", signed=True)
        raise UserError(f"{path} has llm.c's header in version {version}, not {known}: make it with a known version")
    if _NO_TOKENS.match(head):
        raise UserError(f"{path} is no token file, as it begins with {head[:24]!r}: fetch or make it again")
    for bits, limit in ((64, 2**32), (32, 2**16)):
        ids = np.frombuffer(head[: len(head) // 8 * 8], f"<u{bits // 8}")
        if bits > 8 * dtype.itemsize and len(ids) >= 32 and np.median(ids) > 0 and ids.max() < limit:
            fix = 'state it as {"dtype": "uint32"} in a data.json beside it'
            fix = fix if bits == 32 else "write it as uint16 or uint32"
            raise UserError(f"{path} seems to hold ids of {bits} bits, not {dtype}: {fix}")
