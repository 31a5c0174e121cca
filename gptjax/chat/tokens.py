"""The ids of a conversation: the chat template alone writes special tokens, and contents of messages are text.

Before the template is rendered, a character that no text contains is inserted into each special token that a message
spells out. So a special token that is intact in the rendered text comes from the template.
"""

import functools
import itertools
import json
import re
import secrets
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32

from gptjax.chat.template import Rendered
from gptjax.errors import UserError
from gptjax.tokenizer import Tokenizer

_BREAK = "\ud800"  # half of a surrogate pair
Message = dict[str, str]
TokenIds = Int32[np.ndarray, " _"]
Mask = Bool[np.ndarray, " _"]


def text_of(content: Any) -> str | None:
    """The text of a message's content: a string, or OpenAI's list of text parts joined; None for any other content."""
    if not isinstance(content, list):
        return content if isinstance(content, str) else None
    parts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
    texts = [part for part in parts if isinstance(part, str)]
    return "".join(texts) if len(texts) == len(content) else None


def encode_chat(
    tokenizer: Tokenizer, template: str, render: Callable[[Sequence[Message]], str], messages: Sequence[Message]
) -> TokenIds:
    """The ids of the rendered conversation; those of transformers, unless a content spells a special token."""
    return encode_example(tokenizer, template, lambda each: Rendered(render(each), []), messages)[0]


def encode_example(
    tokenizer: Tokenizer, template: str, render: Callable[[Sequence[Message]], Rendered], messages: Sequence[Message]
) -> tuple[TokenIds, Mask]:
    """The ids of a rendered conversation, as `encode_chat`, and which of them have a part in the rendered spans.

    Special are also added tokens of the template such as <tool_call>. A template may have to find these in a content,
    as it cuts an answer before </think>: where breaking one changes the rendered text otherwise, it stays whole.
    """
    rendered = render(messages)
    special, marks = _special(tokenizer, template)
    candidates = []
    for of_assistant, of_others in ((marks, marks), (special, marks), (special, special)):
        names = [of_assistant if message["role"] == "assistant" else of_others for message in messages]
        contents = [_broken(message["content"], each) for message, each in zip(messages, names, strict=True)]
        if contents == [message["content"] for message in messages]:
            return _encode(tokenizer, *rendered)
        candidates.append(render([m | {"content": content} for m, content in zip(messages, contents, strict=True)]))
        if candidates[-1].text.replace(_BREAK, "") == rendered.text:
            return _encode_whole(tokenizer, marks, candidates[-1])
    print(
        "note: a message spells a special token that the chat template looks for; it is read as text", file=sys.stderr
    )
    return _encode_whole(tokenizer, marks, candidates[0])


@functools.lru_cache(maxsize=2)
def _special(tokenizer: Tokenizer, template: str) -> tuple[frozenset[str], frozenset[str]]:
    """The names of a tokenizer's special tokens, and with those of the template's other added tokens."""
    added = {name: is_special for name, is_special in tokenizer.added_tokens.items() if len(name) > 1}
    special = frozenset(name for name, is_special in added.items() if is_special)
    return special, special | {name for name in added if name[0] in "<[" and name in template}


@functools.lru_cache(maxsize=4)
def _starts(names: frozenset[str]) -> tuple[re.Pattern[str], tuple[str, ...]]:
    """A pattern for the first character of a name, and the proper prefixes of the names."""
    return re.compile(f"(?=(?:{_any_of(names)}))(?s:.)"), tuple(
        {name[:n] for name in names for n in range(1, len(name))}
    )


def _broken(content: str, names: frozenset[str]) -> str:
    """The content with a break in each of the names, also in one that the text behind the content could complete."""
    pattern, prefixes = _starts(names)
    if names:
        content = pattern.sub(rf"\g<0>{_BREAK}", content)
    end = content.rstrip()
    if end.endswith(prefixes):
        content = end + _BREAK + content[len(end) :]
    return content


def _encode(tokenizer: Tokenizer, text: str, spans: Sequence[tuple[int, int]]) -> tuple[TokenIds, Mask]:
    ids, places_T2 = tokenizer.encode_with_places(text)
    mask_T = np.zeros(len(ids), bool)
    for start, end in spans:
        mask_T |= (places_T2[:, 0] < end) & (places_T2[:, 1] > start)
    return ids, mask_T


def _encode_whole(tokenizer: Tokenizer, names: frozenset[str], rendered: Rendered) -> tuple[TokenIds, Mask]:
    """As `_encode`, where the names are special tokens if they are whole, and text if they are broken."""
    renamed, aliases, ids, marks = _rename(tokenizer, names)
    (text, spans), n = rendered, len(re.findall(_any_of(names), rendered.text))
    ends = sorted({0, len(text), *(place for span in spans for place in span)})
    pieces = [re.sub(_any_of(names), lambda found: aliases[found[0]], text[i:j]) for i, j in itertools.pairwise(ends)]
    pieces = [piece.replace(_BREAK, "") for piece in pieces]
    moved = dict(zip(ends, itertools.accumulate(map(len, pieces), initial=0), strict=True))
    tokens, mask_T = _encode(renamed, "".join(pieces), [(moved[start], moved[end]) for start, end in spans])
    tokens = ids[tokens]
    if np.isin(tokens, marks).sum() != n:
        raise UserError(
            "a message spells a special token that this tokenizer cannot encode as text: write it otherwise"
        )
    return tokens, mask_T


@functools.lru_cache(maxsize=2)
def _rename(tokenizer: Tokenizer, names: frozenset[str]) -> tuple[Tokenizer, dict[str, str], TokenIds, TokenIds]:
    """The tokenizer with other names of these added tokens, which no user can guess, and these names.

    Then the original id of each of its ids, and the original ids of the renamed tokens.
    """
    specification, secret = json.loads(tokenizer.to_json()), secrets.token_hex(16)
    aliases = {name: f"<{secret}{i}>" for i, name in enumerate(sorted(names))}
    for token in specification["added_tokens"]:
        token["content"] = aliases.get(token["content"], token["content"])
    renamed = Tokenizer.from_json(json.dumps(specification).encode(), "the tokenizer")
    before, after, ids = tokenizer.vocabulary(), renamed.vocabulary(), np.arange(renamed.vocab_size, dtype=np.int32)
    for name in tokenizer.added_tokens:
        ids[after[aliases.get(name, name)]] = before[name]
    return renamed, aliases, ids, np.array([before[name] for name in names], np.int32)


def _any_of(names: frozenset[str]) -> str:
    """A pattern for the names, the longest first."""
    return "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
