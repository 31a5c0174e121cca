"""The sampling rules: how a token is drawn from logits. Shape suffixes as in model.py."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

TokenIds = Int[np.ndarray, " _"]


@dataclass(frozen=True)
class Sampling:
    """The rules of sampling, which apply in this order. The defaults change nothing.

    1. repetition_penalty: a token of the text so far has its logit divided by the penalty if positive, and multiplied
       by it if negative ("CTRL", section 4.1).
    2. temperature: divides the logits. At 0 the likeliest token is drawn.
    3. top_k: the k largest logits stay; 0 keeps all.
    4. top_p: the fewest likeliest tokens stay whose probabilities add up to top_p ("The Curious Case of Neural Text
       Degeneration", section 3.1).
    5. min_p: the tokens stay whose probability is at least min_p times that of the likeliest.

    A rule is a number for all rows or an array [B] with a number for each. For jit, the temperature and arrays are
    arguments, and other numbers are static.
    """

    repetition_penalty: float | Float[Array, " B"] = 1.0
    temperature: float | Float[Array, ""] | Float[Array, " B"] = 1.0
    top_k: int | Int[Array, " B"] = 0
    top_p: float | Float[Array, " B"] = 1.0
    min_p: float | Float[Array, " B"] = 0.0

    @staticmethod
    def of_rows(rows: Sequence["Sampling"]) -> "Sampling":
        """The rules of several rows as arrays, for one program that serves any of them."""
        kinds = {field.name: np.int32 if field.name == "top_k" else np.float32 for field in fields(Sampling)}
        arrays = {name: np.array([getattr(row, name) for row in rows], kind) for name, kind in kinds.items()}
        return Sampling(**{name: jnp.asarray(array) for name, array in arrays.items()})


def _flatten(sampling: Sampling) -> tuple[list[Any], Any]:
    values = vars(sampling)
    static = {name: v for name, v in values.items() if name != "temperature" and isinstance(v, int | float)}
    return [v for name, v in values.items() if name not in static], tuple(static.items())


def _unflatten(static: tuple[tuple[str, Any], ...], children: Sequence[Any]) -> Sampling:
    sampling, names = object.__new__(Sampling), [field.name for field in fields(Sampling)]
    rest = zip((name for name in names if name not in dict(static)), children, strict=True)
    values = dict(static) | dict(rest)
    for name in names:
        object.__setattr__(sampling, name, values[name])
    return sampling


jax.tree_util.register_pytree_node(Sampling, _flatten, _unflatten)


def apply_rules(
    logits_BV: Float[Array, "B V"], seen_BV: Bool[Array, "B V"] | None, sampling: Sampling
) -> Float[Array, "B V"]:
    """The logits that a token is drawn from: -inf where a rule excludes it. Ties at a limit all stay.

    `seen_BV` marks the tokens that the repetition penalty applies to.
    """
    penalty, temperature, top_k, top_p, min_p = (_column(getattr(sampling, field.name)) for field in fields(Sampling))
    if seen_BV is not None:
        penalized_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
        logits_BV = jnp.where(seen_BV, penalized_BV, logits_BV)
    logits_BV = logits_BV / jnp.maximum(temperature, 1e-6)

    def keep_top_k(x: jax.Array) -> jax.Array:
        return _keep_largest(x, jnp.ones_like(x), jnp.float32(top_k))

    def keep_top_p(x: jax.Array) -> jax.Array:
        return _keep_largest(x, jax.nn.softmax(x), jnp.maximum(top_p, 1e-30))

    def keep_min_p(x: jax.Array) -> jax.Array:
        log = jnp.log if jnp.ndim(min_p) else np.log
        return jnp.where(x < jnp.max(x, axis=-1, keepdims=True) + log(min_p), -jnp.inf, x)

    logits_BV = _where_on((top_k > 0) & (top_k < logits_BV.shape[-1]), keep_top_k, logits_BV)
    logits_BV = _where_on(top_p < 1, keep_top_p, logits_BV)
    return _where_on(min_p > 0, keep_min_p, logits_BV)


def _column(rule: Any) -> Any:
    """A number as it is, and an array [B] as [B, 1]."""
    return rule[:, None] if jnp.ndim(rule) else rule


def _where_on(on: Any, rule: Callable[[jax.Array], jax.Array], logits_BV: jax.Array) -> jax.Array:
    """The rule applied where it is on: for all rows or for none, or row by row, and then only if it is on for any."""
    if isinstance(on, bool):
        return rule(logits_BV) if on else logits_BV
    return jax.lax.cond(jnp.any(on), lambda x: jnp.where(on, rule(x), x), lambda x: x, logits_BV)


def sample_token(
    logits_BV: Float[Array, "B V"], seen_BV: Bool[Array, "B V"] | None, keys_B: Key[Array, " B"], sampling: Sampling
) -> Int[Array, " B"]:
    """One token for each row, drawn with that row's key by adding Gumbel noise to the logits."""
    logits_BV = apply_rules(logits_BV, seen_BV, sampling)
    noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, logits_BV.shape[1:]))(keys_B)
    noisy_BV = jnp.where(_column(sampling.temperature) > 0, logits_BV + noise_BV, logits_BV)
    # Not jnp.argmax: XLA fuses the noise into its reduction, which then is not vectorized on a CPU.
    return jax.lax.top_k(noisy_BV, 1)[1][:, 0]


def log_probs_of(logits: Float[Array, "*B V"], tokens: Int[Array, "*B"]) -> Float[Array, "*B"]:
    """The log-probability (nats) of each token."""
    return jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1)[..., 0]


def seen_tokens(sampling: Sampling, rows: Sequence[TokenIds], vocab_size: int) -> Bool[Array, "B V"] | None:
    """The tokens that each row contains, or None if there is no repetition penalty."""
    if sampling.repetition_penalty == 1:
        return None
    seen_BV = np.zeros((len(rows), vocab_size), bool)
    for seen_V, row in zip(seen_BV, rows, strict=True):
        seen_V[row] = True
    return jnp.asarray(seen_BV)


def mark_seen(seen_BV: Bool[Array, "B V"] | None, token_B: Int[Array, " B"]) -> Bool[Array, "B V"] | None:
    """`seen_BV` with one more token in each row."""
    return None if seen_BV is None else seen_BV.at[jnp.arange(len(token_B)), token_B].set(True)


def _keep_largest(logits_BV: jax.Array, weights_BV: jax.Array, needed: Any) -> jax.Array:
    """Each row with only its largest logits: the fewest whose weights add up to `needed`. The others are -inf.

    With weights of 1 that is top_k, with probabilities top_p. A search sets the digits of each row's threshold from the
    highest to the lowest, each to the largest with which the entries at or above the threshold still weigh enough. With
    three digits of one bit, entries 6, 5 and 1 of weight 1 and needed = 2:

        100 stays (6 and 5), 110 does not (only 6), 101 stays (6 and 5): the threshold is 5.

    32 passes over a row, with digits of one bit, take a CPU a fraction of the time that sorting it takes (measured:
    docs/performance.md). Elsewhere the launches of the passes take longest, so there are 4, with digits of 8 bits.
    """
    forms = {"cpu": partial(largest_by_digits, 1), "default": partial(largest_by_digits, 8)}
    return jax.lax.platform_dependent(logits_BV, weights_BV, needed, **forms)


def largest_by_digits(n_bits: int, logits_BV: jax.Array, weights_BV: jax.Array, needed: Any) -> jax.Array:
    """`_keep_largest` with digits of `n_bits` bits."""
    bits_BV = jax.lax.bitcast_convert_type(logits_BV, jnp.uint32)
    sign = np.uint32(1 << 31)
    ordered_BV = jnp.where(bits_BV >= sign, ~bits_BV, bits_BV | sign)  # unsigned integers in the order of the floats
    digit_1C1 = jnp.arange(1, 1 << n_bits, dtype=jnp.uint32)[None, :, None]

    def set_digit(i: jax.Array, threshold_B1: jax.Array) -> jax.Array:
        shift = (32 - n_bits * (i + 1)).astype(jnp.uint32)
        higher_BC1 = threshold_B1[:, None] | (digit_1C1 << shift)
        weight_BC = jnp.sum(jnp.where(ordered_BV[:, None] >= higher_BC1, weights_BV[:, None], 0.0), axis=-1)
        digit_B1 = jnp.sum(weight_BC >= needed, axis=-1, keepdims=True, dtype=jnp.uint32)
        return threshold_B1 | (digit_B1 << shift)

    start, n_digits = jnp.zeros((len(ordered_BV), 1), jnp.uint32), 32 // n_bits
    threshold_B1 = jax.lax.fori_loop(0, n_digits, set_digit, start, unroll=n_digits <= 4)
    return jnp.where(ordered_BV >= threshold_B1, logits_BV, -jnp.inf)
