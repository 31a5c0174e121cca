"""OpenAI's API as data: what a client may ask for, checked, and the objects that it is answered with."""

import json
import math
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from gptjax.chat.tokens import text_of
from gptjax.serving.engine import Piece, Token

MAX_CHOICES = 64  # answers of one request: prompts times n
MAX_STOPS, LONGEST_STOP = 16, 1000
IGNORED = frozenset(  # fields that do not change an answer, or that clients always send
    "user metadata store service_tier safety_identifier prompt_cache_key prompt_cache_retention verbosity".split()
)
# Fields that would change the answer, with the values at which they do not.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0, None),
    "presence_penalty": (0, None),
    "logit_bias": ({}, None),
    "response_format": ({"type": "text"}, None),
    "tools": ([], None),
    "tool_choice": ("none", "auto", None),
    "parallel_tool_calls": (True, False, None),
    "functions": ([], None),
    "function_call": ("none", "auto", None),
    "modalities": (["text"], None),
    "reasoning_effort": ("none", None),
    "echo": (False, None),
    "suffix": ("", None),
    "best_of": (1, None),
}


class ApiError(Exception):
    """An error object of OpenAI's API with its HTTP status."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}

    def body(self) -> dict[str, Any]:
        """The object that a client gets."""
        kinds = {401: "authentication_error", 429: "rate_limit_error", 504: "timeout_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Call:
    """What a client asks for: continuations of `prompts`, texts or ids, or the next message after `messages`."""

    model: str | None
    messages: list[dict[str, str]] | None
    prompts: list[str | list[int]]
    n: int
    max_tokens: int | None
    rules: dict[str, Any]  # by the names of `Sampling`, None where not given
    seed: int | None
    stop: tuple[str, ...]
    log_probs: bool
    alternatives: int
    stream: bool
    stream_usage: bool

    @property
    def chat(self) -> bool:
        """Whether the next message of a conversation is asked for."""
        return self.messages is not None


def parse(body: bytes, chat: bool) -> Call:
    """The call in a request's body. Raises `ApiError` 400 that names the first field that is not right."""
    fields = _Fields(_decode(body))
    log_probs, alternatives = _log_probs(fields, chat)
    limits = [
        fields.integer(name, 1, 2**31 - 1) for name in ("max_tokens", "max_completion_tokens")[: 2 if chat else 1]
    ]
    options = fields.take("stream_options", dict, "an object") or {}
    seed = fields.integer("seed", -(2**63), 2**63 - 1)
    call = Call(
        model=fields.take("model", str, "a string"),
        messages=_messages(fields) if chat else None,
        prompts=[] if chat else _prompts(fields),
        n=fields.integer("n", 1, MAX_CHOICES) or 1,
        max_tokens=next((limit for limit in limits if limit is not None), None),
        rules={
            "temperature": fields.number("temperature", 0, 100),
            "top_p": fields.number("top_p", 0, 1),
            "top_k": fields.integer("top_k", 0, 2**31 - 1),
            "min_p": fields.number("min_p", 0, 1),
            "repetition_penalty": fields.number("repetition_penalty", 0.01, 100),
        },
        seed=None if seed is None else seed % 2**32,
        stop=_stops(fields),
        log_probs=log_probs,
        alternatives=alternatives,
        stream=fields.take("stream", bool, "true or false") or False,
        stream_usage=options.get("include_usage") is True,
    )
    fields.require_empty()
    if len(call.prompts) * call.n > MAX_CHOICES:
        raise ApiError(400, f"{len(call.prompts)} prompts and n={call.n} are more than {MAX_CHOICES} answers", "n")
    return call


def _decode(body: bytes) -> dict[str, Any]:
    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not a number of JSON")

    try:
        values = json.loads(body.decode("utf-8"), parse_constant=refuse)
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8 at byte {error.start}") from error
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deep" if isinstance(error, RecursionError) else str(error)[:200]
        raise ApiError(400, f"the body is not JSON: {reason}") from error
    if not isinstance(values, dict):
        raise ApiError(400, "the body is not a JSON object")
    return values


class _Fields:
    """The fields of a request that are not read yet. A field with the value null is one that is not given."""

    def __init__(self, values: dict[str, Any]) -> None:
        self._values = values

    def take(self, name: str, kind: type | tuple[type, ...], words: str) -> Any:
        """A field's value, None if it is not given. Raises `ApiError` if it has another type."""
        value = self._values.pop(name, None)
        if value is not None and (not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)):
            raise ApiError(400, f"{name} is not {words}", name)
        return value

    def number(self, name: str, low: int | float, high: int | float) -> float | None:
        value = self.take(name, (int, float), "a number")
        if value is not None and not (low <= value <= high and math.isfinite(value)):
            raise ApiError(400, f"{name} is not in [{low:g}, {high:g}]", name)
        return None if value is None else float(value)

    def integer(self, name: str, low: int, high: int) -> int | None:
        value = self.take(name, int, "an integer")
        if value is not None and not low <= value <= high:
            raise ApiError(400, f"{name} is not in [{low}, {high}]", name)
        return value

    def require_empty(self) -> None:
        """Raise `ApiError` for a field that this server does not know, or cannot do."""
        for name, value in self._values.items():
            if name in UNSUPPORTED and any(value == harmless for harmless in UNSUPPORTED[name]):
                continue
            if name in UNSUPPORTED:
                raise ApiError(400, f"this server does not support {name}", name, "unsupported_parameter")
            if name not in IGNORED:
                raise ApiError(400, f"unrecognized request argument: {name[:100]}", name[:100], "unknown_parameter")


def _log_probs(fields: _Fields, chat: bool) -> tuple[bool, int]:
    """Whether log-probabilities are asked for, and for how many alternatives."""
    if not chat:
        count = fields.integer("logprobs", 0, 20)
        return count is not None, count or 0
    wanted = fields.take("logprobs", bool, "true or false") or False
    count = fields.integer("top_logprobs", 0, 20)
    if count is not None and not wanted:
        raise ApiError(400, "top_logprobs needs logprobs to be true", "top_logprobs")
    return wanted, count or 0


def _stops(fields: _Fields) -> tuple[str, ...]:
    value = fields.take("stop", (str, list), "a string or an array of strings")
    stops = [value] if isinstance(value, str) else value or []
    if len(stops) > MAX_STOPS or not all(isinstance(stop, str) and 0 < len(stop) <= LONGEST_STOP for stop in stops):
        raise ApiError(400, f"stop is not up to {MAX_STOPS} texts of 1 to {LONGEST_STOP} characters", "stop")
    return tuple(stops)


def _prompts(fields: _Fields) -> list[str | list[int]]:
    value = fields.take("prompt", (str, list), "a string, an array of strings, or token ids")
    if value is None:
        raise ApiError(400, "prompt is missing", "prompt")
    alone = isinstance(value, str) or (value and all(isinstance(token, int) for token in value))
    prompts = [value] if alone else value
    for prompt in prompts:
        if not (isinstance(prompt, str) or (isinstance(prompt, list) and prompt and all(map(_is_id, prompt)))):
            raise ApiError(400, "prompt is not a string, an array of strings, or token ids", "prompt")
    if not prompts:
        raise ApiError(400, "prompt is an empty array", "prompt")
    return prompts


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _messages(fields: _Fields) -> list[dict[str, str]]:
    """The conversation, with the text parts of each content joined; a developer's message is a system message."""
    messages = fields.take("messages", list, "an array of messages")
    if not messages:
        raise ApiError(400, "messages is missing or empty", "messages")
    return [_message(i, message) for i, message in enumerate(messages)]


def _message(i: int, message: Any) -> dict[str, str]:
    role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
    if role not in ("system", "developer", "user", "assistant"):
        raise ApiError(400, f"messages[{i}].role is not system, developer, user or assistant", f"messages[{i}].role")
    if (text := text_of(content)) is None:
        raise ApiError(400, f"messages[{i}].content is not text", f"messages[{i}].content")
    return {"role": "system" if role == "developer" else role, "content": text}


@dataclass
class Reply:
    """Builds the objects of one response from the pieces of its answers; `decode` is the text of a token's id."""

    call: Call
    model: str
    decode: Callable[[int], str]
    n_choices: int
    created: int = field(default_factory=lambda: int(time.time()))
    id: str = ""

    def __post_init__(self) -> None:
        self.id = ("chatcmpl-" if self.call.chat else "cmpl-") + secrets.token_hex(12)

    def first_chunks(self) -> list[dict[str, Any]]:
        """The chunks before any text: in a chat those with the role."""
        start = {"role": "assistant", "content": ""}
        return [self._chunk(i, {"delta": start}, None, None) for i in range(self.n_choices if self.call.chat else 0)]

    def chunk(self, index: int, piece: Piece) -> dict[str, Any]:
        """The chunk of a stream for one piece of one answer."""
        text = {"delta": {"content": piece.text}} if self.call.chat else {"text": piece.text}
        return self._chunk(index, text, self._log_probs(piece.tokens), piece.end)

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The last chunk of a stream that asks for its usage."""
        return self._object(chunk=True) | {"choices": [], "usage": usage}

    def whole(self, pieces: Sequence[tuple[int, Piece]], usage: dict[str, Any]) -> dict[str, Any]:
        """The response that is not streamed, from all pieces with the numbers of their answers."""
        choices = []
        for i in range(self.n_choices):
            own = [piece for number, piece in pieces if number == i]
            text, tokens = "".join(piece.text for piece in own), [token for piece in own for token in piece.tokens]
            message = {"message": {"role": "assistant", "content": text, "refusal": None}}
            shown = message if self.call.chat else {"text": text}
            end = {"logprobs": self._log_probs(tokens), "finish_reason": own[-1].end}
            choices.append({"index": i} | shown | end)
        return self._object(chunk=False) | {"choices": choices, "usage": usage}

    def _object(self, chunk: bool) -> dict[str, Any]:
        kind = "text_completion"
        if self.call.chat:
            kind = "chat.completion.chunk" if chunk else "chat.completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _chunk(self, index: int, text: dict[str, Any], log_probs: Any, end: str | None) -> dict[str, Any]:
        choice = {"index": index} | text | {"logprobs": log_probs, "finish_reason": end}
        usage = {"usage": None} if self.call.stream_usage else {}
        return self._object(chunk=True) | {"choices": [choice]} | usage

    def _log_probs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if not self.call.log_probs:
            return None
        if self.call.chat:
            content = [
                self._entry(token.id, token.log_prob)
                | {"top_logprobs": [self._entry(*alternative) for alternative in token.alternatives]}
                for token in tokens
            ]
            return {"content": content, "refusal": None}
        return {
            "tokens": [self.decode(token.id) for token in tokens],
            "token_logprobs": [token.log_prob for token in tokens],
            # The likeliest of several with the same text, such as parts of characters, comes last and stays.
            "top_logprobs": [{self.decode(i): p for i, p in reversed(token.alternatives)} for token in tokens],
            "text_offset": [token.place for token in tokens],
        }

    def _entry(self, token: int, log_prob: float) -> dict[str, Any]:
        """A token of a chat's log-probabilities; its bytes are not known where it is a part of a character."""
        text = self.decode(token)
        return {"token": text, "logprob": log_prob, "bytes": None if "\ufffd" in text else list(text.encode())}
