"""Text to a folder of train.bin, val.bin, tokenizer.json and a data.json that says what they were made from."""

import hashlib
import json
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.progress import Progress

from gptjax.config import DataConfig
from gptjax.data import remote, token_files
from gptjax.data.corpora import Corpus, between, open_corpus
from gptjax.data.token_files import MANIFEST, Tokens, dtype_for, write_split
from gptjax.errors import UserError
from gptjax.tokenizer import Tokenizer

_VERSION = 1  # of what preparing does to a text; a new one prepares everything anew
Format = Literal["nanogpt", "llmc"]


@dataclass(frozen=True)
class Dataset:
    """Two splits and the tokenizer that made them."""

    train: Tokens
    val: Tokens
    tokenizer: Tokenizer
    folder: Path | str

    def fingerprint(self) -> str:
        """What a run compares to know that it resumes on the same tokens."""
        return hashlib.sha256((self.train.fingerprint() + self.val.fingerprint()).encode()).hexdigest()

    def require(self, block_size: int) -> None:
        """Raise `UserError` unless there is a window to train on and a target to validate on."""
        for split, tokens, needed in (("train", self.train, block_size + 1), ("val", self.val, 2)):
            if len(tokens) < needed:
                raise UserError(
                    f"the {split} split of {self.folder} has {len(tokens)} tokens; block_size={block_size} needs "
                    f"{needed}: use a longer text, a smaller --model.block_size or another --data.val_fraction"
                )


def load_dataset(config: DataConfig) -> Dataset:
    """Open the token files that `config.source` holds, or those of its text, preparing them if need be."""
    folder = _folder_of(config)
    return Dataset(
        train=token_files.open_split(folder, "train"),
        val=token_files.open_split(folder, "val"),
        tokenizer=_tokenizer_of(folder, config.tokenizer),
        folder=folder,
    )


def _folder_of(config: DataConfig) -> Path | str:
    remotely = remote.is_url(config.source)
    folder = config.source.rstrip("/") if remotely else Path(config.source).expanduser()
    if _has_token_files(folder):
        return folder
    if remotely:
        raise UserError(
            f"{folder} holds no token files: make them with `python -m gptjax.data tokenize` and copy them there"
        )
    return prepare(config)


def prepare(config: DataConfig, form: Format = "nanogpt") -> Path:
    """Make the folder of token files for a text, or find it made from the very same files; say which on stdout.

    It is built under another name and renamed when it is whole, so that a preparation that dies, or two at once, are
    safe.
    """
    if _has_token_files(Path(config.source).expanduser()):
        raise UserError(f"{config.source} holds token files already: train on them with --data.source {config.source}")
    try:
        Path(config.dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make folder dir={config.dir!r} ({error.strerror}): pass another --data.dir") from error
    corpus = open_corpus(config)
    recipe = _recipe(config, corpus, form)
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:8]
    folder = Path(config.dir, f"{_slug(corpus.name)}-{_slug(Path(config.tokenizer).stem)}-{digest}")
    made_from = recipe | {"files": _stamps([*corpus.files, *_tokenizer_files(config.tokenizer)])}
    if _is_current(folder, made_from):
        print(f"reused {folder}: {_summary(folder)}")
        return folder
    made = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}")
    made.mkdir()
    try:
        manifest = _write_folder(made, config, corpus, form)
        (made / MANIFEST).write_text(json.dumps(manifest | {"made_from": made_from}, indent=1), encoding="utf-8")
        _move_into_place(made, folder, made_from)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    print(f"prepared {folder}: {_summary(folder)}")
    return folder


def _write_folder(made: Path, config: DataConfig, corpus: Corpus, form: Format) -> dict[str, Any]:
    """Read the text twice, three times for a BPE: count and collect its characters, learn the BPE, encode."""
    trains_tokenizer = config.tokenizer in ("char", "bpe")
    tokenizer = None if trains_tokenizer else Tokenizer.from_name_or_path(config.tokenizer)
    n, alphabet = _survey(corpus)
    n_train = int(n * (1 - config.val_fraction))  # by characters, as in nanoGPT

    def text(start: int, stop: int, what: str) -> Iterator[str]:
        return _shown(between(corpus.chunks(), start, stop), stop - start, what)

    if tokenizer is None and config.tokenizer == "char":
        tokenizer = Tokenizer.characters(alphabet)
    elif tokenizer is None:
        tokenizer = Tokenizer.train_bpe(text(0, n_train, "learning the BPE"), config.vocab_size)
    tokenizer.save(made / "tokenizer.json")
    dtype = dtype_for(tokenizer.vocab_size)
    splits = {
        "train": tokenizer.encode_chunks(text(0, n_train, "encoding train")),
        "val": tokenizer.encode_chunks(text(n_train, n, "encoding val")),
    }
    counts = {f"{split}_tokens": write_split(made, split, ids, dtype, form) for split, ids in splits.items()}
    return {"characters": n, "vocab_size": tokenizer.vocab_size, "dtype": dtype.name, "format": form} | counts


def _survey(corpus: Corpus) -> tuple[int, set[str]]:
    n, alphabet = 0, set[str]()
    for chunk in corpus.chunks():
        n += len(chunk)
        alphabet.update(chunk)
    if n < 2:
        raise UserError(f"{corpus.identity} is empty: pass a text of at least one character for each split")
    return n, alphabet


def _recipe(config: DataConfig, corpus: Corpus, form: Format) -> dict[str, Any]:
    """Everything but the files' contents that the token files depend on."""
    by_path = config.tokenizer not in ("char", "bpe", "gpt2")
    recipe = {
        "source": corpus.identity,
        "tokenizer": str(Path(config.tokenizer).resolve()) if by_path else config.tokenizer,
        "val_fraction": config.val_fraction,
        "format": form,
        "version": _VERSION,
    }
    if config.tokenizer == "bpe":
        recipe["vocab_size"] = config.vocab_size
    return recipe


def _stamps(files: Iterable[Path]) -> list[list[str | int]]:
    return [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def _tokenizer_files(name: str) -> list[Path]:
    path = Path(name)
    if name in ("char", "bpe", "gpt2"):
        return []
    return [path] if path.is_file() else sorted(file for file in path.glob("*") if file.is_file())


def _is_current(folder: Path, made_from: dict[str, Any]) -> bool:
    manifest = folder / MANIFEST
    return (
        _has_token_files(folder)
        and (folder / "tokenizer.json").exists()
        and manifest.exists()
        and json.loads(manifest.read_text(encoding="utf-8"))["made_from"] == made_from
    )


def _move_into_place(made: Path, folder: Path, made_from: dict[str, Any]) -> None:
    """Rename a finished folder; one that was made from other files goes, one that another process just made stays."""
    if _is_current(folder, made_from):
        return
    if folder.exists():
        outdated = made.with_name(made.name + "-outdated")
        os.rename(folder, outdated)
        shutil.rmtree(outdated)
    try:
        os.rename(made, folder)
    except OSError:
        if not _is_current(folder, made_from):
            raise


def _has_token_files(folder: Path | str) -> bool:
    return bool(token_files.shards(folder, "train") and token_files.shards(folder, "val"))


def _tokenizer_of(folder: Path | str, name: str) -> Tokenizer:
    """The tokenizer beside the token files, else the one that the user names."""
    if text := token_files.side_file(folder, "tokenizer.json"):
        return Tokenizer.from_json(text, f"{folder}/tokenizer.json")
    if name not in ("char", "bpe"):
        return Tokenizer.from_name_or_path(name)
    if isinstance(folder, Path) and (folder / "meta.pkl").exists():
        way_out = f"run `python -m gptjax.data convert-meta {folder / 'meta.pkl'}` once"
    else:
        way_out = "name the one that made its token files: --data.tokenizer gpt2, or the path of a tokenizer.json"
    raise UserError(f"{folder} has no tokenizer.json: {way_out}")


def _summary(folder: Path) -> str:
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    fields = "{characters:,} characters, vocabulary {vocab_size:,}, train {train_tokens:,} tokens, val {val_tokens:,}"
    return fields.format(**manifest)


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9._]+", "-", name.lower()).strip("-.")[:60] or "text"


def _shown(chunks: Iterable[str], total: int, what: str) -> Iterator[str]:
    """The same chunks, with a progress bar on a terminal."""
    with Progress(disable=not sys.stdout.isatty(), transient=True) as bar:
        task = bar.add_task(what, total=total)
        for chunk in chunks:
            yield chunk
            bar.advance(task, len(chunk))
