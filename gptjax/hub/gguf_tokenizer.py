"""Tokenizer, chat template and stop tokens in the fields of a GGUF file, and as the files of a Hugging Face folder."""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from gptjax.errors import UserError
from gptjax.tokenizer import Tokenizer
from gptjax.vocabulary import WORDS

_PLAIN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # of tokenizer.ggml.token_type
_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)


def _words(digits: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(WORDS % digits), "isolated"), _BYTES])


# tokenizer.ggml.pre -> normalizer, pre-tokenizer, and whether a word that is a token is not split further.
_PRE: dict[str, tuple[Any, Any, bool]] = {
    "gpt-2": (None, _GPT2, False),
    "llama-bpe": (None, _words("{1,3}"), True),
    "qwen2": (normalizers.NFC(), _words(""), False),
    "smollm": (None, pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _GPT2]), False),
}
_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_ENDS = ("eos", "eot", "eom")  # end of text, of turn, of message: each ends an answer


def side_files(fields: Mapping[str, Any]) -> dict[str, str]:
    """tokenizer.json, tokenizer_config.json and generation_config.json of a GGUF file's fields, as text.

    Raises `UserError` for a tokenizer that is not supported, or not consistent.
    """
    tokens = _list(fields, "tokens", str)
    named = {name: _token(fields, tokens, theirs) for name, theirs in _SPECIAL.items()}
    special: dict[str, Any] = {name: tokens[token] for name, token in named.items() if token is not None}
    if isinstance(template := fields.get("tokenizer.chat_template"), str):
        special["chat_template"] = template
    ends = {token for name in _ENDS if (token := _token(fields, tokens, name)) is not None}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    return {
        "tokenizer.json": _tokenizer(fields, tokens, special.get("bos_token")).to_json(),
        "tokenizer_config.json": json.dumps(settings | special, indent=2) + "\n",
        "generation_config.json": json.dumps({"eos_token_id": sorted(ends)} if ends else {}, indent=2) + "\n",
    }


def _tokenizer(fields: Mapping[str, Any], tokens: list[str], bos: str | None) -> Tokenizer:
    kind, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    try:
        if len(set(tokens)) != len(tokens):
            raise ValueError("a token occurs twice")
        if kind == "rwkv":  # the longest token that fits: characters, if each token is one
            return Tokenizer.from_characters({_unescaped(token): i for i, token in enumerate(tokens)})
        if kind == "gpt2" and pre in _PRE:
            return Tokenizer(_byte_level(fields, tokens, pre, bos))
    except (ValueError, UserError) as error:
        raise UserError(f"its tokenizer is damaged or not supported: {error}") from error
    except Exception as error:  # of `tokenizers`, which has no class of its own
        raise UserError(f"its tokenizer is damaged: {error}") from error
    if kind == "gpt2":
        raise UserError(f"tokenizer.ggml.pre={str(pre)[:80]!r} is not supported; only {', '.join(_PRE)} are")
    raise UserError(f"tokenizer.ggml.model={str(kind)[:80]!r} is not supported; only gpt2 (byte-level BPE) is")


def _byte_level(fields: Mapping[str, Any], tokens: list[str], pre: str, bos: str | None) -> tokenizers.Tokenizer:
    if len(kinds := _list(fields, "token_type", int)) != len(tokens):
        raise UserError(f"it has {len(kinds)} types for {len(tokens)} tokens")
    vocabulary = {token: i for i, token in enumerate(tokens) if kinds[i] != _UNUSED}
    merges = [(left, right) for left, right in (merge.split(" ") for merge in _list(fields, "merges", str))]
    made = _with_rules(pre, models.BPE(vocabulary, merges))
    for kind, add in ((_CONTROL, made.add_special_tokens), (_USER_DEFINED, made.add_tokens)):
        names = [token for token, own_kind in zip(tokens, kinds, strict=True) if own_kind == kind]
        add([AddedToken(name, special=kind == _CONTROL, normalized=False) for name in names])
    if fields.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe") and bos is not None:
        made.post_processor = processors.TemplateProcessing([bos, "$A"], special_tokens=[(bos, vocabulary[bos])])
    return made


def _with_rules(pre: str, model: models.BPE) -> tokenizers.Tokenizer:
    normalizer, pre_tokenizer, model.ignore_merges = _PRE[pre]
    made = tokenizers.Tokenizer(model)
    if normalizer is not None:
        made.normalizer = normalizer
    made.pre_tokenizer, made.decoder = pre_tokenizer, decoders.ByteLevel()
    return made


def tokenizer_fields(
    tokenizer: Tokenizer, vocab_size: int, special_tokens: Mapping[str, str], stop_tokens: Iterable[int]
) -> dict[str, Any]:
    """The fields of a GGUF file that hold a tokenizer, without the chat template.

    llama.cpp has GPT-2's byte-level BPE with the pre-tokenizers of `_PRE`. Of characters it makes the right tokens by
    the rules of "rwkv", which takes the longest token that fits, at first from the left. Raises `UserError` for any
    other tokenizer.
    """
    begin = tokenizer.begin.tolist()
    if len(begin) > 1:
        raise UserError(f"the tokenizer adds {len(begin)} tokens to every text, and GGUF has a place for one")
    known = {name: tokenizer.token_id(text) for name, text in special_tokens.items()}
    ends = dict.fromkeys([known.pop("eos_token", None), tokenizer.end_of_text, *sorted(stop_tokens)])
    ids = {_SPECIAL[name]: token for name, token in ({"bos_token": tokenizer.end_of_text} | known).items()}
    ids |= dict(zip(_ENDS, (token for token in ends if token is not None), strict=False))
    ids |= {"bos": begin[0]} if begin else {}
    if tokenizer.kind == "characters":
        texts = {i: _escaped(character) for character, i in tokenizer.vocabulary().items()}
        own = {"model": "rwkv"} | _columns(vocab_size, texts, {})
    elif "eos" not in ids:
        raise UserError("the tokenizer has no token that ends a text; llama.cpp would take the one with id 11 for it")
    else:
        own = _byte_level_fields(json.loads(tokenizer.to_json()), vocab_size)
    own |= {f"{name}_token_id": token for name, token in ids.items() if token is not None}
    return {f"tokenizer.ggml.{name}": value for name, value in (own | {"add_bos_token": bool(begin)}).items()}


def _byte_level_fields(values: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    model = values["model"]
    known = {_rules(json.loads(_with_rules(pre, models.BPE()).to_str())): pre for pre in _PRE}
    if model["type"] != "BPE" or _rules(values) not in known:
        supported = f"of characters without special tokens, and BPEs by the rules of {', '.join(_PRE)}"
        raise UserError(f"llama.cpp has no such tokenizer, only those {supported}: export a folder for transformers")
    if not model["merges"]:
        raise UserError("the tokenizer merges no bytes, and llama.cpp takes a BPE with at least one merge")
    texts = {i: text for text, i in model["vocab"].items()} | {a["id"]: a["content"] for a in values["added_tokens"]}
    kinds = {a["id"]: _CONTROL if a["special"] else _USER_DEFINED for a in values["added_tokens"]}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return {"model": "gpt2", "pre": known[_rules(values)], "merges": merges} | _columns(vocab_size, texts, kinds)


def _columns(vocab_size: int, texts: Mapping[int, str], kinds: Mapping[int, int]) -> dict[str, Any]:
    """Text and type of every id; an id without a token is marked as unused."""
    types = dict.fromkeys(texts, _PLAIN) | dict(kinds)
    ids = range(vocab_size)
    return {"tokens": [texts.get(i, f"[PAD{i}]") for i in ids], "token_type": [types.get(i, _UNUSED) for i in ids]}


def _rules(values: dict[str, Any]) -> str:
    """How a tokenizer.json prepares a text for its BPE, without a setting that changes no id."""
    names = ("ignore_merges", "dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    rules = [values["normalizer"], values["pre_tokenizer"], *(values["model"].get(name) or None for name in names)]
    return re.sub(r'"trim_offsets": \w+, ', "", json.dumps(rules))


def _escaped(character: str) -> str:
    return repr(character.encode())[2:-1]


def _unescaped(text: str) -> str:
    return text.encode("ascii").decode("unicode_escape").encode("latin-1").decode("utf-8")


def _list(fields: Mapping[str, Any], name: str, kind: type) -> list[Any]:
    values = fields.get(f"tokenizer.ggml.{name}")
    if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
        raise UserError(f"tokenizer.ggml.{name} is missing, or is not a list of {kind.__name__}")
    return values


def _token(fields: Mapping[str, Any], tokens: list[str], name: str) -> int | None:
    token = fields.get(f"tokenizer.ggml.{name}_token_id")
    if token is not None and (not isinstance(token, int) or not 0 <= token < len(tokens)):
        raise UserError(f"tokenizer.ggml.{name}_token_id={str(token)[:80]!r} is the id of no token")
    return token
