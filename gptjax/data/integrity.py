"""Check token files: the largest id and a digest of each, computed once and cached beside the files."""

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gptjax.errors import UserError
from gptjax.files import read_json, user_cache, write_atomically
from gptjax.host import n_cores
from gptjax.progress import working

RECORD = "checked.json"
_BLOCK = 1 << 24  # tokens that a thread reads at once
_LARGE = 1 << 30  # bytes


class Content(NamedTuple):
    """What a token file holds: its largest id, -1 without tokens, and the SHA-256 of the SHA-256s of its blocks."""

    largest: int
    digest: str


def contents(files: Mapping[Path, np.ndarray]) -> dict[Path, Content]:
    """Return what the token files of a folder hold, given the tokens of each.

    A file is read again only if its size or times are not those in checked.json, which is in the user's cache where the
    folder is read-only.
    """
    if not files:
        return {}
    folder = next(iter(files)).parent
    records = _records(folder)
    known = {name: entry for record in records for name, entry in _recorded(record).items()}
    states = {path: _state(path, ids.dtype) for path, ids in files.items()}
    found = {path: Content(*known[path.name][1:]) for path in files if known.get(path.name, [None])[0] == states[path]}
    new = {path: ids for path, ids in files.items() if path not in found}
    n_bytes = sum(ids.nbytes for ids in new.values())
    what = f"checking {n_bytes / 1e9:,.1f} GB of token files in {folder}, once"
    blocks = [(path, ids[i : i + _BLOCK]) for path, ids in new.items() for i in range(0, len(ids), _BLOCK)]
    parts: dict[Path, list[tuple[int, bytes]]] = {path: [] for path in new}
    with working(what, len(blocks), n_bytes > _LARGE) as advance, ThreadPoolExecutor(n_cores()) as threads:
        # Hashing releases Python's lock.
        for (path, _), part in zip(blocks, threads.map(_part, [ids for _, ids in blocks]), strict=True):
            parts[path].append(part)
            advance()
    for path, each in parts.items():
        digest = hashlib.sha256(b"".join(part for _, part in each)).hexdigest()
        found[path] = Content(max((largest for largest, _ in each), default=-1), digest)
    if new:
        entries = known | {path.name: [states[path], *found[path]] for path in new}
        _write_first(records, json.dumps(entries))
    return {path: found[path] for path in files}


def _part(ids: np.ndarray) -> tuple[int, bytes]:
    return int(ids.max()), hashlib.sha256(ids.data).digest()


def place_of(tokens: np.ndarray, limit: int) -> tuple[int, int]:
    """Return the index of the first id that is not below `limit`, and that id."""
    for start in range(0, len(tokens), _BLOCK):
        above = np.flatnonzero(tokens[start : start + _BLOCK] >= limit)
        if len(above):
            return start + int(above[0]), int(tokens[start + above[0]])
    raise AssertionError


def _state(path: Path, dtype: np.dtype) -> list[Any]:
    """Return what changes when a file is written or replaced. A changed time costs a second look, nothing else."""
    info = path.stat()
    return [info.st_size, info.st_mtime_ns, info.st_ctime_ns, dtype.name]


def _records(folder: Path) -> list[Path]:
    name = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]
    places = [folder / RECORD]
    with contextlib.suppress(FileNotFoundError):
        places.append(user_cache("checked") / f"{name}.json")
    return places


def _write_first(paths: list[Path], text: str) -> None:
    """Write a file in the first place that allows it."""
    for path in paths:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, text)
            return


def _recorded(record: Path) -> dict[str, list[Any]]:
    """Return the entries of the record, each [state, largest, digest]; none of a damaged one."""
    try:
        entries = read_json(record)
    except UserError:
        return {}
    kinds = [list, int, str]
    return {name: entry for name, entry in entries.items() if isinstance(entry, list) and [*map(type, entry)] == kinds}
