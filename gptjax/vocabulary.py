"""Tokenizers of folders without a tokenizer.json: the vocab.json and merges.txt of GPT-2 and of Qwen2."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from gptjax.errors import UserError, first_line
from gptjax.files import read_json

END_OF_TEXT = "<|endoftext|>"
_FILES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
# Words of Qwen2 and, with %s as {1,3}, of Llama 3: contractions, letters, digits, signs with the new lines behind them,
# white space.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_FIX = "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) of transformers writes a tokenizer.json there"


def byte_level(model: models.BPE, add_prefix_space: bool = False) -> tokenizers.Tokenizer:
    """A byte-level BPE with GPT-2's pre-tokenization."""
    library = tokenizers.Tokenizer(model)
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space)
    library.decoder = decoders.ByteLevel()
    return library


def read_vocabulary(folder: Path) -> tokenizers.Tokenizer:
    """The tokenizer of a vocabulary, its merges and added tokens, with the rules of the family that the folder names.

    Raises `UserError` if files are missing or damaged, or if the family is neither GPT-2 nor Qwen2.
    """
    paths = next(([folder / name for name in pair] for pair in _FILES if all((folder / n).exists() for n in pair)), [])
    if not paths:
        found = f"; its tokenizer.model is not read: {_FIX}" if (folder / "tokenizer.model").exists() else ""
        names = "no tokenizer.json, no vocab.json with merges.txt, no encoder.json with vocab.bpe"
        raise UserError(f"{folder} has {names}{found}")
    settings = tokenizer_settings(folder)
    family = _family(folder, settings, paths[0])
    usual = ("bos_token", "eos_token", "unk_token") if family == "gpt2" else ("eos_token", "unk_token", "pad_token")
    settings = dict.fromkeys(usual, END_OF_TEXT) | settings
    try:
        library = byte_level(models.BPE.from_file(*map(str, paths)), bool(settings.get("add_prefix_space")))
        added = _added_tokens(folder, settings)
        library.add_tokens([token for _, token in sorted(added.items(), key=lambda pair: pair[0])])
        declared = {token.content for token in added.values()}
        library.add_special_tokens([name for name in _special(settings) if name not in declared])
    except Exception as error:  # the library raises no subclass of it
        raise UserError(f"{paths[0]} and the files beside it are not a tokenizer: {first_line(error)}") from error
    if family == "qwen2":
        words = pre_tokenizers.Split(tokenizers.Regex(WORDS % ""), "isolated")
        pieces = pre_tokenizers.ByteLevel(bool(settings.get("add_prefix_space")), use_regex=False)
        library.pre_tokenizer, library.normalizer = pre_tokenizers.Sequence([words, pieces]), normalizers.NFC()
    for i, token in added.items():
        if library.token_to_id(token.content) != i:
            raise UserError(f"{folder}: the added token {token.content!r} cannot have the id {i}: {_FIX}")
    return library


def tokenizer_settings(folder: Path) -> dict[str, Any]:
    """The fields of special_tokens_map.json and tokenizer_config.json, as far as they exist; of two the latter's."""
    files = (folder / name for name in ("special_tokens_map.json", "tokenizer_config.json"))
    first, second = (read_json(file, missing_ok=True) for file in files)
    return first | second


def _family(folder: Path, settings: dict[str, Any], vocabulary: Path) -> str:
    """The family that tokenizer_class, else model_type, else the vocabulary shows. `UserError` for any but two."""
    named = settings.get("tokenizer_class") or read_json(folder / "config.json", missing_ok=True).get("model_type")
    if named is None and END_OF_TEXT in read_json(vocabulary):
        return "gpt2"  # Qwen2 has this token beside its vocabulary
    family = str(named).removesuffix("Fast").removesuffix("Tokenizer").lower().replace("qwen3", "qwen2")
    if family not in ("gpt2", "qwen2"):
        raise UserError(f"{vocabulary} is of a tokenizer ({named}) that is neither GPT-2's nor Qwen2's: {_FIX}")
    for name in ("add_bos_token", "add_eos_token"):
        if settings.get(name):
            raise UserError(f"{folder}: {name} is not supported without a tokenizer.json: {_FIX}")
    return family


def _added_tokens(folder: Path, settings: dict[str, Any]) -> dict[int, AddedToken]:
    """The tokens beside the vocabulary, by id: those of tokenizer_config.json, else those of added_tokens.json."""
    if declared := settings.get("added_tokens_decoder"):
        return {int(i): AddedToken(**fields) for i, fields in declared.items()}
    special = set(_special(settings))
    return {
        i: AddedToken(name, special=name in special, normalized=name not in special)
        for name, i in read_json(folder / "added_tokens.json", missing_ok=True).items()
    }


def _special(settings: dict[str, Any]) -> Iterator[str]:
    """The texts of the special tokens that the settings name."""
    for key, value in settings.items():
        if key in ("additional_special_tokens", "extra_special_tokens") or key.endswith("_token"):
            for token in value if isinstance(value, list) else [value]:
                text = token.get("content") if isinstance(token, dict) else token
                if isinstance(text, str):
                    yield text
