"""The slots of the server's batch on the device: one KV cache for all, and the programs that read and draw tokens.

Shape suffixes as in model.py: B counts slots, C the tokens that a call draws, A the alternatives to a token. A slot's
numbers depend on its own tokens alone: rows do not mix in the model, every program has the same shapes whatever is in
the other slots, and a prompt is read in the same chunks whether its beginning was found in the cache or not.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int32, UInt32

from gptjax.config import ModelConfig
from gptjax.inference.decoder import Cache, hidden, init_cache, length_of, logits, widen
from gptjax.inference.generate import draw_and_read, padded_length
from gptjax.inference.sampling import Sampling, TokenIds, log_probs_of
from gptjax.model import KVCache

PROMPT_CHUNK = 64  # tokens of a prompt that are read at once; a later prompt with the same chunks at first copies them
NARROWEST = 16  # a prompt's last chunk is padded to a power of two, at least to this
SHORTEST = 256  # tokens for which the cache has room at first
MOST_STEPS = 16  # tokens of each row that one call draws at most
ALTERNATIVES = 20  # the likeliest tokens that are reported with a drawn one, as many as OpenAI's API allows


class Drawn(NamedTuple):
    """The next tokens of each slot, their log-probabilities and the likeliest ones there, before any sampling rule."""

    tokens_BC: Int[np.ndarray, "B C"]
    log_probs_BC: Float[np.ndarray, "B C"]
    alternatives_BCA: Int[np.ndarray, "B C A"]
    alternative_log_probs_BCA: Float[np.ndarray, "B C A"]


class Slots:
    """The device's arrays: the cache, the logits of each slot's next token, and the tokens that its text contains."""

    def __init__(self, config: ModelConfig, params: Any, n_slots: int) -> None:
        self.config, self.params, self.n_slots = config, params, n_slots
        self.longest = -(-config.block_size // PROMPT_CHUNK) * PROMPT_CHUNK
        self._cache = init_cache(config, params, n_slots, min(SHORTEST, self.longest))
        self._logits_BV = jnp.zeros((n_slots, config.padded_vocab_size), jnp.float32)
        self._seen_BV = jnp.zeros((n_slots, config.padded_vocab_size), bool)

    @property
    def length(self) -> int:
        """The tokens of each slot for which the cache has room."""
        return length_of(self._cache)

    def fit(self, n_tokens: int) -> None:
        """Give each slot room for `n_tokens`, at least, and not for four times as many or more."""
        length, n_tokens = min(SHORTEST, self.longest), min(n_tokens, self.longest)
        while length < n_tokens:
            length = min(2 * length, self.longest)
        if length > self.length:
            self._cache = widen(self._cache, length)
        elif 4 * length <= self.length:
            self._cache = _narrow(self._cache, length)

    def read(self, slot: int, tokens: TokenIds, start: int, seen: Sequence[int]) -> None:
        """Read a chunk of a slot's text, at positions from `start` on. `seen` are the tokens of the whole text."""
        width = padded_length(len(tokens), PROMPT_CHUNK, NARROWEST)
        tokens_1T, seen_V = np.zeros((1, width), np.int32), np.zeros(self.config.padded_vocab_size, bool)
        tokens_1T[0, : len(tokens)] = tokens
        seen_V[np.asarray(seen, np.int32)] = True
        state = self._cache, self._logits_BV, self._seen_BV
        place = np.int32(slot), np.int32(start), np.int32(len(tokens))
        self._cache, self._logits_BV, self._seen_BV = _read(self.config, self.params, *state, tokens_1T, *place, seen_V)

    def copy(self, source: int, target: int) -> None:
        """Copy what the cache holds of one slot to another."""
        self._cache = _copy(self.config, self._cache, np.int32(source), np.int32(target))

    def draw(
        self,
        n_steps: int,
        positions: Sequence[int],
        seeds: Sequence[int],
        n_drawn: Sequence[int],
        sampling: Sampling,
        alternatives: bool,
    ) -> Drawn:
        """Draw `n_steps` tokens, at most MOST_STEPS, for every slot, the first for its position.

        A slot's token i is drawn with fold_in(key of its seed, i), as in `generate`. A slot without a text draws and
        writes as well: its position is one that is written before it is read, and its tokens mean nothing.
        """
        rows = np.array(positions, np.int32), np.array(seeds, np.uint32), np.array(n_drawn, np.int32)
        state = self._cache, self._logits_BV, self._seen_BV
        state, drawn = _draw(
            self.config, self.params, state, *rows, sampling, np.int32(n_steps), np.bool_(alternatives)
        )
        self._cache, self._logits_BV, self._seen_BV = state
        return Drawn(*(np.asarray(values)[:, :n_steps] for values in drawn))


@partial(jax.jit, static_argnames="config", donate_argnames=("cache", "logits_BV", "seen_BV"))
def _read(
    config: ModelConfig,
    params: Any,
    cache: Cache,
    logits_BV: Float[Array, "B V"],
    seen_BV: Bool[Array, "B V"],
    tokens_1T: Int32[Array, "1 T"],
    slot: Int[Array, ""],
    start: Int[Array, ""],
    length: Int[Array, ""],
    seen_V: Bool[Array, " V"],
) -> Any:
    own = _of_slot(config, cache, slot)
    x_1TD, own = hidden(config, params, tokens_1T, own, start[None])
    last_11D = jax.lax.dynamic_slice_in_dim(x_1TD, length - 1, 1, axis=1)
    logits_BV = jax.lax.dynamic_update_slice_in_dim(logits_BV, logits(config, params, last_11D)[0], slot, 0)
    seen_BV = jax.lax.dynamic_update_slice_in_dim(seen_BV, seen_V[None], slot, 0)
    return _with_slot(config, cache, own, slot), logits_BV, seen_BV


@partial(jax.jit, static_argnames="config", donate_argnames="cache")
def _copy(config: ModelConfig, cache: Cache, source: Int[Array, ""], target: Int[Array, ""]) -> Cache:
    return _with_slot(config, cache, _of_slot(config, cache, source), target)


def _of_slot(config: ModelConfig, cache: Cache, slot: jax.Array) -> Cache:
    """The K rows of one slot, in every layer's keys [..., J, S, H] and values [..., J, H, S]."""
    K = config.kv_heads
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, slot * K, K, x.ndim - 3), cache)


def _with_slot(config: ModelConfig, cache: Cache, own: Cache, slot: jax.Array) -> Cache:
    update = jax.lax.dynamic_update_slice_in_dim
    return jax.tree.map(lambda x, part: update(x, part, slot * config.kv_heads, x.ndim - 3), cache, own)


@partial(jax.jit, static_argnames="length")
def _narrow(cache: Cache, length: int) -> Cache:
    """The cache with the first `length` places of each slot."""

    def cut(part: KVCache) -> KVCache:
        return KVCache(part.keys[..., :length, :], part.values[..., :length])

    return jax.tree.map(cut, cache, is_leaf=lambda part: isinstance(part, KVCache))


@partial(jax.jit, static_argnames="config", donate_argnames="state")
def _draw(
    config: ModelConfig,
    params: Any,
    state: tuple[Cache, Float[Array, "B V"], Bool[Array, "B V"]],
    position_B: Int[Array, " B"],
    seed_B: UInt32[Array, " B"],
    n_drawn_B: Int[Array, " B"],
    sampling: Sampling,
    n_steps: Int[Array, ""],
    alternatives: Bool[Array, ""],
) -> Any:
    keys_B = jax.vmap(jax.random.key)(seed_B)
    B, A = len(seed_B), min(ALTERNATIVES, config.vocab_size)
    none = jnp.zeros((B, A), jnp.int32), jnp.zeros((B, A), jnp.float32)

    def likeliest(log_probs_BV: jax.Array) -> tuple[jax.Array, jax.Array]:
        log_probs_BA, ids_BA = jax.lax.top_k(log_probs_BV, A)
        return ids_BA, log_probs_BA

    def one_token(i: jax.Array, carry: Any) -> Any:
        (cache, logits_BV, seen_BV), drawn = carry
        rows = position_B + i, keys_B, n_drawn_B + i
        token_B, *after = draw_and_read(config, params, cache, logits_BV, seen_BV, *rows, sampling)
        most = jax.lax.cond(alternatives, likeliest, lambda _: none, jax.nn.log_softmax(logits_BV))
        new = token_B, log_probs_of(logits_BV, token_B), *most
        return tuple(after), tuple(x.at[:, i].set(y) for x, y in zip(drawn, new, strict=True))

    shapes = ((), jnp.int32), ((), jnp.float32), ((A,), jnp.int32), ((A,), jnp.float32)
    drawn = tuple(jnp.zeros((B, MOST_STEPS, *shape), dtype) for shape, dtype in shapes)
    return jax.lax.fori_loop(0, n_steps, one_token, (state, drawn))
