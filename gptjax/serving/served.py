"""A model that is served: its name, its engine, and the engine's requests for what a client asks for."""

import secrets
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from gptjax.chat.template import Renderer
from gptjax.errors import UserError
from gptjax.inference.language_model import LanguageModel
from gptjax.inference.sampling import TokenIds
from gptjax.serving.engine import Engine, Request
from gptjax.serving.protocol import ApiError, Call

COMPLETION_TOKENS = 16  # where max_tokens is not given: OpenAI's default for completions


MOST_PROBABILITIES = 1 << 20  # in the answers of one request, which the server holds until they are read


@dataclass(frozen=True)
class Limits:
    """What one request may take; times are in seconds."""

    body_bytes: int = 1 << 20
    prompt_tokens: int | None = None  # none: the model's context
    new_tokens: int = 4096
    seconds: float = 300.0


@dataclass
class Served:
    """A model by the name that clients call it by. `aliases` are other names of it, such as the path of its folder."""

    name: str
    model: LanguageModel
    engine: Engine
    aliases: tuple[str, ...] = ()
    started: int = field(default_factory=lambda: int(time.time()))
    card: dict[str, str] = field(init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock)  # the tokenizer has one mode for all threads
    _renderer: Renderer = field(default_factory=Renderer)

    def __post_init__(self) -> None:
        self.card = self.model.card()

    def encode(self, call: Call) -> list[TokenIds]:
        """The ids of the call's prompts; special tokens that a text spells stay text. Raises `ApiError` 400."""
        try:
            with self._lock:
                if call.messages is not None:
                    if self.model.template is None:
                        fix = "use /v1/completions, or a model that was trained on chats"
                        raise ApiError(400, f"{self.name} has no chat template, so it cannot chat: {fix}", "messages")
                    return [self.model.chat_prompt(call.messages, self._renderer)]
                return [self._ids(prompt) for prompt in call.prompts]
        except UserError as error:
            reason = str(error).partition("; prompt the model")[0]  # without the advice for sample.py
            raise ApiError(400, reason, "messages" if call.chat else "prompt") from error

    def _ids(self, prompt: str | list[int]) -> TokenIds:
        if isinstance(prompt, str):
            return self.model.tokenizer.prompt(prompt, special=False)
        if (most := max(prompt)) >= self.model.config.vocab_size:
            raise ApiError(400, f"{self.name} has no token {most}: its ids end at {self.model.config.vocab_size - 1}")
        return np.array(prompt, np.int32)

    def close(self) -> None:
        """End what runs beside the engine."""
        self._renderer.close()

    def requests(self, call: Call, prompts: Sequence[TokenIds], limits: Limits, deadline: float) -> list[Request]:
        """The engine's requests: n for each prompt, with consecutive seeds, as `sample.py --num_samples` has them.

        Raises `ApiError` 400 for a prompt or an answer that is longer than the model or the server allows.
        """
        block_size = self.model.config.block_size
        most = min(block_size, limits.prompt_tokens or block_size)
        name = "messages" if call.chat else "prompt"
        for ids in prompts:
            if len(ids) > most:
                message = f"this prompt has {len(ids):,} tokens; {self.name} takes at most {most:,} here"
                raise ApiError(400, message, name, "context_length_exceeded")
        if (call.max_tokens or 0) > limits.new_tokens:
            raise ApiError(
                400, f"max_tokens={call.max_tokens} is above this server's limit of {limits.new_tokens}", "max_tokens"
            )
        usual = [max(1, block_size - len(ids)) if call.chat else COMPLETION_TOKENS for ids in prompts]
        most_new = [call.max_tokens or min(n, limits.new_tokens) for n in usual]
        if call.n * sum(most_new) * (1 + call.alternatives) > MOST_PROBABILITIES:
            message = f"n, max_tokens and logprobs ask for more than {MOST_PROBABILITIES:,} probabilities"
            raise ApiError(400, message, "max_tokens")
        seed = secrets.randbelow(2**32) if call.seed is None else call.seed
        sampling = self.model.sampling(**call.rules)
        return [
            Request(
                prompt=ids,
                max_new_tokens=n_new,
                sampling=sampling,
                seed=(seed + i) % 2**32,
                stop=call.stop,
                alternatives=call.alternatives,
                deadline=deadline,
            )
            for ids, n_new in zip(prompts, most_new, strict=True)
            for i in range(call.n)
        ]
