"""Text from a model: one prefill of the prompts, then lax.scan over a KV cache; shape suffixes as in model.py."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from gptjax.config import ModelConfig
from gptjax.inference.decoder import Cache, hidden, init_cache, length_of, logits, widen

CHUNK = 10  # tokens decoded in one call: so few that a person can read along; people ask for round numbers
Ids = Int[np.ndarray, " _"]


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from logits.

    The rules apply in the order of the fields but for the temperature, which comes after repetition_penalty: logits
    of tokens in the text so far are divided by it where positive and multiplied where negative ("CTRL", section
    4.1); only the top_k likeliest stay, then the likeliest that make up top_p of the probability ("The Curious Case
    of Neural Text Degeneration", section 3.1), then those with min_p of the likeliest one's probability. A
    temperature of 0 takes the likeliest. 1, 0, 1, 0 and 1 leave everything as it is.
    """

    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


class Chunk(NamedTuple):
    """The next few tokens of each row, and their log-probabilities (nats) by the model itself, before any rule."""

    tokens_BC: Int[np.ndarray, "B C"]
    log_probs_BC: Float[np.ndarray, "B C"]


@dataclass
class Memory:
    """The tokens of one conversation whose keys and values are in `cache`, for the next turn to go on from."""

    tokens: Ids = field(default_factory=lambda: np.zeros(0, np.int32))
    cache: Cache | None = None


def apply_rules(
    logits_BV: Float[Array, "B V"], seen_BV: Bool[Array, "B V"] | None, temperature: Any, rules: Sampling
) -> Float[Array, "B V"]:
    """The logits that a token is drawn from: -inf where a rule forbids it. Of ties at a limit, all stay."""
    if seen_BV is not None:
        penalty = rules.repetition_penalty
        punished_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
        logits_BV = jnp.where(seen_BV, punished_BV, logits_BV)
    logits_BV = logits_BV / jnp.maximum(temperature, 1e-6)
    if 0 < rules.top_k < logits_BV.shape[-1]:
        logits_BV = _keep_largest(logits_BV, jnp.ones_like(logits_BV), float(rules.top_k))
    if rules.top_p < 1:
        logits_BV = _keep_largest(logits_BV, jax.nn.softmax(logits_BV), max(rules.top_p, 1e-30))
    if rules.min_p > 0:
        logits_BV = _keep(logits_BV, jnp.max(logits_BV, axis=-1, keepdims=True) + np.log(rules.min_p))
    return logits_BV


def sample_token(
    logits_BV: Float[Array, "B V"],
    seen_BV: Bool[Array, "B V"] | None,
    keys_B: Key[Array, " B"],
    temperature: Any,
    rules: Sampling,
) -> Int[Array, " B"]:
    """A token of each row, drawn with that row's key; the likeliest at temperature 0."""
    logits_BV = apply_rules(logits_BV, seen_BV, temperature, rules)
    noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, logits_BV.shape[1:]))(keys_B)
    noisy_BV = jnp.where(temperature > 0, logits_BV + noise_BV, logits_BV)
    # The first of the largest. jnp.argmax draws the noise inside its search, which no vector unit then helps.
    return jax.lax.top_k(noisy_BV, 1)[1][:, 0]


@partial(jax.jit, static_argnames="config", donate_argnames="cache")
def prefill(
    config: ModelConfig,
    params: Any,
    cache: Cache,
    tokens_BT: Int[Array, "B T"],
    offset_B: Int[Array, " B"],
    length_B: Int[Array, " B"],
) -> tuple[Cache, Float[Array, "B V"]]:
    """Read the first `length` tokens of each row, at positions from its offset on: the cache, and what follows' logits.

    What stands behind `length` only fills the row, so that one compilation serves many lengths: the causal mask
    hides its keys until decoding overwrites them.
    """
    x_BTD, cache = hidden(config, params, tokens_BT, cache, offset_B)
    return cache, logits(config, params, jnp.take_along_axis(x_BTD, length_B[:, None, None] - 1, axis=1))[:, 0]


@partial(jax.jit, static_argnames=("config", "rules"), donate_argnames=("cache", "seen_BV"))
def decode(
    config: ModelConfig,
    params: Any,
    cache: Cache,
    logits_BV: Float[Array, "B V"],
    seen_BV: Bool[Array, "B V"] | None,
    position_B: Int[Array, " B"],
    keys_B: Key[Array, " B"],
    index: Int[Array, ""],
    temperature: Float[Array, ""],
    rules: Sampling,
) -> Any:
    """CHUNK tokens a row: the first drawn from `logits_BV` and put at its position, the i-th with key (key, index + i).

    Returns the cache, the logits of what follows, the tokens seen, the new tokens [B, C] and their log-probabilities.
    """

    def one_token(carry: Any, i: jax.Array) -> Any:
        cache, logits_BV, seen_BV = carry
        token_B = sample_token(logits_BV, seen_BV, _fold(keys_B, index + i), temperature, rules)
        x_B1D, cache = hidden(config, params, token_B[:, None], cache, position_B + i)
        drawn = (token_B, _log_prob(logits_BV, token_B))
        return (cache, logits(config, params, x_B1D)[:, 0], see(seen_BV, token_B)), drawn

    (cache, logits_BV, seen_BV), (tokens_CB, log_probs_CB) = jax.lax.scan(
        one_token, (cache, logits_BV, seen_BV), jnp.arange(CHUNK)
    )
    return cache, logits_BV, seen_BV, tokens_CB.T, log_probs_CB.T


def generate(
    config: ModelConfig,
    params: Any,
    prompts: Sequence[Ids],
    max_new_tokens: int,
    sampling: Sampling,
    seeds: Sequence[int],
    memory: Memory | None = None,
) -> Iterator[Chunk]:
    """The tokens that follow each prompt, a few at a time; of a prompt the last block_size tokens are read.

    Once block_size tokens are read, the last block_size / 2 of them are read again into an empty cache.

    The i-th new token of a row is a function of (prompt, weights, sampling, seed, i): neither the other rows nor how
    many tokens follow change it. With a memory there is one prompt: what it shares with the memory is not read again.
    """
    longest, lengths = max(map(len, prompts)), sorted({len(prompt) for prompt in prompts})
    if len(lengths) == 1 or longest + max_new_tokens <= config.block_size:
        yield from _generate(config, params, list(prompts), max_new_tokens, sampling, list(seeds), memory)
        return
    # Rows that fill up at different times forget at different times: those of one length go together.
    groups = [[row for row, prompt in enumerate(prompts) if len(prompt) == length] for length in lengths]
    streams = [
        _generate(config, params, [prompts[i] for i in rows], max_new_tokens, sampling, [seeds[i] for i in rows], None)
        for rows in groups
    ]
    order = np.argsort(np.concatenate(groups))
    for columns in zip(*map(_one_by_one, streams), strict=True):
        yield Chunk(*(np.concatenate(parts)[order] for parts in zip(*columns, strict=True)))


def _generate(
    config: ModelConfig,
    params: Any,
    rows: list[Ids],
    max_new_tokens: int,
    sampling: Sampling,
    seeds: list[int],
    memory: Memory | None,
) -> Iterator[Chunk]:
    temperature, rules = (
        jnp.float32(sampling.temperature),
        replace(sampling, temperature=1.0),
    )  # one compilation for all
    keys_B, block_size, n_new = jax.vmap(jax.random.key)(np.array(seeds, np.uint32)), config.block_size, 0
    seen_BV = seen(rows, config.padded_vocab_size) if rules.repetition_penalty != 1 else None
    rows = [np.asarray(row, np.int32)[-block_size:] for row in rows]
    size = _bucket(max(map(len, rows)) + max_new_tokens, block_size)
    while n_new < max_new_tokens:
        cache, logits_BV = _read(config, params, rows, size, memory)
        while (longest := max(map(len, rows))) <= block_size and n_new < max_new_tokens:
            position_B = jnp.array([len(row) for row in rows], jnp.int32)
            cache, logits_BV, seen_BV, *new = decode(
                config, params, cache, logits_BV, seen_BV, position_B, keys_B, jnp.int32(n_new), temperature, rules
            )
            # The token after a full block is still exact; those behind it were written over the block's last place.
            n_kept = min(CHUNK, block_size + 1 - longest, max_new_tokens - n_new)
            chunk, n_new = Chunk(*(np.asarray(values)[:, :n_kept] for values in new)), n_new + n_kept
            rows = [np.append(row, tokens) for row, tokens in zip(rows, chunk.tokens_BC, strict=True)]
            if memory is not None:
                memory.tokens, memory.cache = (
                    rows[0][: length_of(cache) - 1],
                    cache,
                )  # surplus went to the last place
            yield chunk
        rows = [row[-max(block_size // 2, 1) :] for row in rows]


def _read(
    config: ModelConfig, params: Any, rows: list[Ids], size: int, memory: Memory | None
) -> tuple[Cache, jax.Array]:
    """A cache of `size` places with these rows in it, and the logits of what follows them."""
    start, cache = 0, None
    if memory is not None and memory.cache is not None:
        known = min(len(memory.tokens), len(rows[0]) - 1)  # of the last token the logits are needed
        start = int(np.argmin(np.append(memory.tokens[:known] == rows[0][:known], False)))
        cache, memory.cache = memory.cache, None  # donated below
        size = max(size, length_of(cache))
        cache = widen(cache, size)
    lengths = [len(row) - start for row in rows]
    filled = min(_bucket(max(lengths), config.block_size), size - start)
    tokens_BT = np.zeros((len(rows), filled), np.int32)
    for tokens_T, row in zip(tokens_BT, rows, strict=True):
        tokens_T[: len(row) - start] = row[start:]
    offset_B = jnp.full(len(rows), start, jnp.int32)
    cache = cache or init_cache(config, params, len(rows), size)
    return prefill(config, params, cache, jnp.asarray(tokens_BT), offset_B, jnp.array(lengths, jnp.int32))


def _bucket(length: int, most: int) -> int:
    """The next power of two, at least 32 and at most `most`, so that few shapes are compiled."""
    return min(max(32, 1 << (length - 1).bit_length()), most)


def _keep_largest(logits_BV: jax.Array, weights_BV: jax.Array, needed: float) -> jax.Array:
    """The fewest of a row's largest logits that weigh `needed` together, the others -inf.

    The limit is found bit by bit, from the highest, among the integers that float32 numbers are in the same order: 32
    passes over the row, where a sort of 50,304 logits takes twenty times as long.
    """
    bits_BV = jax.lax.bitcast_convert_type(logits_BV, jnp.uint32)
    sign = np.uint32(1 << 31)
    ordered_BV = jnp.where(bits_BV >= sign, ~bits_BV, bits_BV | sign)

    def narrow(i: jax.Array, limit_B1: jax.Array) -> jax.Array:
        higher_B1 = limit_B1 | (sign >> i.astype(jnp.uint32))
        weight_B1 = jnp.sum(jnp.where(ordered_BV >= higher_B1, weights_BV, 0.0), axis=-1, keepdims=True)
        return jnp.where(weight_B1 >= needed, higher_B1, limit_B1)

    limit_B1 = jax.lax.fori_loop(0, 32, narrow, jnp.zeros((len(logits_BV), 1), jnp.uint32))
    return jnp.where(ordered_BV >= limit_B1, logits_BV, -jnp.inf)


def _keep(logits_BV: jax.Array, least_B1: jax.Array) -> jax.Array:
    return jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)


def _fold(keys_B: jax.Array, i: jax.Array) -> jax.Array:
    return jax.vmap(jax.random.fold_in, (0, None))(keys_B, i)


def seen(rows: Sequence[Ids], vocab_size: int) -> jax.Array:
    """Which tokens each row has: [B, V]."""
    seen_BV = np.zeros((len(rows), vocab_size), bool)
    for seen_V, row in zip(seen_BV, rows, strict=True):
        seen_V[row] = True
    return jnp.asarray(seen_BV)


def see(seen_BV: jax.Array | None, token_B: jax.Array) -> jax.Array | None:
    """These and one more in each row."""
    return None if seen_BV is None else seen_BV.at[jnp.arange(len(token_B)), token_B].set(True)


def _log_prob(logits_BV: jax.Array, token_B: jax.Array) -> jax.Array:
    return jnp.take_along_axis(jax.nn.log_softmax(logits_BV), token_B[:, None], axis=-1)[:, 0]


def _one_by_one(stream: Iterator[Chunk]) -> Iterator[Chunk]:
    for tokens_BC, log_probs_BC in stream:
        for i in range(tokens_BC.shape[1]):
            yield Chunk(tokens_BC[:, i : i + 1], log_probs_BC[:, i : i + 1])
