"""One `Tokenizer` over the `tokenizers` library: characters, a BPE trained here, GPT-2's, or any tokenizer.json."""

import itertools
import json
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import tokenizers
from jaxtyping import Int32, Integer
from tokenizers import decoders, models, pre_tokenizers, trainers

from gptjax.errors import UserError

END_OF_TEXT = "<|endoftext|>"
Ids = Iterable[int] | Integer[np.ndarray, " T"]
_CHARACTER = r"[\s\S]"  # "." leaves out the newline
_BATCH = 16  # chunks that the library encodes at once, in its threads


class Tokenizer:
    """Text to ids and back; the file form is always a tokenizer.json."""

    def __init__(self, library: tokenizers.Tokenizer) -> None:
        library.encode_special_tokens = True  # a corpus that contains "<|endoftext|>" means those 13 characters
        self._library = library
        vocabulary = library.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(vocabulary.values(), default=-1) + 1  # ids may have holes below it
        self.end_of_text: int | None = vocabulary.get(END_OF_TEXT)
        self._id_of_code_point = _character_table(library)

    @classmethod
    def characters(cls, alphabet: Iterable[str]) -> "Tokenizer":
        """Each character is a token; ids follow the order of the code points, as in nanoGPT."""
        return cls.from_characters({character: i for i, character in enumerate(sorted(set(alphabet)))})

    @classmethod
    def from_characters(cls, ids: dict[str, int]) -> "Tokenizer":
        """A character tokenizer with exactly these ids."""
        library = tokenizers.Tokenizer(models.WordLevel(ids))
        library.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(_CHARACTER), "isolated")
        library.decoder = decoders.Fuse()
        return cls(library)

    @classmethod
    def train_bpe(cls, chunks: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learn a byte-level BPE with GPT-2's pre-tokenization (GPT-2, section 2.2); no text is unknown to it.

        A short text may have fewer merges to learn than `vocab_size` asks for.
        """
        library = _byte_level(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        library.train_from_iterator(safe_chunks(chunks), trainer)
        return cls(library)

    @classmethod
    def from_name_or_path(cls, name: str) -> "Tokenizer":
        """'gpt2', a tokenizer.json, or a folder with one, or with GPT-2's vocabulary and merges in either naming."""
        if name == "gpt2":
            return cls(_download_gpt2())
        path = Path(name)
        if not path.is_dir():
            return cls.load(path)
        if (path / "tokenizer.json").exists():
            return cls.load(path / "tokenizer.json")
        for vocabulary, merges in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")):
            if (path / vocabulary).exists() and (path / merges).exists():
                library = _byte_level(_read(models.BPE.from_file, path / vocabulary, path / merges))
                library.add_special_tokens([END_OF_TEXT])
                return cls(library)
        raise UserError(f"{path} has no tokenizer.json, no vocab.json with merges.txt, no encoder.json with vocab.bpe")

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Read a tokenizer.json."""
        if not path.exists():
            raise UserError(f"tokenizer {str(path)!r} does not exist: pass 'char', 'bpe', 'gpt2' or a tokenizer.json")
        return cls(_read(tokenizers.Tokenizer.from_file, path))

    @classmethod
    def from_json(cls, text: str, where: str) -> "Tokenizer":
        """The tokenizer that a tokenizer.json describes; `where` is what an error calls it."""
        return cls(_read(lambda _: tokenizers.Tokenizer.from_str(text), where))

    def to_json(self) -> str:
        """The text of a tokenizer.json, which the `tokenizers` library reads as it is."""
        return self._library.to_str(pretty=True)

    def save(self, path: Path) -> None:
        """Write a tokenizer.json."""
        path.write_text(self.to_json(), encoding="utf-8")

    def encode(self, text: str, *, special: bool = False) -> Int32[np.ndarray, " T"]:
        """The ids of a text; only with `special` are the names of special tokens, as "<|endoftext|>", those tokens.

        Raises `UserError` at a character that a character tokenizer lacks.
        """
        if self._id_of_code_point is not None:
            return next(_encode_characters([text], self._id_of_code_point))
        return self._encode(text, special=special, begin=False)

    def prompt(self, text: str = "") -> Int32[np.ndarray, " T"]:
        """The ids of a prompt: special tokens among them, and before them what the tokenizer itself puts before a text.

        An empty prompt is a new line, or token 0 where a character tokenizer lacks it. Raises `UserError` as `encode`.
        """
        if self._id_of_code_point is None:
            return self._encode(text or "\n", special=True, begin=True)
        if not text and "\n" not in self._library.get_vocab():
            return np.zeros(1, np.int32)
        return self.encode(text or "\n")

    def vocabulary(self) -> dict[str, int]:
        """Text of every token -> its id."""
        return self._library.get_vocab(with_added_tokens=True)

    @property
    def kind(self) -> str:
        """In words: characters, byte-level BPE, or the library's name of it."""
        spec = json.loads(self._library.to_str())
        if self._id_of_code_point is not None:
            return "characters"
        return "byte-level BPE" if "ByteLevel" in json.dumps(spec["decoder"]) else str(spec["model"]["type"])

    def token_id(self, text: str) -> int | None:
        """The id of the token of that name, None where there is none."""
        return self._library.token_to_id(text)

    @property
    def begin(self) -> Int32[np.ndarray, " T"]:
        """What the tokenizer puts before every text: none, or one token (Llama's)."""
        none = np.zeros(0, np.int32)
        return none if self._id_of_code_point is not None else self._encode("", special=True, begin=True)

    def _encode(self, text: str, *, special: bool, begin: bool) -> Int32[np.ndarray, " T"]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"the text is no Unicode at index {error.start}: pass it as UTF-8") from error
        self._library.encode_special_tokens = not special  # the library's word for special tokens read as plain text
        ids = self._library.encode(text, add_special_tokens=begin).ids
        self._library.encode_special_tokens = True
        return np.array(ids, np.int32)

    def encode_chunks(self, chunks: Iterable[str]) -> Iterator[Int32[np.ndarray, " _"]]:
        """Encode a text that comes in pieces, in bounded memory, to the ids that the whole text has."""
        if self._id_of_code_point is not None:
            yield from _encode_characters(chunks, self._id_of_code_point)
            return
        pieces = safe_chunks(chunks)
        while batch := list(itertools.islice(pieces, _BATCH)):
            yield from self.encode_batch(batch)

    def encode_batch(self, texts: Sequence[str]) -> list[Int32[np.ndarray, " _"]]:
        """The ids of each text, in which names of special tokens are plain text; in as many threads as there are cores.

        TOKENIZERS_PARALLELISM=false in the environment makes it one thread.
        """
        if self._id_of_code_point is not None:
            return [self.encode(text) for text in texts]
        encodings = self._library.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids: Ids) -> str:
        """The text of some ids; an id in a hole of the vocabulary is no text."""
        return self._library.decode([int(i) for i in ids], skip_special_tokens=False)


class TextStream:
    """Decodes ids as they come, each piece as soon as its characters are whole; the pieces join to the whole's text.

    `before` are the ids in front of the first ones: some decoders treat the first token of a text differently.
    """

    def __init__(self, tokenizer: Tokenizer, before: Ids = ()) -> None:
        self._tokenizer, self._before, self._pending = tokenizer, [int(i) for i in before], list[int]()

    def feed(self, ids: Ids) -> str:
        """The characters that these ids complete."""
        self._pending += [int(i) for i in ids]
        text = self.end()
        if not text or text.endswith("\ufffd"):  # bytes of this character are still to come
            return ""
        self._before, self._pending = self._pending, []
        return text

    def end(self) -> str:
        """What is left at the end: at most the bytes of an unfinished character."""
        before = self._tokenizer.decode(self._before)
        return self._tokenizer.decode(self._before + self._pending)[len(before) :]


# Where a text may be cut without changing any token. In GPT-2's pre-tokenization, as in Llama 3's and Qwen's, a word
# boundary is always there and depends on nothing across the cut. A last resort, before any space, is safe for GPT-2's
# alone; then comes any place at all.
_SAFE = (r"(?<=\S\n)(?=\S)", r"(?<=[^\W\d_])(?=[\s,.;:!?，。、！？；：])")  # [^\W\d_] is a letter
_LAST_RESORTS = (r"(?<=\S)(?=\s)", "")
_LONGEST_PIECE = 1 << 20


def safe_chunks(chunks: Iterable[str]) -> Iterator[str]:
    """Cut a text again where cutting changes no token.

    A million characters without such a place are cut anyway: the tokens beside that cut may differ.
    """
    pending = ""
    for chunk in chunks:
        pending += chunk
        rules = _SAFE if len(pending) < _LONGEST_PIECE else _SAFE + _LAST_RESORTS
        if cut := next((found.end() for rule in rules if (found := re.match("(?s:.*)" + rule, pending))), 0):
            yield pending[:cut]
            pending = pending[cut:]
    if pending:
        yield pending


def _byte_level(model: models.BPE) -> tokenizers.Tokenizer:
    library = tokenizers.Tokenizer(model)
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    return library


def _character_table(library: tokenizers.Tokenizer) -> np.ndarray | None:
    """Code point -> id, -1 where there is none, with a last row of -1; `None` if this is no character tokenizer."""
    spec: dict[str, Any] = json.loads(library.to_str())
    characters = spec["model"].get("vocab")
    split = {"type": "Split", "pattern": {"Regex": _CHARACTER}, "behavior": "Isolated", "invert": False}
    if spec["model"]["type"] != "WordLevel" or spec["pre_tokenizer"] != split or spec["normalizer"]:
        return None
    if spec["added_tokens"] or not characters or any(len(character) != 1 for character in characters):
        return None
    table = np.full(max(map(ord, characters)) + 2, -1, np.int32)
    for character, i in characters.items():
        table[ord(character)] = i
    return table


def _encode_characters(chunks: Iterable[str], table: np.ndarray) -> Iterator[Int32[np.ndarray, " _"]]:
    """Look the code points up: a hundred times as fast as the library, which goes through each character's string."""
    read, lines, column = 0, 0, 0  # of the text before this chunk
    for text in chunks:
        code_points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        ids = table[np.minimum(code_points, len(table) - 1)]
        if ids.size and ids.min() < 0:
            _raise_unknown(text, int(ids.argmin()), read, lines, column)
        yield ids
        read, lines = read + len(text), lines + text.count("\n")
        column = len(text) - text.rfind("\n") - 1 if "\n" in text else column + len(text)


def _raise_unknown(text: str, at: int, read: int, lines: int, column: int) -> NoReturn:
    head = text[:at]
    column = at - head.rfind("\n") if "\n" in head else column + at + 1
    raise UserError(
        f"the tokenizer has no character {text[at]!r} (U+{ord(text[at]):04X}), at index {read + at} of the text (line "
        f"{lines + head.count(chr(10)) + 1}, column {column}): remove it, or train with --data.tokenizer bpe, "
        "which knows every character"
    )


def _read(reader: Any, *paths: Path | str) -> Any:
    try:
        return reader(*map(str, paths))
    except Exception as error:  # the library raises no narrower class
        raise UserError(f"{paths[0]} is not a tokenizer that `tokenizers` can read: {error}") from error


def _download_gpt2() -> tokenizers.Tokenizer:
    logging.disable(logging.WARNING)  # the hub's client logs each of its retries
    try:
        return tokenizers.Tokenizer.from_pretrained("openai-community/gpt2")
    except Exception as error:  # the hub raises a class of its own for each way of being offline
        raise UserError(
            "cannot download GPT-2's tokenizer: pass a folder with tokenizer.json, or with encoder.json and vocab.bpe: "
            "--data.tokenizer FOLDER"
        ) from error
    finally:
        logging.disable(logging.NOTSET)
