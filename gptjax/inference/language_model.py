"""A model to talk to: a run of gptjax, a Hugging Face folder or nanoGPT's ckpt.pt, with its tokenizer and manners."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.files import read_json
from gptjax.hub.families import draw_params
from gptjax.hub.weights import load_params, locate, merge_lora, open_weights, tokenizer_of
from gptjax.inference import chat_template as chat
from gptjax.inference.decoder import hidden, lay_out, logits
from gptjax.inference.generate import Ids, Memory, Sampling, generate
from gptjax.inference.quantize import quantize
from gptjax.inference.speculative import Decoder, speculate
from gptjax.matmul import Int8
from gptjax.resolve import resolve
from gptjax.run_dir import holds_run, load_run, trained_tokens
from gptjax.sharding import one_device, with_shardings
from gptjax.tokenizer import TextStream, Tokenizer

Dtype = Literal["auto", "float32", "bfloat16", "int8"]
_SCORED_LOGITS = 1 << 26  # logits in one batch of a score: 256 MiB


@dataclass
class Answer:
    """What follows a prompt, so far: `text` ends before the stop string or stop token that ended it, if one did."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)  # that were drawn, the stop token not among them
    log_probs: list[float] = field(default_factory=list)  # of these tokens, in nats, by the model before any rule
    ended: bool = False


@dataclass(frozen=True)
class LanguageModel:
    """Weights on the first device, and what it takes to talk to them."""

    name: str
    config: ModelConfig
    params: Any
    tokenizer: Tokenizer
    template: str | None  # of a chat, in Jinja
    variables: dict[str, str]  # the template's: special tokens by name
    stop_tokens: frozenset[int]
    defaults: dict[str, Any]  # how its makers sample from it, of temperature, top_k, top_p and repetition_penalty
    train_tokens: int | None  # that it was trained on, None where that is not known
    folder: Path

    @classmethod
    def load(cls, name: str, which: Literal["best", "latest"] = "best", dtype: Dtype = "auto") -> "LanguageModel":
        """The model in a run's or a Hugging Face folder, in a ckpt.pt of nanoGPT, or of a name on the hub.

        A run's weights are float32, others have the `dtype` of activations; "auto" is float32 on CPU, where a token
        takes longer in bfloat16, and on GPU and TPU a run's own, else bfloat16. "int8" is auto with the weights rounded
        to int8.

        Raises:
            UserError: there is no such model, or it is damaged.
        """
        path = locate(name)

        def chosen(config: ModelConfig) -> ModelConfig:
            if dtype == "float32" or dtype == "bfloat16":
                return replace(config, dtype=dtype)
            return resolve(config, jax.default_backend(), training=False)

        if holds_run(path):
            run, params, tokenizer = load_run(path, which)
            config, seen = chosen(run.model), None if run.init_from else trained_tokens(path, which)
        else:
            weights, seen = open_weights(path), None
            config = chosen(weights.config)
            tokenizer = Tokenizer.from_name_or_path(tokenizer_of(path, config))
            abstract = jax.eval_shape(lambda: draw_params(config, 0))
            abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, config.dtype), abstract)
            params = load_params(weights, config, with_shardings(one_device(), abstract))
            if tokenizer.vocab_size > config.vocab_size:
                raise UserError(
                    f"{path / 'tokenizer.json'} has {tokenizer.vocab_size} tokens and the model {config.vocab_size}: "
                    "they do not belong together"
                )
        folder = path if path.is_dir() else path.parent
        config, params = merge_lora(config, params)
        if dtype == "int8":
            params = quantize(params)
        variables = chat.special_tokens(folder)
        stops, defaults = _manners(folder, tokenizer, variables)
        template = chat.find_template(folder)
        shown = path.resolve().name if Path(name).expanduser().exists() else name  # on the hub's cache, a checksum
        return cls(shown, config, params, tokenizer, template, variables, stops, defaults, seen, folder)

    def for_sampling(self) -> "LanguageModel":
        """The same with its parameters as a CPU reads them fastest, token by token."""
        return replace(self, params=lay_out(self.params)) if jax.default_backend() == "cpu" else self

    @property
    def n_params(self) -> int:
        """Trained numbers: the padding of the vocabulary is none."""
        padding = self.config.padded_vocab_size - self.config.vocab_size
        padded = 1 if self.config.tied_head else 2
        leaves = jax.tree.leaves(self.params, is_leaf=lambda leaf: isinstance(leaf, Int8))
        weights = sum((leaf.weights if isinstance(leaf, Int8) else leaf).size for leaf in leaves)
        return weights - padded * padding * self.config.n_embd

    def chat_prompt(self, messages: Sequence[dict[str, str]]) -> Ids:
        """The ids of a conversation ({"role": ..., "content": ...}), up to where the assistant's answer begins.

        Raises:
            UserError: the model has no chat template, or it fails.
        """
        if self.template is None:
            raise UserError(
                f"{self.name} has no chat template, so it is no chat model; pass --prompt instead of --chat"
            )
        text = chat.render(self.template, messages, self.variables, add_generation_prompt=True)
        if not text:
            raise UserError(f"the chat template of {self.name} makes nothing of a conversation; pass --prompt instead")
        return self.tokenizer.encode(text, special=True)

    def start(self) -> Ids:
        """What stands before a text that begins: the tokenizer's own mark, or the last text's end, or a new line."""
        if len(self.tokenizer.begin):
            return self.tokenizer.begin
        ends = [self.tokenizer.token_id(self.variables.get(name, "")) for name in ("bos_token", "eos_token")]
        known = [token for token in ends if token is not None]
        return np.array(known[:1], np.int32) if known else self.tokenizer.prompt()

    def answer(
        self,
        prompts: Sequence[Ids],
        max_new_tokens: int,
        sampling: Sampling,
        seeds: Sequence[int],
        stop: Sequence[str] = (),
        memory: Memory | None = None,
        draft: "LanguageModel | None" = None,
    ) -> Iterator[list[Answer]]:
        """The same answers again and again, one to each prompt, as they grow, until all have ended or are long enough.

        Text that may yet turn out to be the beginning of a stop string is held back until the end. With a draft there
        is one prompt, and no use of the memory.

        Raises:
            UserError: the draft has other tokens.
        """
        rows = [_Row(Answer(), TextStream(self.tokenizer, prompt[-16:])) for prompt in prompts]
        if draft is None:
            chunks = generate(self.config, self.params, prompts, max_new_tokens, sampling, seeds, memory)
        else:
            self.require_same_tokens(draft)
            own, guesses = [Decoder(model.config, model.params) for model in (self, draft)]
            chunks = speculate(own, guesses, prompts[0], max_new_tokens, sampling, seeds[0])
        for chunk in chunks:
            for row, tokens, log_probs in zip(rows, *chunk, strict=True):
                row.feed(tokens.tolist(), log_probs.tolist(), self.stop_tokens, stop)
            if all(row.answer.ended for row in rows):
                break
            yield [row.answer for row in rows]
        for row in rows:
            row.finish(stop)
        yield [row.answer for row in rows]

    def require_same_tokens(self, draft: "LanguageModel") -> None:
        """Raise `UserError` where a draft's ids mean something else."""
        if draft.tokenizer.vocabulary() != self.tokenizer.vocabulary():
            raise UserError(f"draft={draft.name} cannot guess for {self.name}: they have different tokens")

    def score(self, texts: Sequence[tuple[Ids, Ids]]) -> list[tuple[Float[np.ndarray, " T"], Bool[np.ndarray, " T"]]]:
        """For each (context, continuation): log-probabilities in nats of the continuation's tokens, and which of them
        are the likeliest.

        A text is cut in front to block_size + 1 tokens.

        Raises:
            UserError: a continuation leaves none of these to its context.
        """
        scored: list[Any] = [None] * len(texts)
        order = sorted(range(len(texts)), key=lambda i: sum(map(len, texts[i])))
        while order:
            longest = min(sum(map(len, texts[order[-1]])), self.config.block_size + 1) - 1
            width = min(max(32, 1 << (longest - 1).bit_length()), self.config.block_size)
            rows = max(1, _SCORED_LOGITS // (width * self.config.padded_vocab_size))
            batch, order = order[-rows:], order[:-rows]
            windows = [np.concatenate(texts[i])[-self.config.block_size - 1 :] for i in batch]
            tokens_BW = np.zeros((1 << (len(batch) - 1).bit_length(), width + 1), np.int32)
            for tokens_W, window in zip(tokens_BW, windows, strict=False):
                tokens_W[: len(window)] = window
            log_probs_BT, likeliest_BT = map(np.asarray, _score(self.config, self.params, jnp.asarray(tokens_BW)))
            for row, (i, window) in enumerate(zip(batch, windows, strict=True)):
                part = slice(len(window) - 1 - len(texts[i][1]), len(window) - 1)
                if part.start < 0:
                    raise UserError(f"a continuation of {len(texts[i][1])} tokens leaves no place for its context")
                scored[i] = (log_probs_BT[row, part], likeliest_BT[row, part])
        return scored


@partial(jax.jit, static_argnames="config")
def _score(
    config: ModelConfig, params: Any, tokens_BW: Int[Array, "B W"]
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """Log-probability of each token after the first, and whether it is the likeliest."""
    logits_BTV = logits(config, params, hidden(config, params, tokens_BW[:, :-1])[0])
    targets_BT = tokens_BW[:, 1:]
    log_probs_BTV = jax.nn.log_softmax(logits_BTV)
    log_probs_BT = jnp.take_along_axis(log_probs_BTV, targets_BT[:, :, None], axis=-1)[:, :, 0]
    return log_probs_BT, jnp.argmax(logits_BTV, axis=-1) == targets_BT


@dataclass
class _Row:
    """One answer while it grows; `held` is text that may yet belong to a stop string."""

    answer: Answer
    stream: TextStream
    held: str = ""

    def feed(self, tokens: list[int], log_probs: list[float], ends: frozenset[int], stop: Sequence[str]) -> None:
        for token, log_prob in zip(tokens, log_probs, strict=True):
            if self.answer.ended:
                return
            if token in ends:
                self._show(self.stream.end(), stop)
                self.answer.text, self.held = self.answer.text + ("" if self.answer.ended else self.held), ""
                self.answer.ended = True
                return
            self.answer.tokens.append(token)
            self.answer.log_probs.append(log_prob)
            self._show(self.stream.feed([token]), stop)

    def _show(self, piece: str, stop: Sequence[str]) -> None:
        """Add to the text what cannot be part of a stop string any more; end it where there is one."""
        text = self.held + piece
        found = [(at + len(word), at) for word in stop if (at := text.find(word)) >= 0]
        if found:  # the one that is whole first, however the text came in pieces
            self.answer.text, self.held, self.answer.ended = self.answer.text + text[: min(found)[1]], "", True
            return
        n_held = max((n for word in stop for n in range(1, len(word)) if text.endswith(word[:n])), default=0)
        self.answer.text, self.held = self.answer.text + text[: len(text) - n_held], text[len(text) - n_held :]

    def finish(self, stop: Sequence[str]) -> None:
        if not self.answer.ended:
            self._show(self.stream.end(), stop)
            self.answer.text, self.held = self.answer.text + self.held, ""


def _manners(folder: Path, tokenizer: Tokenizer, variables: dict[str, str]) -> tuple[frozenset[int], dict[str, Any]]:
    """The tokens that end an answer, and the sampling rules of generation_config.json."""
    stops, defaults = {tokenizer.token_id(variables.get("eos_token", "")), tokenizer.end_of_text}, dict[str, Any]()
    path = folder / "generation_config.json"
    if path.exists():
        values = read_json(path)
        end = values.get("eos_token_id")
        ends = end if isinstance(end, list) else [] if end is None else [end]
        kinds: dict[str, Any] = {"temperature": float, "top_k": int, "top_p": float, "repetition_penalty": float}
        defaults = {name: values[name] for name in kinds if values.get(name) is not None}
        fits = {name: isinstance(value, int | kinds[name]) and value >= 0 for name, value in defaults.items()}
        fits |= {"top_p": fits["top_p"] and defaults["top_p"] <= 1} if "top_p" in fits else {}
        fits |= {"eos_token_id": all(isinstance(token, int) for token in ends)}
        fits |= {"repetition_penalty": defaults.get("repetition_penalty", 1) != 0} if all(fits.values()) else {}
        for name, right in fits.items():
            if not right:
                raise UserError(f"{path}: {name}={values[name]!r} makes no sense")
        defaults = {name: kinds[name](value) for name, value in defaults.items()}
        stops |= set(ends)
        if values.get("do_sample") is False:
            defaults["temperature"] = 0.0
    return frozenset(token for token in stops if token is not None), defaults
