"""Make a data set from a text or conversations: a folder of train.bin, val.bin, tokenizer.json and more; open it."""

import contextlib
import hashlib
import itertools
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gptjax.config import DataConfig
from gptjax.data import conversations, remote, token_files
from gptjax.data.conversations import Conversations, open_conversations
from gptjax.data.corpora import Corpus, between, open_corpus
from gptjax.data.integrity import Content, contents, place_of
from gptjax.data.packing import PackedTokens, entries_of
from gptjax.data.token_files import MANIFEST, UINT32, Tokens, dtype_for, open_split, write_tokens
from gptjax.errors import UserError
from gptjax.files import LOCK, claim, locked, read_json, write_atomically
from gptjax.progress import track
from gptjax.tokenizer import Tokenizer

_VERSION = 1  # of how a text is prepared; after a change of it every text is prepared again


class Dataset(NamedTuple):
    """The training and validation tokens, and their tokenizer."""

    train: Tokens
    val: Tokens
    tokenizer: Tokenizer
    folder: Path | str
    contents: dict[Path, Content] = {}  # of the files that are not in a bucket
    side_files: dict[str, str] = {}  # of conversations: what a run has beside tokenizer.json, by name

    def fingerprint(self) -> str:
        """Return three hashes by which a resumed run recognizes its data, between colons.

        They are of both ends of every token file, of whole files ("" for those in a bucket) and of the vocabulary.
        """
        ends = self.train.fingerprint() + self.val.fingerprint()
        whole = "".join(content.digest for content in self.contents.values())
        hashes = [text and hashlib.sha256(text.encode()).hexdigest() for text in (ends, whole)]
        return ":".join([*hashes, self.tokenizer.fingerprint()])

    def matches(self, fingerprint: str) -> bool:
        """Return whether the hashes that both have are the same; version 0.1 saved the first one alone."""
        pairs = zip(self.fingerprint().split(":"), fingerprint.split(":"), strict=False)
        return all(ours == saved for ours, saved in pairs if ours and saved)

    def require(self, block_size: int, vocab_size: int = 0) -> None:
        """Raise `UserError` unless there is a window to train on, a target to validate on, and every id is known.

        Known ids are those of the tokenizer and those below `vocab_size`.
        """
        for split, tokens, needed in (("train", self.train, block_size + 1), ("val", self.val, 2)):
            if isinstance(tokens, PackedTokens) and len(tokens) < needed:
                fix = "use a larger --model.block_size, other conversations or another --data.val_fraction"
                raise UserError(f"the {split} split of {self.folder} is empty: {tokens.summary()}; {fix}")
            if len(tokens) < needed:
                fix = "use a longer text, a smaller --model.block_size or another --data.val_fraction"
                found = f"the {split} split of {self.folder} has {len(tokens)} tokens"
                raise UserError(f"{found}; block_size={block_size} needs {needed}: {fix}")
        if isinstance(self.train, PackedTokens):
            return  # whose ids are of this tokenizer: they are made together
        limit = max(vocab_size, self.tokenizer.vocab_size)
        for path, ids in (self.train.files() | self.val.files()).items():
            if path in self.contents and self.contents[path].largest >= limit:
                place, token = place_of(ids, limit)
                found = f"{path} holds id {token} as token {place:,}, but the vocabulary has {limit:,}"
                fix = "put the tokenizer.json that made it beside it, or copy it again"
                raise UserError(f"{found}: {fix}")

    def run_files(self) -> dict[str, str]:
        """Return the texts of the files that a run keeps of its data, by name."""
        return {"tokenizer.json": self.tokenizer.to_json()} | self.side_files

    def summary(self) -> str:
        """Return the sizes of both splits."""
        if isinstance(self.train, PackedTokens) and isinstance(self.val, PackedTokens):
            return f"{self.train.summary()} to train on, {self.val.summary()} to validate on"
        return f"{len(self.train):,} tokens to train on, {len(self.val):,} to validate on"

    def characters_per_token(self) -> float:
        """Return the mean length of the validation split's first tokens, of conversations the ones to predict."""
        some = self.val.predicted(100_000) if isinstance(self.val, PackedTokens) else self.val.window(0, 100_000)
        return len(self.tokenizer.decode(some)) / len(some)


def load_dataset(config: DataConfig, block_size: int = 0) -> Dataset:
    """Open the token files in `config.source`, or else those of its text, which are prepared if they do not exist.

    Conversations are packed into windows for this `block_size`.
    """
    folder = config.source.rstrip("/") if remote.is_url(config.source) else Path(config.source)
    if not _has_token_files(folder):
        if isinstance(folder, str):
            raise UserError(f"{folder} holds no token files: make some with `python -m gptjax.data tokenize`")
        folder = prepare(config)
    if isinstance(folder, Path):
        _require_unchanged(folder)
    _require_format(folder, config)
    tokenizer = _tokenizer_of(folder, config.tokenizer)
    train, val = (open_split(folder, each, dtype_for(tokenizer.vocab_size)) for each in ("train", "val"))
    found = contents(train.files() | val.files())
    if config.format == "text":
        return Dataset(train, val, tokenizer, folder, found)
    packed = [PackedTokens(tokens, block_size) for tokens in (train, val)]
    names = [name for name in conversations.CHAT_FILES if Path(folder, name).exists()]
    texts = {name: Path(folder, name).read_text(encoding="utf-8") for name in names}
    return Dataset(packed[0], packed[1], tokenizer, folder, found, texts)


def _require_format(folder: Path | str, config: DataConfig) -> None:
    """Raise `UserError` unless the token files are of a text, or of conversations, as the config says."""
    if isinstance(folder, str) and config.format == "chat":
        raise UserError(f"data.source={folder} is in a bucket, and conversations are read from a local folder: copy it")
    made = read_json(folder / MANIFEST, missing_ok=True) if isinstance(folder, Path) else {}
    if (made.get("format") == "chat") != (config.format == "chat"):
        found, fix = ("conversations", "chat") if config.format == "text" else ("the tokens of a text", "text")
        raise UserError(f"{folder} holds {found}: pass --data.format {fix}, or another --data.source")


def prepare(config: DataConfig) -> Path:
    """Make a folder of token files from a text, or find the one made from the same files; say which on stdout.

    The folder gets its name when it is complete, so two preparations at once do no harm. What a preparation that died
    left is removed by the next one.
    """
    if _has_token_files(Path(config.source)):
        raise UserError(f"{config.source} holds token files already: train on them with --data.source {config.source}")
    try:
        Path(config.dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make folder dir={config.dir!r} ({error.strerror}): pass another --data.dir") from error
    corpus = open_conversations(config) if config.format == "chat" else open_corpus(config)
    recipe, files = _recipe(config, corpus)
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:8]
    folder = Path(config.dir, f"{_slug(corpus.name)}-{_slug(Path(config.tokenizer).stem)}-{digest}")
    made_from = recipe | {"files": [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files]}
    reused = _is_current(folder, made_from)
    _remove_leftovers(folder.parent)
    if reused:
        _require_unchanged(folder)
    else:
        made = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}")
        with locked(made), contextlib.ExitStack() as stack:
            stack.callback(shutil.rmtree, made, ignore_errors=True)
            write = _write_conversations if isinstance(corpus, Conversations) else _write_folder
            manifest = write(made, config, corpus) | {"made_from": made_from}  # type: ignore[arg-type]
            write_atomically(made / MANIFEST, json.dumps(manifest))  # states the type of the tokens
            manifest["digests"] = _digests(made)
            write_atomically(made / MANIFEST, json.dumps(manifest, indent=1))
            (made / LOCK).unlink(missing_ok=True)
            _move_into_place(made, folder, made_from)
    sizes = "{characters:,} characters, vocabulary {vocab_size:,}, train {train_tokens:,} tokens, val {val_tokens:,}"
    if config.format == "chat":
        sizes = sizes.replace(
            "{characters:,} characters", "{conversations:,} conversations, {predicted:,} tokens to learn"
        )
    print(f"{'reused' if reused else 'prepared'} {folder}: {sizes.format(**read_json(folder / MANIFEST))}")
    return folder


def _write_folder(made: Path, config: DataConfig, corpus: Corpus) -> dict[str, Any]:
    """Write all files but data.json, whose fields are returned. Reads the text twice, or three times for a BPE."""
    n, alphabet = 0, set[str]()
    for chunk in corpus.chunks():
        n += len(chunk)
        alphabet.update(chunk)
    if n < 2:
        raise UserError(f"{corpus.identity} is empty: pass a text of at least one character for each split")
    n_train = int(n * (1 - config.val_fraction))  # in characters, as in nanoGPT

    def text(start: int, stop: int, what: str) -> Iterator[str]:
        return track(between(corpus.chunks(), start, stop), what, stop - start, len)

    if config.tokenizer == "char":
        tokenizer = Tokenizer.characters(alphabet)
    elif config.tokenizer == "bpe":
        tokenizer = Tokenizer.train_bpe(text(0, n_train, "training the BPE"), config.vocab_size)
    else:
        tokenizer = Tokenizer.from_name_or_path(config.tokenizer)
    tokenizer.save(made / "tokenizer.json")
    dtype = dtype_for(tokenizer.vocab_size)
    fields = {"characters": n, "vocab_size": tokenizer.vocab_size, "dtype": dtype.name, "format": "nanogpt"}
    for split, start, stop in (("train", 0, n_train), ("val", n_train, n)):
        ids = tokenizer.encode_chunks(text(start, stop, f"encoding {split}"))
        fields[f"{split}_tokens"] = write_tokens(made / f"{split}.bin", ids, dtype)
    return fields


def _write_conversations(made: Path, config: DataConfig, source: Conversations) -> dict[str, Any]:
    """Write all files but data.json, whose fields are returned, for conversations."""
    n = sum(1 for _ in source.all())  # which also finds every mistake in them
    n_train = int(n * (1 - config.val_fraction))
    if not 0 < n_train < n:
        raise UserError(f"{source.identity} has {n} conversations: pass one at least for each split")
    chat = conversations.chat_format(config, source, n_train)
    encoded = conversations.encode(chat, track(source.all(), "encoding conversations", n))
    first, counts = next(encoded), {"predicted": 0}

    def entries(examples: Iterator[Any]) -> Iterator[Any]:
        for ids, predicted in examples:
            counts["predicted"] += int(predicted.sum())
            yield entries_of(ids, predicted)

    fields: dict[str, Any] = {"conversations": n, "vocab_size": chat.tokenizer.vocab_size}
    fields |= {"dtype": UINT32.name, "format": "chat"}
    for split, examples in (
        ("train", itertools.chain([first], itertools.islice(encoded, n_train - 1))),
        ("val", encoded),
    ):
        fields[f"{split}_tokens"] = write_tokens(made / f"{split}.bin", entries(examples), UINT32)
    chat.tokenizer.save(made / "tokenizer.json")
    folder = conversations.settings_folder(config.tokenizer)
    for name, text in conversations.side_files(chat, folder, first).items():
        (made / name).write_text(text, encoding="utf-8")
    return fields | counts


def _recipe(config: DataConfig, corpus: Corpus | Conversations) -> tuple[dict[str, Any], list[Path]]:
    """Return the settings that the token files depend on, and the files that they are made from."""
    recipe: dict[str, Any] = {"source": corpus.identity, "format": "nanogpt", "version": _VERSION}
    if config.format == "chat":
        recipe["format"] = "chat"
    recipe |= {"tokenizer": config.tokenizer, "val_fraction": config.val_fraction}
    path, files = Path(config.tokenizer), list(corpus.files)
    if config.tokenizer == "bpe":
        recipe["vocab_size"] = config.vocab_size
    elif config.tokenizer not in ("char", "gpt2"):
        recipe["tokenizer"] = str(path.resolve())
        files += [path] if path.is_file() else sorted(file for file in path.glob("*") if file.is_file())
        if config.format == "chat" and path.is_file():  # the settings beside it
            files += [file for name in conversations.CHAT_FILES if (file := path.with_name(name)).exists()]
    return recipe, files


def _is_current(folder: Path, made_from: dict[str, Any]) -> bool:
    """Return whether a folder has all its files and was made from these; a damaged data.json says nothing."""
    try:
        manifest = read_json(folder / MANIFEST) if (folder / "tokenizer.json").exists() else {}
    except UserError:
        return False
    size = "conversations" if made_from["format"] == "chat" else "characters"
    counts = [manifest.get(name) for name in (size, "vocab_size", "train_tokens", "val_tokens")]
    made = all(type(n) is int for n in counts) and manifest.get("made_from") == made_from
    return made and _has_token_files(folder)


def _digests(folder: Path) -> dict[str, str]:
    """Return a digest of the tokens or the text of each file that `prepare` makes, without data.json."""
    files = {path: tokens for split in ("train", "val") for path, tokens in open_split(folder, split).files().items()}
    text = hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    return {path.name: content.digest for path, content in contents(files).items()} | {"tokenizer.json": text}


def _require_unchanged(folder: Path) -> None:
    """Raise `UserError` for a file whose digest is not that in data.json."""
    digests = read_json(folder / MANIFEST, missing_ok=True).get("digests")
    if isinstance(digests, dict):
        found = _digests(folder)
        for name in (name for name, digest in digests.items() if found.get(name) != digest):
            raise UserError(
                f"{folder / name} is not as it was made: delete {folder} to make it again, or copy it again"
            )


def _remove_leftovers(folder: Path) -> None:
    """Remove the folders of preparations whose process is gone, known by their names and their locks."""
    for lock in folder.glob(f".*/{LOCK}"):
        if re.fullmatch(r"\..+-[0-9a-f]{8}-[0-9a-f]{8}(-outdated)?", lock.parent.name):
            with contextlib.suppress(OSError), lock.open("ab") as file:
                if claim(file):
                    shutil.rmtree(lock.parent)


def _move_into_place(made: Path, folder: Path, made_from: dict[str, Any]) -> None:
    """Rename a complete folder. An outdated one is replaced; one that another process has just made is kept."""
    if folder.exists() and not _is_current(folder, made_from):
        outdated = made.with_name(made.name + "-outdated")
        (folder / LOCK).touch()  # so that it is removed even if this process dies here
        os.rename(folder, outdated)
        shutil.rmtree(outdated, ignore_errors=True)
    try:
        os.rename(made, folder)
    except OSError:
        if not _is_current(folder, made_from):
            raise


def _has_token_files(folder: Path | str) -> bool:
    return bool(token_files.shards(folder, "train") and token_files.shards(folder, "val"))


def _tokenizer_of(folder: Path | str, name: str) -> Tokenizer:
    """Return the tokenizer beside the token files, or else the one that the user names."""
    if (data := token_files.side_file(folder, "tokenizer.json")) is not None:
        return Tokenizer.from_json(data, f"{folder}/tokenizer.json")
    if name not in ("char", "bpe"):
        return Tokenizer.from_name_or_path(name)
    fix = "name the one that made its token files: --data.tokenizer gpt2, or the path of a tokenizer.json"
    if isinstance(folder, Path) and (folder / "meta.pkl").exists():
        fix = f"prepare the text that they were made from: --data.source {folder / 'input.txt'}"
    raise UserError(f"{folder} has no tokenizer.json: {fix}")


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9._]+", "-", name.lower()).strip("-.")[:60] or "text"
