"""Text from a model: one prefill of the prompt, then lax.scan over a KV cache; shape suffixes as in model.py."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gptjax.config import ModelConfig
from gptjax.model import GPT, KVCache, init_cache

CHUNK = 16  # tokens decoded in one call: often enough for a person who reads along, seldom enough to be fast


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from logits, and what the model still sees once block_size is full.

    context "refill" then reads the last block_size / 2 tokens again and goes on with the cache; "exact" reads the
    last block_size tokens again for every single token, at positions from 0, as nanoGPT does.
    """

    temperature: float = 1.0
    top_k: int = 0
    context: Literal["refill", "exact"] = "refill"


def sample_token(logits_BV: Float[Array, "B V"], key: jax.Array, temperature: Any, top_k: int) -> Int[Array, " B"]:
    """A token drawn from softmax(logits / temperature) over the top_k likeliest (0: all); the likeliest at 0."""
    greedy_B = jnp.argmax(logits_BV, axis=-1)
    if 0 < top_k < logits_BV.shape[-1]:
        least_B1 = jax.lax.top_k(logits_BV, top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    drawn_B = jax.random.categorical(key, logits_BV / jnp.maximum(temperature, 1e-6))
    return jnp.where(temperature > 0, drawn_B, greedy_B).astype(jnp.int32)


@partial(jax.jit, static_argnames="config")
def prefill(
    config: ModelConfig, params: Any, tokens_BT: Int[Array, "B T"], length: Int[Array, ""]
) -> tuple[KVCache, Float[Array, "B V"]]:
    """Read the first `length` tokens of each row: the cache after them, and the logits of what follows.

    What stands behind `length` only fills the row, so that one compilation serves many lengths: the causal mask
    hides its keys until decoding overwrites them.
    """
    hidden, logits = _parts(config, params)
    x_BTD, cache = hidden(tokens_BT, init_cache(config, tokens_BT.shape[0], config.block_size))
    return cache, logits(jax.lax.dynamic_slice_in_dim(x_BTD, length - 1, 1, axis=1))[:, 0]


@partial(jax.jit, static_argnames=("config", "top_k"), donate_argnames="cache")
def decode(
    config: ModelConfig,
    params: Any,
    cache: KVCache,
    logits_BV: Float[Array, "B V"],
    position: Int[Array, ""],
    key: jax.Array,
    temperature: Float[Array, ""],
    top_k: int,
) -> tuple[KVCache, Float[Array, "B V"], Int[Array, "B C"]]:
    """CHUNK tokens, the first drawn from `logits_BV` and put at `position`, the i-th with fold_in(key, i)."""
    hidden, logits = _parts(config, params)

    def one_token(carry: Any, i: jax.Array) -> Any:
        cache, logits_BV = carry
        token_B = sample_token(logits_BV, jax.random.fold_in(key, i), temperature, top_k)
        x_B1D, cache = hidden(token_B[:, None], cache, position + i)
        return (cache, logits(x_B1D)[:, 0]), token_B

    (cache, logits_BV), tokens_CB = jax.lax.scan(one_token, (cache, logits_BV), jnp.arange(CHUNK))
    return cache, logits_BV, tokens_CB.T


@partial(jax.jit, static_argnames=("config", "top_k"))
def decode_exact(
    config: ModelConfig,
    params: Any,
    tokens_BT: Int[Array, "B T"],
    key: jax.Array,
    temperature: Float[Array, ""],
    top_k: int,
) -> tuple[Int[Array, "B T"], Int[Array, "B C"]]:
    """CHUNK tokens, each after a full forward pass over the block_size tokens before it."""
    hidden, logits = _parts(config, params)

    def one_token(tokens_BT: jax.Array, i: jax.Array) -> Any:
        logits_BV = logits(hidden(tokens_BT)[0][:, -1:])[:, 0]
        token_B = sample_token(logits_BV, jax.random.fold_in(key, i), temperature, top_k)
        return jnp.concatenate([tokens_BT[:, 1:], token_B[:, None]], axis=1), token_B

    tokens_BT, tokens_CB = jax.lax.scan(one_token, tokens_BT, jnp.arange(CHUNK))
    return tokens_BT, tokens_CB.T


def generate(
    config: ModelConfig,
    params: Any,
    prompt_BP: Int[np.ndarray, "B P"],
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
) -> Iterator[Int[np.ndarray, "B C"]]:
    """The tokens that follow the prompts, a few at a time; of a prompt the last block_size tokens are read.

    The i-th new token is a function of (prompt, weights, sampling, seed, i): how many follow it changes nothing.
    """
    temperature, keys = jnp.float32(sampling.temperature), jax.random.key(seed)
    text_BT, n_new, chunk_index = np.asarray(prompt_BP, np.int32)[:, -config.block_size :], 0, 0
    while n_new < max_new_tokens:
        cache, logits_BV = prefill(config, params, _fill(text_BT, config.block_size), jnp.int32(text_BT.shape[1]))
        while text_BT.shape[1] <= config.block_size and n_new < max_new_tokens:
            position, key = jnp.int32(text_BT.shape[1]), jax.random.fold_in(keys, chunk_index)
            cache, logits_BV, new = decode(config, params, cache, logits_BV, position, key, temperature, sampling.top_k)
            # The token after a full block is still exact; those behind it were written over the block's last place.
            kept_BC = np.asarray(new)[:, : min(config.block_size + 1 - text_BT.shape[1], max_new_tokens - n_new)]
            text_BT, n_new, chunk_index = np.hstack([text_BT, kept_BC]), n_new + kept_BC.shape[1], chunk_index + 1
            yield kept_BC
        if sampling.context == "exact":
            break
        text_BT = text_BT[:, -max(config.block_size // 2, 1) :]
    window_BT = jnp.asarray(text_BT[:, -config.block_size :])
    while n_new < max_new_tokens:
        key, chunk_index = jax.random.fold_in(keys, chunk_index), chunk_index + 1
        window_BT, new = decode_exact(config, params, window_BT, key, temperature, sampling.top_k)
        kept_BC = np.asarray(new)[:, : max_new_tokens - n_new]
        n_new += kept_BC.shape[1]
        yield kept_BC


def _parts(config: ModelConfig, params: Any) -> tuple[Any, Any]:
    """The model's two halves with their weights: tokens (and cache, offset) to hidden states, and those to logits."""
    model, weights = GPT(config), {"params": params}
    return partial(model.apply, weights, method="hidden"), partial(model.apply, weights, method="logits")


def _fill(text_BT: np.ndarray, block_size: int) -> np.ndarray:
    """Rows filled up to a power of two (at least 32, at most block_size), so that few shapes are compiled."""
    length = min(max(32, 1 << (text_BT.shape[1] - 1).bit_length()), block_size)
    return np.pad(text_BT, ((0, 0), (0, length - text_BT.shape[1])))
