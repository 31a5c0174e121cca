"""A language model to prompt, chat with and score texts by: weights, tokenizer, chat template, default sampling."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gptjax.chat import template as chat
from gptjax.chat.tokens import encode_chat
from gptjax.cli import Dtype, Which
from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.files import read_json
from gptjax.hub.weights import folder_of, load_params, locate, merge_lora, open_weights, stop_ids, tokenizer_of
from gptjax.inference.decoder import hidden, lay_out, logits
from gptjax.inference.generate import PrefixCache, generate, padded_length
from gptjax.inference.quantize import quantize
from gptjax.inference.sampling import Sampling, TokenIds, log_probs_of
from gptjax.inference.speculative import speculate
from gptjax.model import param_shapes
from gptjax.progress import working
from gptjax.resolve import resolve
from gptjax.run_dir import holds_run, load_run, trained_tokens
from gptjax.sharding import one_device, with_shardings
from gptjax.tokenizer import TextStream, Tokenizer

CHAT = "a chat"  # how an instruction model is asked
_SCORED_LOGITS = 1 << 26  # logits in one batch of `score`: 256 MiB


@dataclass
class Answer:
    """The continuation of a prompt so far. `text` ends before the stop string or stop token that ended it, if any."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)  # without the stop token
    log_probs: list[float] = field(default_factory=list)  # of each token, in nats, before any sampling rule
    ended: bool = False


@dataclass(frozen=True)
class LanguageModel:
    """A model on the first device, with its tokenizer and the settings that its makers published with it."""

    name: str
    config: ModelConfig
    params: Any
    tokenizer: Tokenizer
    template: str | None  # the chat template, in Jinja
    special_tokens: dict[str, str]  # the chat template's, by name: bos_token, eos_token, ...
    stop_tokens: frozenset[int]
    defaults: dict[str, Any]  # its makers' temperature, top_k, top_p and repetition_penalty, where they state them
    train_tokens: int | None  # tokens that it was trained on, None if unknown
    folder: Path

    @classmethod
    def load(cls, name: str, which: Which | int = "best", dtype: Dtype = "auto") -> "LanguageModel":
        """The model in a run's folder, a Hugging Face folder, a GGUF file or nanoGPT's ckpt.pt, or of that name.

        `which` is a run's checkpoint, or the step of one. A run's weights are float32, all others have the `dtype` of
        activations, as DTYPE_HELP explains it. On a CPU float32 is faster than bfloat16 for a single token. Raises
        `UserError` for no such model or a damaged one.
        """
        path, train_tokens = locate(name), None
        folder = folder_of(path)
        if holds_run(path):
            with working(f"loading {name}"):
                run, params, tokenizer = load_run(path, which)
            config, train_tokens = _with_dtype(run.model, dtype), None if run.init_from else trained_tokens(path, which)
        else:
            config, params, tokenizer = _load_weights(path, dtype)
        config, params = merge_lora(config, params)
        params = quantize(params) if dtype == "int8" else params
        template, special = chat.find_template(folder), chat.special_tokens(folder)
        defaults = _read_rules(folder / "generation_config.json")
        stops = [*stop_ids(folder), tokenizer.token_id(special.get("eos_token", "")), tokenizer.end_of_text]
        stop_tokens = frozenset(token for token in stops if token is not None)
        shown = path.resolve().name if Path(name).exists() else name  # the hub's folders are checksums
        return cls(shown, config, params, tokenizer, template, special, stop_tokens, defaults, train_tokens, folder)

    def for_sampling(self) -> "LanguageModel":
        """The model with its parameters in the layout that a CPU or GPU decodes fastest from."""
        return self if jax.default_backend() == "tpu" else replace(self, params=lay_out(self.params))

    @property
    def n_params(self) -> int:
        """The number of parameters, without the padding of the vocabulary."""
        shapes = jax.tree.leaves(param_shapes(self.config))
        n_padded = (self.config.padded_vocab_size - self.config.vocab_size) * self.config.n_embd
        return sum(math.prod(leaf.shape) for leaf in shapes) - n_padded * (1 if self.config.tied_head else 2)

    def sampling(self, **given: int | float | None) -> Sampling:
        """The rules that are given, else those that the model's makers recommend, else the usual ones."""
        usual: dict[str, Any] = {"temperature": 0.8, "top_k": 200, "top_p": 1.0, "repetition_penalty": 1.0}
        if self.defaults:
            usual |= {"top_k": 0} | self.defaults
        return Sampling(**usual | {name: value for name, value in given.items() if value is not None})

    def card(self) -> dict[str, str]:
        """What there is to know about the model, as texts by name."""
        config = self.config
        shared = f" on {config.kv_heads} key/value heads" if config.kv_heads != config.n_head else ""
        return {
            "asked as": CHAT if self.template else "a text to continue",
            "parameters": f"{self.n_params:,}",
            "shape": f"{config.n_layer} layers, width {config.n_embd}, {config.n_head} heads{shared}",
            "trained on": "not stated" if self.train_tokens is None else f"{self.train_tokens:,} tokens",
            "tokenizer": f"{self.tokenizer.kind}, {self.tokenizer.vocab_size:,} tokens",
            "context": f"{config.block_size:,} tokens",
            "activations": config.dtype,
        }

    def chat_prompt(self, messages: Sequence[dict[str, str]], renderer: chat.Renderer | None = None) -> TokenIds:
        """The ids of a conversation of {"role": ..., "content": ...}, up to where the assistant's answer begins.

        Contents are text: a special token that one spells stays text. A renderer is for programs that ask often.
        Raises `UserError` if the model has no chat template, or if the template fails.
        """
        if self.template is None:
            raise UserError(f"{self.name} is not a chat model: it has no chat template; pass --prompt, not --chat")
        template, special_tokens = self.template, self.special_tokens
        render = renderer.render if renderer else chat.render
        ids = encode_chat(self.tokenizer, template, lambda m: render(template, m, special_tokens), messages)
        if not len(ids):
            raise UserError(f"the chat template of {self.name} makes an empty text; pass --prompt instead of --chat")
        return ids

    def answer(
        self,
        prompts: Sequence[TokenIds],
        max_new_tokens: int,
        sampling: Sampling,
        seeds: Sequence[int],
        stop: Sequence[str] = (),
        prefix: PrefixCache | None = None,
        draft: "LanguageModel | None" = None,
    ) -> Iterator[list[Answer]]:
        """Yield the answers, one for each prompt, again and again as they grow.

        Text that may yet turn out to be the beginning of a stop string is held back. A draft model speculates for a
        single prompt and does not use the prefix cache. Raises `UserError` if it has other tokens.
        """
        rows = [AnswerBuilder(TextStream(self.tokenizer, prompt[-16:]), self.stop_tokens, stop) for prompt in prompts]
        if draft is None:
            chunks = generate(self.config, self.params, prompts, max_new_tokens, sampling, seeds, prefix)
        else:
            self.require_same_tokens(draft)
            models = (self.config, self.params, draft.config, draft.params)
            chunks = speculate(*models, prompts[0], max_new_tokens, sampling, seeds[0])
        for chunk in chunks:
            for row, tokens, log_probs in zip(rows, *chunk, strict=True):
                row.add(tokens.tolist(), log_probs.tolist())
            if all(row.answer.ended for row in rows):
                break
            yield [row.answer for row in rows]
        for row in rows:
            row.finish()
        yield [row.answer for row in rows]

    def require_same_tokens(self, draft: "LanguageModel") -> None:
        """Raise `UserError` if a draft's ids stand for other tokens."""
        if draft.tokenizer.vocabulary() != self.tokenizer.vocabulary():
            raise UserError(f"draft={draft.name} has other tokens than {self.name}; pass one with the same tokenizer")

    def score(self, texts: Sequence[tuple[TokenIds, TokenIds]]) -> list[Float[np.ndarray, " T"]]:
        """For each (context, continuation) the log-probabilities (nats) of the continuation's tokens.

        Only a text's last block_size + 1 tokens are read. Raises `UserError` if none of them is of the context.
        """
        block_size, scored = self.config.block_size, list[Any]([None] * len(texts))
        order = sorted(range(len(texts)), key=lambda i: sum(map(len, texts[i])))
        while order:
            width = padded_length(min(sum(map(len, texts[order[-1]])) - 1, block_size), block_size)
            n_rows = max(1, _SCORED_LOGITS // (width * self.config.padded_vocab_size))
            batch, order = order[-n_rows:], order[:-n_rows]
            windows = [np.concatenate(texts[i])[-block_size - 1 :] for i in batch]
            tokens_BW = np.zeros((1 << (len(batch) - 1).bit_length(), width + 1), np.int32)
            for tokens_W, window in zip(tokens_BW, windows, strict=False):
                tokens_W[: len(window)] = window
            log_probs_BT = np.asarray(_score(self.config, self.params, jnp.asarray(tokens_BW)))
            for row, (i, window) in enumerate(zip(batch, windows, strict=True)):
                part = slice(len(window) - 1 - len(texts[i][1]), len(window) - 1)
                if part.start < 0:
                    raise UserError(f"a continuation of {len(texts[i][1])} tokens leaves no room for its context")
                scored[i] = log_probs_BT[row, part]
        return scored


@partial(jax.jit, static_argnames="config")
def _score(config: ModelConfig, params: Any, tokens_BW: Int[Array, "B W"]) -> Float[Array, "B T"]:
    """The log-probability of each token after the first."""
    logits_BTV = logits(config, params, hidden(config, params, tokens_BW[:, :-1])[0])
    return log_probs_of(logits_BTV, tokens_BW[:, 1:])


@dataclass
class AnswerBuilder:
    """Builds an answer from its tokens; `held` is text that may yet be the beginning of a stop string."""

    stream: TextStream
    stop_tokens: frozenset[int]
    stop: Sequence[str]
    answer: Answer = field(default_factory=Answer)
    held: str = ""

    def add(self, tokens: Sequence[int], log_probs: Sequence[float]) -> None:
        """Add tokens up to the first that ends the answer."""
        for token, log_prob in zip(tokens, log_probs, strict=True):
            if token in self.stop_tokens:
                self.finish()
                self.answer.ended = True
            if self.answer.ended:
                return
            self.answer.tokens.append(token)
            self.answer.log_probs.append(log_prob)
            self._add_text(self.stream.feed([token]))

    def finish(self) -> None:
        """Add the text that is still held back."""
        if not self.answer.ended:
            self._add_text(self.stream.end())
            self.answer.text, self.held = self.answer.text + self.held, ""

    def _add_text(self, piece: str) -> None:
        text = self.held + piece
        ends = [(start + len(word), start) for word in self.stop if (start := text.find(word)) >= 0]
        if ends:  # the stop string that is complete first, so the pieces in which a text arrives do not matter
            n_shown, self.held, self.answer.ended = min(ends)[1], "", True
        else:
            prefixes = [word[:n] for word in self.stop for n in range(1, len(word))]
            n_shown = len(text) - max((len(prefix) for prefix in prefixes if text.endswith(prefix)), default=0)
            self.held = text[n_shown:]
        self.answer.text += text[:n_shown]


def _load_weights(path: Path, dtype: Dtype) -> tuple[ModelConfig, Any, Tokenizer]:
    """Config, parameters and tokenizer of a Hugging Face folder, a GGUF file or nanoGPT's ckpt.pt."""
    weights = open_weights(path)
    config = _with_dtype(weights.config, dtype)
    tokenizer = Tokenizer.from_name_or_path(tokenizer_of(path, config))
    shapes = param_shapes(config)
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, config.dtype), shapes)
    params = load_params(weights, config, with_shardings(one_device(), abstract))
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{path / 'tokenizer.json'} has {tokenizer.vocab_size} tokens and the model {config.vocab_size}: "
            "they do not belong together"
        )
    return config, params, tokenizer


def _with_dtype(config: ModelConfig, dtype: Dtype) -> ModelConfig:
    config = resolve(config, jax.devices()[0], training=False)
    return replace(config, dtype=dtype) if dtype == "float32" or dtype == "bfloat16" else config


def _read_rules(path: Path) -> dict[str, Any]:
    """The sampling rules of a generation_config.json; none if there is no such file."""
    values = read_json(path, missing_ok=True)
    least = {"temperature": 0, "top_k": 0, "top_p": 0, "repetition_penalty": 1e-6}
    defaults = {name: value for name in least if (value := values.get(name)) is not None}
    for name, value in defaults.items():
        kind, most = int if name == "top_k" else float, 1 if name == "top_p" else math.inf
        if not isinstance(value, int | kind) or not least[name] <= value <= most:
            raise UserError(f"{path}: {name}={value!r} is not a number from {least[name]} to {most}; correct it")
        defaults[name] = kind(value)
    if values.get("do_sample") is False:
        defaults["temperature"] = 0.0
    return defaults
