"""Text generation: one prefill of the prompts, then lax.scan over a KV cache. Shape suffixes as in model.py."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from gptjax.config import ModelConfig
from gptjax.inference.decoder import Cache, hidden, init_cache, length_of, logits, widen
from gptjax.inference.sampling import Sampling, TokenIds, log_probs_of, mark_seen, sample_token, seen_tokens

CHUNK = 10  # tokens that one call decodes: few enough for a reader to see the text grow


class Chunk(NamedTuple):
    """The next few tokens of each row, and the model's log-probabilities of them (nats), before any sampling rule."""

    tokens_BC: Int[np.ndarray, "B C"]
    log_probs_BC: Float[np.ndarray, "B C"]


@dataclass
class PrefixCache:
    """A conversation's KV cache and the tokens in it, kept between calls of `generate`, which read only what is new."""

    tokens: TokenIds = field(default_factory=lambda: np.zeros(0, np.int32))
    cache: Cache | None = None

    def take(self, config: ModelConfig, params: Any, rows: Sequence[TokenIds], size: int) -> tuple[Cache, int]:
        """A cache of at least `size` places, and how many of the rows' first tokens it holds."""
        cache, self.cache = self.cache, None  # what is read next is written into its buffers
        if cache is None:
            return init_cache(config, params, len(rows), size), 0
        n = min(len(self.tokens), len(rows[0]) - 1)  # the last token is read again, for its logits
        n_shared = int(np.argmin(np.append(self.tokens[:n] == rows[0][:n], False)))
        return widen(cache, size), n_shared


@partial(jax.jit, static_argnames="config", donate_argnames="cache")
def prefill(
    config: ModelConfig,
    params: Any,
    cache: Cache,
    tokens_BT: Int[Array, "B T"],
    offset_B: Int[Array, " B"],
    length_B: Int[Array, " B"],
) -> tuple[Cache, Float[Array, "B V"]]:
    """Read the first `length` tokens of each row, at positions from its offset on.

    Returns the cache, and the logits of the token that follows each row. Tokens after `length` are padding: the causal
    mask hides their keys until decoding overwrites them.
    """
    x_BTD, cache = hidden(config, params, tokens_BT, cache, offset_B)
    return cache, logits(config, params, jnp.take_along_axis(x_BTD, length_B[:, None, None] - 1, axis=1))[:, 0]


def read(
    config: ModelConfig, params: Any, cache: Cache, rows: Sequence[TokenIds], start: int = 0
) -> tuple[Cache, Float[Array, "B V"]]:
    """`prefill` with each row's tokens from `start` on, padded to one of a few widths."""
    lengths = [len(row) - start for row in rows]
    width = min(padded_length(max(lengths), config.block_size), length_of(cache) - start)
    tokens_BT = np.stack([np.pad(row[start:], (0, width - n)) for row, n in zip(rows, lengths, strict=True)])
    offset_B = jnp.full(len(rows), start, jnp.int32)
    return prefill(config, params, cache, jnp.asarray(tokens_BT), offset_B, jnp.array(lengths, jnp.int32))


def padded_length(length: int, most: int, least: int = 32) -> int:
    """The next power of two, at least `least` and at most `most`: few lengths are few compilations."""
    return min(max(least, 1 << (length - 1).bit_length()), most)


def draw_and_read(
    config: ModelConfig,
    params: Any,
    cache: Cache,
    logits_BV: Float[Array, "B V"],
    seen_BV: Bool[Array, "B V"] | None,
    position_B: Int[Array, " B"],
    keys_B: Key[Array, " B"],
    n_drawn_B: Int[Array, " B"],
    sampling: Sampling,
) -> Any:
    """Draw one token for each row and read it, at `position_B`; a row's token i is drawn with fold_in(key, i).

    Returns the tokens [B], the cache, the logits of the next token and the seen tokens.
    """
    token_B = sample_token(logits_BV, seen_BV, jax.vmap(jax.random.fold_in)(keys_B, n_drawn_B), sampling)
    x_B1D, cache = hidden(config, params, token_B[:, None], cache, position_B)
    return token_B, cache, logits(config, params, x_B1D)[:, 0], mark_seen(seen_BV, token_B)


@partial(jax.jit, static_argnames="config", donate_argnames=("cache", "seen_BV"))
def decode(
    config: ModelConfig,
    params: Any,
    cache: Cache,
    logits_BV: Float[Array, "B V"],
    seen_BV: Bool[Array, "B V"] | None,
    position_B: Int[Array, " B"],
    keys_B: Key[Array, " B"],
    n_drawn: Int[Array, ""],
    sampling: Sampling,
) -> Any:
    """Draw CHUNK tokens for each row, the first from `logits_BV` and for `position_B`.

    Token i of a row is drawn with fold_in(key, i), where `n_drawn` tokens have been drawn before. Returns the cache,
    the logits of the next token, the seen tokens, the new tokens [B, C] and their log-probabilities [B, C].
    """

    def one_token(carry: Any, i: jax.Array) -> Any:
        cache, logits_BV, seen_BV = carry
        rows = position_B + i, keys_B, jnp.full_like(position_B, n_drawn + i)
        token_B, *after = draw_and_read(config, params, cache, logits_BV, seen_BV, *rows, sampling)
        return tuple(after), (token_B, log_probs_of(logits_BV, token_B))

    carry, (tokens_CB, log_probs_CB) = jax.lax.scan(one_token, (cache, logits_BV, seen_BV), jnp.arange(CHUNK))
    return *carry, tokens_CB.T, log_probs_CB.T


def generate(
    config: ModelConfig,
    params: Any,
    prompts: Sequence[TokenIds],
    max_new_tokens: int,
    sampling: Sampling,
    seeds: Sequence[int],
    prefix: PrefixCache | None = None,
) -> Iterator[Chunk]:
    """Yield the tokens that follow each prompt, a few at a time. Only a prompt's last block_size tokens are read.

    A row that has outgrown the block is cut to half a block, which is read again. Token i of a row depends on (prompt,
    weights, sampling, seed, i) alone, not on the other rows or on max_new_tokens. A prefix cache is for one prompt.
    """
    block_size, keys_B = config.block_size, jax.vmap(jax.random.key)(np.array(seeds, np.uint32))
    texts = [np.asarray(prompt, np.int32) for prompt in prompts]
    lengths = [min(len(text), block_size) for text in texts]  # how many of a text's last tokens are in the cache
    size, cache, n_drawn = padded_length(max(lengths) + max_new_tokens, block_size), None, 0
    while n_drawn < max_new_tokens:
        if cache is None:
            rows = [text[-n:] for text, n in zip(texts, lengths, strict=True)]
            cache, n_cached = (prefix or PrefixCache()).take(config, params, rows, size)
            cache, logits_BV = read(config, params, cache, rows, n_cached)
            seen_BV = seen_tokens(sampling, texts, config.padded_vocab_size)
        cache, logits_BV, seen_BV, *new = decode(
            config, params, cache, logits_BV, seen_BV, jnp.array(lengths), keys_B, jnp.int32(n_drawn), sampling
        )
        # A row that fills the block gets one token more. Those after it are dropped: their keys share the last place.
        n_kept = min(CHUNK, block_size + 1 - max(lengths), max_new_tokens - n_drawn)
        chunk = Chunk(*(np.asarray(values)[:, :n_kept] for values in new))
        texts = [np.append(text, tokens) for text, tokens in zip(texts, chunk.tokens_BC, strict=True)]
        lengths, n_drawn = [n + n_kept for n in lengths], n_drawn + n_kept
        if prefix is not None:
            prefix.tokens, prefix.cache = texts[0][-lengths[0] :][: length_of(cache) - 1], cache
        yield chunk
        if max(lengths) > block_size:
            lengths, cache = [n if n <= block_size else max(block_size // 2, 1) for n in lengths], None
