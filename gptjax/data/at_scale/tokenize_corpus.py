"""A corpus of any size to a folder of token files: parallel over cores, restartable, in bounded memory.

The corpus is cut into parts; each gives one shard of llm.c's form for either split. What a shard holds depends on the
sources and the tokenizer alone: not on how many workers there are, nor on which job of an array made it, nor when.
"""

import contextlib
import hashlib
import itertools
import json
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.progress import Progress

from gptjax.config import Section, argument, option
from gptjax.data import token_files
from gptjax.data.at_scale.documents import Document, Part, Unreadable, documents, find_files, parts_of
from gptjax.data.token_files import MANIFEST, Tokens, dtype_for, token_writer
from gptjax.errors import UserError
from gptjax.files import replacing
from gptjax.host import n_cores
from gptjax.tokenizer import END_OF_TEXT, Tokenizer, safe_chunks

_VERSION = 1  # of what a shard holds; a new one refuses to go on in a folder of the old
_LONG = 1 << 20  # characters of a document that are encoded at once
_BATCH = 1 << 18  # characters, or
_BATCH_TEXTS = 64  # texts, that are handed to the tokenizer together
_WAITS = (5, 30)  # seconds before a part whose bucket did not answer is begun again


@dataclass(frozen=True)
class TokenizeConfig(Section):
    sources: tuple[str, ...] = argument(
        "files, folders or patterns, local or hf://datasets/..., gs://, s3://: .parquet, .jsonl (or .json, a document "
        "a line) and .txt (a document a file), the latter two also as .gz or .zst",
        many=True,
    )
    out: str = option("data/corpus", "folder for the token files; the same command again goes on where it stopped")
    tokenizer: str = option("gpt2", "'gpt2', or the path of a tokenizer.json")
    end_of_text: str = option(END_OF_TEXT, "the token that ends each document")
    column: str = option("text", "the column of Parquet, or field of JSON, that holds the text")
    val_fraction: float = option(0.0005, "the part of all documents that validates, by a hash of their text")
    shard: str = option("1/1", "i/n: make the i-th n-th of all parts, 1/n to n/n, for the jobs of an array")
    workers: int = option(0, "processes; 0: one a core")
    part_mb: int = option(256, "megabytes of source in a part, which gives one shard and which a stop can lose")

    def validate(self) -> None:
        self.require("://" not in self.out, "out", "is no local folder: copy the shards to a bucket when they are made")
        self.require(0 < self.val_fraction < 1, "val_fraction", "is not between 0 and 1")
        self.require(self.workers >= 0, "workers", "is negative")
        self.require(self.part_mb > 0, "part_mb", "is not positive")
        places = re.fullmatch(r"(\d+)/(\d+)", self.shard)
        fits = places is not None and 1 <= int(places[1]) <= int(places[2])
        self.require(fits, "shard", "is no i/n with i from 1 to n")
        learned = "is not made yet: `python -m gptjax.data SAMPLE.txt --tokenizer bpe` learns one to pass here"
        self.require(self.tokenizer not in ("char", "bpe"), "tokenizer", learned)

    def mine(self, parts: Sequence[Part]) -> dict[int, Part]:
        """The parts of this job of the array, by number."""
        i, n = map(int, self.shard.split("/"))
        return dict(list(enumerate(parts))[i - 1 :: n])


class Count(NamedTuple):
    """How far a part has come."""

    documents: int = 0
    train_tokens: int = 0
    val_tokens: int = 0


def tokenize_corpus(config: TokenizeConfig) -> None:
    """Make every shard of this job of the array that `config.out` lacks, and say how fast on stdout.

    Raises:
        UserError: a source that cannot be read, a folder begun with other settings, a worker that died.
    """
    files = find_files(config.sources)
    parts = parts_of(files, config.part_mb << 20)
    folder = Path(config.out)
    _begin(folder, config, files, len(parts))
    mine = config.mine(parts)
    missing = {number: part for number, part in mine.items() if not _is_whole(folder, number)}
    n_workers = min(config.workers or n_cores(), len(missing))
    start = time.perf_counter()
    with contextlib.closing(_run(missing, folder, config, n_workers)) as progress:
        total = _total(_shown(progress, missing).values())
    seconds = time.perf_counter() - start
    if missing:
        n_tokens = total.train_tokens + total.val_tokens
        print(
            f"tokenized {len(missing)} parts in {seconds:,.1f} s: {total.documents:,} documents, {n_tokens:,} tokens "
            f"({total.val_tokens:,} to validate on), {n_tokens / seconds:,.0f} tokens/s with {n_workers} workers, "
            f"{n_tokens / seconds / n_workers:,.0f} each"
        )
    n_made = sum(_is_whole(folder, number) for number in range(len(parts)))
    print(f"{folder} has {n_made} of {len(parts)} parts" + ("" if missing else ": nothing left for this job to do"))


def tokenize_part(
    folder: Path, number: int, part: Part, tokenizer: Tokenizer, config: TokenizeConfig
) -> Iterator[Count]:
    """Write a part's two shards; yields how far it has come, from batch to batch."""
    dtype, end = dtype_for(tokenizer.vocab_size), tokenizer.token_id(config.end_of_text)
    assert end is not None  # `_begin` has seen to it
    paths = _shards_of(folder, number)
    for left in (left for path in paths for left in folder.glob(f"{path.name}.*.part")):
        left.unlink(missing_ok=True)  # of a worker that was killed
    n_documents, n_tokens = 0, [0, 0]
    with token_writer(paths[0], dtype) as write_train, token_writer(paths[1], dtype) as write_val:
        for batch in _batches(part, config):
            encoded = tokenizer.encode_batch([text for text, _, _ in batch])
            for ids, (_, to_val, ends) in zip(encoded, batch, strict=True):
                ids = np.append(ids, np.int32(end)) if ends else ids
                (write_val if to_val else write_train)(ids)
                n_tokens[to_val] += len(ids)
            n_documents += sum(text.ends for text in batch)
            yield Count(n_documents, *n_tokens)


def validates(document: Document, fraction: float) -> bool:
    """Whether a document is of the validation split: by its text alone, so that copies are never on both sides."""
    digest = hashlib.blake2b(digest_size=8)
    for text in document:
        digest.update(text.encode())
    return int.from_bytes(digest.digest(), "little") < fraction * 2**64


class _Text(NamedTuple):
    """A document, or a stretch of a long one; whether it is for the validation split, and whether it ends there."""

    text: str
    to_val: bool
    ends: bool


def _batches(part: Part, config: TokenizeConfig) -> Iterator[list[_Text]]:
    batch, n = list[_Text](), 0
    for piece in part:
        for document in documents(piece, config.column):
            to_val = validates(document, config.val_fraction)
            for text, ends in _stretches(document):
                batch.append(_Text(text, to_val, ends))
                n += len(text)
                if n >= _BATCH or len(batch) == _BATCH_TEXTS:
                    yield batch
                    batch, n = [], 0
    if batch:
        yield batch


def _stretches(document: Document) -> Iterator[tuple[str, bool]]:
    """A document whole, or a long one in stretches, cut where that changes no token; and whether it ends there."""
    blocks = _blocks(document)
    text, second = next(blocks), next(blocks, None)
    if second is not None:
        stretches = safe_chunks(itertools.chain([text, second], blocks))
        text = next(stretches)
        for following in stretches:
            yield text, False
            text = following
    yield text, True


def _blocks(document: Document) -> Iterator[str]:
    """The text in blocks of `_LONG` characters, however it comes."""
    pending = ""
    for chunk in document:
        for i in range(0, len(chunk), _LONG):
            pending += chunk[i : i + _LONG]
            if len(pending) > _LONG:
                yield pending[:_LONG]
                pending = pending[_LONG:]
    yield pending


def _begin(folder: Path, config: TokenizeConfig, files: dict[str, int], n_parts: int) -> None:
    """Write data.json and tokenizer.json into the folder, or see that those there say the same."""
    tokenizer = Tokenizer.from_name_or_path(config.tokenizer)
    if tokenizer.token_id(config.end_of_text) is None:
        raise UserError(
            f"tokenizer {config.tokenizer!r} has no token {config.end_of_text!r}: pass the one that ends a text with "
            "it as --end_of_text"
        )
    spec = tokenizer.to_json()
    manifest = {
        "format": "llmc",
        "dtype": dtype_for(tokenizer.vocab_size).name,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer": hashlib.sha256(spec.encode()).hexdigest(),
        "end_of_text": config.end_of_text,
        "column": config.column,
        "val_fraction": config.val_fraction,
        "part_mb": config.part_mb,
        "parts": n_parts,
        "version": _VERSION,
        "files": files,
    }
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / MANIFEST).exists():
        if token_files.shards(folder, "train") or token_files.shards(folder, "val"):
            raise UserError(f"{folder} holds token files of another kind: pass another --out")
        for name, text in (("tokenizer.json", spec), (MANIFEST, json.dumps(manifest, indent=1))):
            with replacing(folder / name) as temporary:
                temporary.write_text(text, encoding="utf-8")
    found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if differing := [name for name in manifest if name != "parts" and found.get(name) != manifest[name]]:
        shown = {
            name: f" ({found.get(name)!r}, not {manifest[name]!r})"
            for name in differing
            if name not in ("files", "tokenizer")
        }
        raise UserError(
            f"{folder} was begun with other {', '.join(name + shown.get(name, '') for name in differing)}: repeat the "
            "command that began it, or pass another --out"
        )


def _shards_of(folder: Path, number: int) -> tuple[Path, Path]:
    return folder / f"train_{number:06d}.bin", folder / f"val_{number:06d}.bin"


def _is_whole(folder: Path, number: int) -> bool:
    paths = _shards_of(folder, number)
    try:
        return all(path.exists() for path in paths) and bool(Tokens(paths).paths)
    except UserError:  # cut short, when the machine went down
        return False


class _Worker:
    """A process that tokenizes one part after another; `number` and `part` are the one it is at."""

    def __init__(self, folder: Path, config: TokenizeConfig) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, folder, config))
        interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: of Ctrl-C the first process alone tells
        self.process.start()
        signal.signal(signal.SIGINT, interrupt)
        theirs.close()  # the worker has the only one, so that its end is noticed
        self.number, self.part = -1, Part()

    def begin(self, following: tuple[int, Part] | None) -> None:
        """Go on to a part; without one, end."""
        self.number, self.part = following or (-1, Part())
        if following is None:
            self.connection.close()
            return
        with contextlib.suppress(BrokenPipeError):  # it died: `receive` tells
            self.connection.send(following)

    def receive(self) -> Count | None:
        """How far the part has come, `None` at its end."""
        try:
            message: Count | None | UserError = self.connection.recv()
        except (EOFError, ConnectionResetError) as error:
            self.process.join()
            raise UserError(
                f"the worker on {self.part[0].file} (part {self.number}) ended with exit code {self.process.exitcode}, "
                "-9 most often for want of memory: repeat the command to go on, with fewer --workers"
            ) from error
        if isinstance(message, UserError):
            raise message
        return message


def _run(
    parts: dict[int, Part], folder: Path, config: TokenizeConfig, n_workers: int
) -> Generator[tuple[int, Count | None], None, None]:
    """Tokenize parts in processes; yields the number of a part with each count of it, and with `None` at its end."""
    waiting, workers = iter(parts.items()), list[_Worker]()
    try:
        for _ in range(n_workers):
            workers.append(_Worker(folder, config))
            workers[-1].begin(next(waiting))
        while busy := {worker.connection: worker for worker in workers if worker.part}:
            for connection in wait(list(busy)):
                worker = next(worker for worker in workers if worker.connection is connection)
                number, count = worker.number, worker.receive()
                if count is None:
                    worker.begin(next(waiting, None))
                yield number, count
    finally:
        for worker in workers:
            worker.process.terminate()
        for worker in workers:
            worker.process.join()


def _work(connection: Connection, folder: Path, config: TokenizeConfig) -> None:
    """A worker: takes parts until there are no more, or nobody listens any more."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # rather than at once, to remove the unfinished files
    try:
        tokenizer = Tokenizer.load(folder / "tokenizer.json")
        while True:
            number, part = connection.recv()
            for count in _until_read(folder, number, part, tokenizer, config):
                connection.send(count)
            connection.send(None)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except UserError as error:
        connection.send(UserError(str(error)))
    except OSError as error:
        connection.send(UserError(f"cannot write in {folder}: {error.strerror or error}; repeat the command to go on"))
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends by itself, and at exit Python would show a SystemExit


def _until_read(folder: Path, number: int, part: Part, tokenizer: Tokenizer, config: TokenizeConfig) -> Iterator[Count]:
    """`tokenize_part`, begun again where a bucket did not answer."""
    for wait_seconds in (*_WAITS, None):
        try:
            yield from tokenize_part(folder, number, part, tokenizer, config)
            return
        except Unreadable:
            if wait_seconds is None or not any("://" in piece.file for piece in part):
                raise
            time.sleep(wait_seconds)


def _shown(messages: Iterable[tuple[int, Count | None]], parts: dict[int, Part]) -> dict[int, Count]:
    """The last count of each part, shown as they come: a bar on a terminal, elsewhere a line for each part."""
    counts: dict[int, Count] = {}
    sizes = {number: sum(piece.stop - piece.start for piece in part) for number, part in parts.items()}
    terminal = sys.stdout.isatty()
    with Progress(disable=not terminal, transient=True) as bar:
        task = bar.add_task("tokenizing", total=sum(sizes.values()))
        for number, count in messages:
            if count is not None:
                counts[number] = count
                total = _total(counts.values())
                text = f"{total.documents:,} documents, {total.train_tokens + total.val_tokens:,} tokens"
                bar.update(task, description=text)
                continue
            bar.advance(task, sizes[number])
            if not terminal:
                done = counts.get(number, Count())
                n_tokens = done.train_tokens + done.val_tokens
                print(f"part {number}: {done.documents:,} documents, {n_tokens:,} tokens", flush=True)
    return counts


def _total(counts: Iterable[Count]) -> Count:
    return Count(*map(sum, zip(*counts, strict=True)))
