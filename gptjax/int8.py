"""Matrices of a byte a weight, for sampling: each output's weights are a multiple of its own float32 scale."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

PART = 1 << 20  # weights that are converted at a time on a CPU: as float32 they stay in its cache


class Int8(NamedTuple):
    """[outputs, inputs] in -127 to 127, and what each output's are multiplied by; both may have layers in front."""

    weights: jax.Array
    scale: jax.Array


def quantize(params: Any) -> Any:
    """Matrices, embedding and head as `Int8`; an output's largest weight becomes 127. All else stays as it is."""
    n_stacked = 0 if isinstance(params["layers"], tuple) else 1

    def convert(path: tuple[Any, ...], weights: jax.Array) -> Any:
        keys = [getattr(key, "key", None) for key in path]
        if keys[-1] in ("token_embedding", "head"):
            return _rounded(weights)
        if keys[-1] != "kernel":
            return weights
        layers, n_in = weights.shape[:n_stacked], 2 if keys[-2] == "out" else 1  # heads and their width
        inputs = math.prod(weights.shape[n_stacked : n_stacked + n_in])
        return _rounded(weights.reshape(*layers, inputs, -1).swapaxes(-1, -2))

    return jax.tree_util.tree_map_with_path(convert, params)


def _rounded(weights: jax.Array) -> Int8:
    weights = weights.astype(jnp.float32)
    scale = jnp.max(jnp.abs(weights), axis=-1) / 127
    scale = jnp.where(scale > 0, scale, 1.0)
    return Int8(jnp.round(weights / scale[..., None]).astype(jnp.int8), scale)


def rows(matrix: Int8, index_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Some of the outputs' weights, as embeddings are looked up."""
    return jnp.take(matrix.weights, index_BT, axis=0) * jnp.take(matrix.scale, index_BT, axis=0)[..., None]


def product(x: Float[Array, "*rows D"], matrix: Int8) -> Float[Array, "*rows F"]:
    """x @ weightsᵀ scale, in float32.

    On a CPU in parts, one after the other: of a whole matrix in one XLA would keep the converted weights, four times
    as many bytes, and read those for every token.
    """

    def whole(weights: jax.Array) -> jax.Array:
        return jnp.einsum("...D,FD->...F", x, weights.astype(x.dtype), preferred_element_type=jnp.float32)

    def in_parts(weights: jax.Array) -> jax.Array:
        n_out, n_in = weights.shape
        n = next(n for n in range(1, n_out + 1) if n_out % n == 0 and n_out // n * n_in <= PART)
        if n == 1:
            return whole(weights)
        parts = jax.lax.map(whole, weights.reshape(n, -1, n_in))
        return jnp.moveaxis(parts, 0, -2).reshape(*x.shape[:-1], n_out)

    product = jax.lax.platform_dependent(matrix.weights, cpu=in_parts, default=whole)
    return product * matrix.scale.reshape((1,) * (x.ndim - 1) + (-1,))
