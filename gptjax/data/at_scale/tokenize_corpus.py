"""Tokenize a corpus of any size to a folder of token files: in parallel, in bounded memory, and restartable.

The corpus is cut into parts, and each part becomes one shard of each split in llm.c's format. The content of a shard
depends on the sources and the tokenizer only, not on the workers or the job of an array that made it.
"""

import contextlib
import hashlib
import json
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gptjax.config import Section, argument, option
from gptjax.data import token_files
from gptjax.data.at_scale.documents import Document, Part, documents, find_files, parts_of
from gptjax.data.token_files import MANIFEST, Tokens, dtype_for, token_writer
from gptjax.errors import UserError
from gptjax.files import read_json, remove_leftovers, write_atomically, write_new
from gptjax.host import n_cores
from gptjax.progress import working
from gptjax.tokenizer import END_OF_TEXT, Tokenizer, safe_chunks

_VERSION = 1  # of the content of a shard; a folder of another version is refused
_LONG = 1 << 20  # characters of a document that are encoded at once
_BATCH = 1 << 18  # characters, or
_BATCH_TEXTS = 64  # texts, that are encoded together


@dataclass(frozen=True)
class TokenizeConfig(Section):
    """Turn a corpus of any size into token files for --data.source, in parallel and in bounded memory.

    The end-of-text token follows each document. After a stop only complete shards remain; the same command makes the
    missing ones.
    """

    sources: tuple[str, ...] = argument(
        "files, folders or patterns, local or hf://datasets/..., gs://, s3://: .parquet, .jsonl or .json (a document "
        "per line), .txt (a document per file); all but Parquet also as .gz or .zst",
        many=True,
    )
    out: str = option("data/corpus", "folder for the token files; repeat the command to continue after a stop")
    tokenizer: str = option("gpt2", "'gpt2', or the path of a tokenizer.json")
    end_of_text: str = option(END_OF_TEXT, "the token that ends each document")
    column: str = option("text", "the column of Parquet, or field of JSON, that holds the text")
    val_fraction: float = option(0.0005, "fraction of the documents for validation, chosen by a hash of their text")
    shard: str = option("1/1", "i/n: this is job i of n (from 1) in an array; make every n-th part from the i-th")
    workers: int = option(0, "processes; 0: one per core")
    part_mb: int = option(256, "megabytes of source files per part, which becomes a shard; a stop loses parts begun")

    def validate(self) -> None:
        self.require("://" not in self.out, "out", "is not a local folder: copy the shards to a bucket afterwards")
        self.require(0 < self.val_fraction < 1, "val_fraction", "is not between 0 and 1")
        self.require(self.workers >= 0, "workers", "is negative")
        self.require(self.part_mb > 0, "part_mb", "is not positive")
        job = re.fullmatch(r"(\d+)/(\d+)", self.shard)
        self.require(job is not None and 1 <= int(job[1]) <= int(job[2]), "shard", "is not i/n with i from 1 to n")
        fix = "is not trained yet: `python -m gptjax.data SAMPLE.txt --tokenizer bpe` trains one to pass here"
        self.require(self.tokenizer not in ("char", "bpe"), "tokenizer", fix)


class Count(NamedTuple):
    """The documents and tokens that are written, of a part or of several."""

    documents: int = 0
    train_tokens: int = 0
    val_tokens: int = 0

    def __str__(self) -> str:
        return f"{self.documents:,} documents, {self.train_tokens + self.val_tokens:,} tokens"


def tokenize_corpus(config: TokenizeConfig) -> None:
    """Make every shard of this job of the array that `config.out` lacks, and print the speed.

    Raises `UserError` if a source cannot be read, the folder was begun with other settings, or a worker died.
    """
    files = find_files(config.sources)
    parts = parts_of(files, config.part_mb << 20)
    begin_folder(config, files, len(parts))
    job, n_jobs = map(int, config.shard.split("/"))
    missing = {i: parts[i] for i in range(job - 1, len(parts), n_jobs) if not _is_complete(config.out, i)}
    n_workers = min(config.workers or n_cores(), len(missing))
    start = time.perf_counter()
    with contextlib.closing(_run(missing, config, n_workers)) as counts:
        total = _show(counts, missing)
    seconds = time.perf_counter() - start
    if missing:
        rate = (total.train_tokens + total.val_tokens) / seconds
        speed = f"{rate:,.0f} tokens/s with {n_workers} workers, {rate / n_workers:,.0f} each"
        written = f"{total} ({total.val_tokens:,} for validation)"
        print(f"tokenized {len(missing)} parts in {seconds:,.1f} s: {written}, {speed}")
    n_made = sum(_is_complete(config.out, number) for number in range(len(parts)))
    print(f"{config.out} has {n_made} of {len(parts)} parts" + ("" if missing else ": nothing left for this job to do"))


def tokenize_part(number: int, part: Part, tokenizer: Tokenizer, config: TokenizeConfig) -> Count:
    """Write a part's two shards, and return what they hold."""
    dtype, end = dtype_for(tokenizer.vocab_size), tokenizer.vocabulary()[config.end_of_text]
    train, val = _shards_of(config.out, number)
    n_documents, n_tokens = 0, [0, 0]
    with token_writer(train, dtype) as write_train, token_writer(val, dtype) as write_val:
        for batch in _batches(part, config):
            encoded = tokenizer.encode_batch([text for text, _, _ in batch])
            for ids, (_, to_val, ends) in zip(encoded, batch, strict=True):
                ids = np.append(ids, np.int32(end)) if ends else ids
                (write_val if to_val else write_train)(ids)
                n_tokens[to_val] += len(ids)
                n_documents += ends
    return Count(n_documents, *n_tokens)


def validates(document: Document, fraction: float) -> bool:
    """Return whether a document is for validation: by a hash of its text, so that copies are in the same split."""
    digest = hashlib.blake2b(digest_size=8)
    for text in document:
        digest.update(text.encode())
    return int.from_bytes(digest.digest(), "little") < fraction * 2**64


def _batches(part: Part, config: TokenizeConfig) -> Iterator[list[tuple[str, bool, bool]]]:
    """Yield lists of texts to encode together: documents, or stretches of long ones, cut where that changes no token.

    With each text comes whether it is for validation and whether a document ends with it.
    """
    batch, n = list[tuple[str, bool, bool]](), 0
    for document in (document for piece in part for document in documents(piece, config.column)):
        to_val = validates(document, config.val_fraction)
        chunks = (text[i : i + _LONG] for text in document for i in range(0, len(text), _LONG))
        for text in safe_chunks(chunks, longest_whole=_LONG):
            if n >= _BATCH or len(batch) == _BATCH_TEXTS:
                yield batch
                batch, n = [], 0
            batch.append((text, to_val, False))
            n += len(text)
        batch[-1] = (batch[-1][0], to_val, True)
    if batch:
        yield batch


def begin_folder(config: TokenizeConfig, files: dict[str, int], n_parts: int) -> None:
    """Write data.json and tokenizer.json into `config.out`, or check that those in it are the same."""
    folder, tokenizer = Path(config.out), Tokenizer.from_name_or_path(config.tokenizer)
    if tokenizer.token_id(config.end_of_text) is None:
        missing = f"tokenizer {config.tokenizer!r} has no token {config.end_of_text!r}"
        raise UserError(f"{missing}: pass the token that ends its texts as --end_of_text")
    spec, copy = tokenizer.to_json(), folder / "tokenizer.json"
    settings = ("end_of_text", "column", "val_fraction", "part_mb")
    manifest: dict[str, Any] = {
        "format": "llmc",
        "dtype": dtype_for(tokenizer.vocab_size).name,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer": hashlib.sha256(spec.encode()).hexdigest(),
        **{name: getattr(config, name) for name in settings},
        "parts": n_parts,
        "version": _VERSION,
        "files": files,
    }
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / MANIFEST).exists():
        if token_files.shards(folder, "train") or token_files.shards(folder, "val"):
            raise UserError(f"{folder} holds token files of another kind: pass another --out")
        if copy.exists() and copy.read_bytes() != spec.encode():
            raise UserError(f"{copy} is another tokenizer, which this would replace: pass another --out")
        write_new(folder / MANIFEST, json.dumps(manifest, indent=1))
    found = read_json(folder / MANIFEST)
    differing = [
        name if name in ("files", "tokenizer") else f"{name} ({found.get(name)!r}, not {value!r})"
        for name, value in manifest.items()
        if name != "parts" and found.get(name) != value
    ]
    if differing:
        other = f"{folder} was begun with other {', '.join(differing)}"
        raise UserError(f"{other}: repeat the command that began it, or pass another --out")
    if not copy.exists() or copy.read_bytes() != spec.encode():
        write_atomically(copy, spec)


def _shards_of(folder: str, number: int) -> tuple[Path, Path]:
    return Path(folder, f"train_{number:06d}.bin"), Path(folder, f"val_{number:06d}.bin")


def _is_complete(folder: str, number: int) -> bool:
    try:
        return len(Tokens(_shards_of(folder, number)).paths) == 2
    except (OSError, UserError):  # missing, or cut when the machine went down
        return False


def _run(parts: dict[int, Part], config: TokenizeConfig, n_workers: int) -> Generator[tuple[int, Count], None, None]:
    """Tokenize the parts in processes; yield the number of a part and its count when it is complete."""
    _remove_unfinished(parts, config)  # of a process that was killed
    if not parts:
        return
    with ProcessPoolExecutor(n_workers, multiprocessing.get_context("spawn"), _begin_worker) as pool:
        interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: only this process reports Ctrl-C
        made = {pool.submit(_work, number, part, config): number for number, part in parts.items()}
        signal.signal(signal.SIGINT, interrupt)
        try:
            for future in as_completed(made):
                yield made[future], future.result()
        except BrokenProcessPool as error:
            raise UserError("a worker was killed, most often out of memory: repeat with fewer --workers") from error
        finally:
            for process in multiprocessing.active_children():
                process.terminate()
                process.join()
            _remove_unfinished(parts, config)


def _remove_unfinished(parts: Iterable[int], config: TokenizeConfig) -> None:
    for shard in (shard for number in parts for shard in _shards_of(config.out, number)):
        remove_leftovers(shard.parent, shard.name)


def _begin_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent: Any = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()  # end with the parent process


def _work(number: int, part: Part, config: TokenizeConfig) -> Count:
    try:
        return tokenize_part(number, part, Tokenizer.load(Path(config.out, "tokenizer.json")), config)
    except OSError as error:
        raise UserError(f"cannot write in {config.out}: {error.strerror}; repeat the command to continue") from error


def _show(counts: Iterable[tuple[int, Count]], parts: dict[int, Part]) -> Count:
    """Show the counts as they come, in a bar on a terminal, and return their total; a log gets a line per part."""
    total, sizes = Count(), {number: sum(piece.stop - piece.start for piece in part) for number, part in parts.items()}
    with working("tokenizing", sum(sizes.values())) as advance:
        for number, count in counts:
            total = Count(*map(sum, zip(total, count, strict=True)))
            advance(sizes[number], str(total))
            if not sys.stdout.isatty():
                print(f"part {number}: {count}", flush=True)
    return total
