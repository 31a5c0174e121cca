"""Text to token ids and back: characters, a BPE trained here, GPT-2's, or any tokenizer.json of `tokenizers`."""

import hashlib
import itertools
import json
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Int, Int32, Integer
from tokenizers import decoders, models, pre_tokenizers, trainers

from gptjax.config import MAX_SIZE
from gptjax.errors import UserError
from gptjax.vocabulary import END_OF_TEXT, byte_level, read_vocabulary

Ids = Iterable[int] | Integer[np.ndarray, " T"]
_CHARACTERS = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")  # "." does not match a newline
_BATCH = 16  # chunks of a text that the library encodes at once, in its threads


class Tokenizer:
    """Encodes text to ids and decodes ids to text; stored as a tokenizer.json, which `tokenizers` also reads."""

    def __init__(self, library: tokenizers.Tokenizer) -> None:
        library.encode_special_tokens = True  # "<|endoftext|>" in a corpus is 13 characters of text
        library.no_truncation()  # settings of the batch that a tokenizer.json was last used for
        library.no_padding()
        self._library = library
        vocabulary = library.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(vocabulary.values(), default=-1) + 1  # some ids below it may be unused
        if self.vocab_size > MAX_SIZE:
            raise UserError(f"the tokenizer has the id {self.vocab_size - 1:,}: a vocabulary has at most {MAX_SIZE:,}")
        self.end_of_text: int | None = vocabulary.get(END_OF_TEXT)
        self._id_of_code_point = _character_table(library)
        self.begin: Int32[np.ndarray, " T"] = _first_tokens(library)

    @classmethod
    def characters(cls, alphabet: Iterable[str]) -> "Tokenizer":
        """Make each character a token; ids are in the order of the code points, as in nanoGPT."""
        return cls.from_characters({character: i for i, character in enumerate(sorted(set(alphabet)))})

    @classmethod
    def from_characters(cls, ids: dict[str, int]) -> "Tokenizer":
        """Make a character tokenizer with the given id of each character."""
        library = tokenizers.Tokenizer(models.WordLevel(ids))
        library.pre_tokenizer, library.decoder = _CHARACTERS, decoders.Fuse()
        return cls(library)

    @classmethod
    def train_bpe(cls, chunks: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Train a byte-level BPE, which encodes every text, with GPT-2's pre-tokenization (GPT-2, section 2.2).

        A short text may have too few pairs to merge for a vocabulary of `vocab_size`.
        """
        library = byte_level(models.BPE())
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
        )
        pieces = (piece for chunk in safe_chunks(chunks) for piece in _cut_long_runs(chunk))
        library.train_from_iterator(pieces, trainer)
        return cls(library)

    @classmethod
    def from_name_or_path(cls, name: str) -> "Tokenizer":
        """Load 'gpt2', a tokenizer.json, or a folder with one or with the vocabulary and merges of GPT-2 or Qwen2.

        'gpt2' is the published tokenizer even where there is a folder gpt2, which './gpt2' names.
        """
        if name == "gpt2":
            return cls._download("openai-community/gpt2")
        path = Path(name)
        if not path.is_dir():
            return cls.load(path)
        if (path / "tokenizer.json").exists():
            return cls.load(path / "tokenizer.json")
        return cls(read_vocabulary(path))

    @classmethod
    def _download(cls, repository: str) -> "Tokenizer":
        logging.disable(logging.WARNING)  # the hub's client logs every retry
        try:
            return cls(tokenizers.Tokenizer.from_pretrained(repository))
        except Exception as error:  # the hub has a class for each cause
            place = "a folder with its tokenizer.json, or with encoder.json and vocab.bpe"
            place = "./gpt2, the folder here" if Path("gpt2").is_dir() else place
            fix = f"in place of 'gpt2' name {place}; for a ckpt.pt put these files beside it"
            raise UserError(f"cannot download GPT-2's tokenizer: {fix}") from error
        finally:
            logging.disable(logging.NOTSET)

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Read a tokenizer.json."""
        if not path.exists():
            raise UserError(f"tokenizer {str(path)!r} does not exist: pass 'char', 'bpe', 'gpt2' or a tokenizer.json")
        return cls(_read(tokenizers.Tokenizer.from_file, path))

    @classmethod
    def from_json(cls, data: bytes, path: str) -> "Tokenizer":
        """Parse the content of a tokenizer.json; `path` names the file in errors."""
        return cls(_read(lambda _: tokenizers.Tokenizer.from_buffer(data), path))

    def to_json(self) -> str:
        """Return the text of a tokenizer.json."""
        return self._library.to_str(pretty=True)

    def save(self, path: Path) -> None:
        """Write a tokenizer.json."""
        path.write_text(self.to_json(), encoding="utf-8")

    def encode(self, text: str, *, special: bool = False, begin: bool = False) -> Int32[np.ndarray, " T"]:
        """Return the ids of a text.

        `special`: the name of a special token, such as "<|endoftext|>", becomes that token instead of plain text.
        `begin`: the tokens that the tokenizer adds before every text, such as Llama's, come first.
        Raises `UserError` at a character that a character tokenizer does not have, or at a lone surrogate.
        """
        if self._id_of_code_point is not None:
            return next(_encode_characters([text], self._id_of_code_point))
        ids = self._encoding(text, special).ids
        return np.array([*self.begin, *ids] if begin else ids, np.int32)

    def encode_with_places(self, text: str) -> tuple[Int32[np.ndarray, " T"], Int[np.ndarray, "T 2"]]:
        """Return the ids of a text, whose special tokens count, and from where to where in it each of them is."""
        if self._id_of_code_point is not None:
            ids = self.encode(text)
            return ids, np.arange(len(ids))[:, None] + np.array([[0, 1]])
        encoding = self._encoding(text, special=True)
        return np.array(encoding.ids, np.int32), np.array(encoding.offsets, np.int64).reshape(-1, 2)

    def _encoding(self, text: str, special: bool) -> tokenizers.Encoding:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"the text is no Unicode at index {error.start}: pass it as UTF-8") from error
        self._library.encode_special_tokens = not special  # the library's flag: special tokens are plain text
        try:
            return self._library.encode(text, add_special_tokens=False)
        except Exception as error:  # of characters without a token; the library raises no subclass of it
            unknown = next((character for character in text if character not in self.vocabulary()), "")
            raise UserError(f"the tokenizer has no token for {unknown!r}: remove it from the text") from error
        finally:
            self._library.encode_special_tokens = True

    def prompt(self, text: str = "", *, special: bool = True) -> Int32[np.ndarray, " T"]:
        """Return the ids of a prompt, with the tokens that begin a text but not those that end one.

        An empty prompt is a newline, or token 0 for a character tokenizer without one. `special` as in `encode`, which
        raises `UserError`.
        """
        if not text and self._id_of_code_point is not None and "\n" not in self.vocabulary():
            return np.zeros(1, np.int32)
        return self.encode(text or "\n", special=special, begin=True)

    def with_special_tokens(self, names: Iterable[str]) -> "Tokenizer":
        """Return the tokenizer with these special tokens; those that it does not have take the next ids."""
        library = tokenizers.Tokenizer.from_str(self.to_json())
        library.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in names])
        return Tokenizer(library)

    def vocabulary(self) -> dict[str, int]:
        """Return the id of each token, by the token's text."""
        return self._library.get_vocab(with_added_tokens=True)

    @property
    def added_tokens(self) -> dict[str, bool]:
        """The tokens that are found before a text is split into words, and whether each is special."""
        return {token.content: token.special for token in self._library.get_added_tokens_decoder().values()}

    def fingerprint(self) -> str:
        """Return a SHA-256 of the vocabulary."""
        return hashlib.sha256(json.dumps(sorted(self.vocabulary().items())).encode()).hexdigest()

    def token_id(self, text: str) -> int | None:
        """Return the id of the token with this text, or None if there is no such token."""
        return self._library.token_to_id(text)

    @property
    def kind(self) -> str:
        """'characters', 'byte-level BPE' or the library's name of the model, such as 'Unigram'."""
        if self._id_of_code_point is not None:
            return "characters"
        return "byte-level BPE" if "ByteLevel" in repr(self._library.decoder) else type(self._library.model).__name__

    def encode_chunks(self, chunks: Iterable[str]) -> Iterator[Int32[np.ndarray, " _"]]:
        """Yield the ids of a text given in chunks, in bounded memory; they are the ids of the whole text."""
        if self._id_of_code_point is not None:
            yield from _encode_characters(chunks, self._id_of_code_point)
            return
        pieces = safe_chunks(chunks)
        while batch := list(itertools.islice(pieces, _BATCH)):
            yield from self.encode_batch(batch)

    def encode_batch(self, texts: Sequence[str]) -> list[Int32[np.ndarray, " _"]]:
        """Return the ids of each text; names of special tokens are plain text.

        The library uses a thread per core, or one if the environment has TOKENIZERS_PARALLELISM=false.
        """
        if self._id_of_code_point is not None:
            return [self.encode(text) for text in texts]
        encodings = self._library.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids: Ids) -> str:
        """Return the text of some ids; an unused id adds nothing to it."""
        return self._library.decode([int(i) for i in ids], skip_special_tokens=False)


class TextStream:
    """Decodes a stream of ids to pieces of text that hold whole characters and join to the text of all ids.

    `before` are the ids that precede the stream: some decoders treat the first token of a text differently.
    """

    def __init__(self, tokenizer: Tokenizer, before: Ids = ()) -> None:
        self._tokenizer, self._before, self._pending = tokenizer, [int(i) for i in before], list[int]()

    def feed(self, ids: Ids) -> str:
        """Return the characters that these ids complete."""
        self._pending += [int(i) for i in ids]
        text = self.end()
        if not text or text.endswith("\ufffd"):  # the last character lacks some of its bytes
            return ""
        self._before, self._pending = self._pending, []
        return text

    def end(self) -> str:
        """Return the text of the ids that `feed` has not returned yet: an incomplete character, or nothing."""
        before = self._tokenizer.decode(self._before)
        return self._tokenizer.decode(self._before + self._pending)[len(before) :]


# Places where cutting a text changes no token: in the pre-tokenization of GPT-2, Llama 3 and Qwen a word always ends
# there, whatever follows. The last resorts are before whitespace, which is safe for GPT-2 only, and then anywhere.
_SAFE = (r"(?<=\S\n)(?=\S)", r"(?<=[^\W\d_])(?=[\s,.;:!?，。、！？；：])")  # [^\W\d_] is a letter
_LAST_RESORTS = (r"(?<=\S)(?=\s)", "")
_LONGEST_PIECE = 1 << 20


def safe_chunks(chunks: Iterable[str], longest_whole: int = 0) -> Iterator[str]:
    """Yield a text that comes in chunks, cut where cutting changes no token if it is longer than `longest_whole`.

    A million characters without such a place are cut anyway; the tokens at that cut may differ.
    """
    pending = ""
    for chunk in chunks:
        pending += chunk
        if len(pending) <= longest_whole:
            continue
        rules = _SAFE if len(pending) < _LONGEST_PIECE else _SAFE + _LAST_RESORTS
        if cut := next((found.end() for rule in rules if (found := re.match("(?s:.*)" + rule, pending))), 0):
            yield pending[:cut]
            pending = pending[cut:]
    if pending:
        yield pending


def _first_tokens(library: tokenizers.Tokenizer) -> Int32[np.ndarray, " T"]:
    """Return the tokens that the post-processor puts before a text (Llama's <s>), without those that it puts after."""
    if not library.num_special_tokens_to_add(is_pair=False):
        return np.zeros(0, np.int32)
    text = library.encode("a")
    added = itertools.takewhile(lambda pair: pair[1], zip(text.ids, text.special_tokens_mask, strict=True))
    return np.array([i for i, _ in added], np.int32)


_LONG_RUN = re.compile(r"\S{1000}|\s{1000}")


def _cut_long_runs(text: str) -> list[str]:
    """Cut runs without spaces, as of a genome, or of spaces alone: training is quadratic in the length of a word."""
    if all(len(text[i : i + 500].split(maxsplit=1)) == 2 for i in range(0, len(text), 500)):
        return [text]  # a fast test: where each half of a run has an end of a word, there is no run
    ends = [run.end() for run in _LONG_RUN.finditer(text)]
    return [text[start:end] for start, end in itertools.pairwise([0, *ends, len(text)])]


def _character_table(library: tokenizers.Tokenizer) -> np.ndarray | None:
    """Return the id of each code point, or `None` if this is not a character tokenizer.

    The id is -1 for a code point that is not a token; the last row, for all larger code points, is also -1.
    """
    characters, plain = library.get_vocab(), not library.normalizer and not library.get_added_tokens_decoder()
    splits = repr(library.pre_tokenizer) == repr(_CHARACTERS) and all(len(text) == 1 for text in characters)
    if not (isinstance(library.model, models.WordLevel) and plain and splits):
        return None
    table = np.full(max(map(ord, characters), default=-1) + 2, -1, np.int32)
    for character, i in characters.items():
        table[ord(character)] = i
    return table


def _encode_characters(chunks: Iterable[str], table: np.ndarray) -> Iterator[Int32[np.ndarray, " _"]]:
    """Yield the ids of each chunk, looked up by code point, much faster than the library encodes characters."""
    index, line, line_start = 0, 1, 0  # of the text at the end of `known`
    for text in chunks:
        code_points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        ids = table[np.minimum(code_points, len(table) - 1)]
        known = text[: ids.argmin()] if ids.size and ids.min() < 0 else text
        if "\n" in known:
            line, line_start = line + known.count("\n"), index + known.rindex("\n") + 1
        index += len(known)
        if known is not text:
            character = text[len(known)]
            where = f"index {index} of the text (line {line}, column {index - line_start + 1})"
            fix = "remove it, or train with --data.tokenizer bpe, which knows every character"
            raise UserError(f"the tokenizer has no character {character!r} (U+{ord(character):04X}), at {where}: {fix}")
        yield ids


def _read(reader: Any, *paths: Path | str) -> Any:
    try:
        return reader(*map(str, paths))
    except Exception as error:  # the library raises no subclass of it
        raise UserError(f"{paths[0]} is not a tokenizer that `tokenizers` can read: {error}") from error
