"""Matrices as sampling reads them: by outputs, each output's weights in a row, as they are or in int8."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Int8 weights that are converted at a time on a CPU, at most, of a large matrix and of one of less than twice PART: as
# float32 they stay in the cache that all cores share, or in that of one core, which works alone on a small matrix.
PART, SMALL_PART = 1 << 19, 1 << 15


class Transposed(NamedTuple):
    """[outputs, inputs]: what a CPU reads at the rate of its memory when it multiplies one row by it."""

    weights: jax.Array


class Int8(NamedTuple):
    """[outputs, inputs] in -127 to 127, and what each output's are multiplied by; both may have layers in front."""

    weights: jax.Array
    scale: jax.Array


MATRICES = (Transposed, Int8)


def transpose(layer: Any) -> Any:
    """One layer's parameters with `Transposed` kernels; what is `Int8` is so already."""

    def convert(path: tuple[Any, ...], leaf: Any) -> Any:
        is_kernel = not isinstance(leaf, Int8) and path[-1].key == "kernel"
        return Transposed(by_outputs(path, leaf)) if is_kernel else leaf

    return jax.tree_util.tree_map_with_path(convert, layer, is_leaf=lambda leaf: isinstance(leaf, Int8))


def by_outputs(path: tuple[Any, ...], kernel: jax.Array, n_layers: int = 0) -> jax.Array:
    """A kernel of the model as [outputs, inputs], behind so many axes of layers."""
    layers, n_in = kernel.shape[:n_layers], 2 if path[-2].key == "out" else 1  # heads and their width
    inputs = math.prod(kernel.shape[n_layers : n_layers + n_in])
    return kernel.reshape(*layers, inputs, -1).swapaxes(-1, -2)


def quantize(params: Any) -> Any:
    """Matrices, embedding and head as `Int8`; an output's largest weight becomes 127. All else stays as it is."""

    def convert(path: tuple[Any, ...], weights: jax.Array) -> Any:
        if path[-1].key in ("token_embedding", "head"):
            return _rounded(weights)
        return _rounded(by_outputs(path, weights, n_layers=1)) if path[-1].key == "kernel" else weights

    return jax.tree_util.tree_map_with_path(convert, params)


def _rounded(weights: jax.Array) -> Int8:
    weights = weights.astype(jnp.float32)
    scale = jnp.max(jnp.abs(weights), axis=-1) / 127
    scale = jnp.where(scale > 0, scale, 1.0)
    return Int8(jnp.round(weights / scale[..., None]).astype(jnp.int8), scale)


def rows(matrix: Int8, index_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Some of the outputs' weights, as embeddings are looked up."""
    return jnp.take(matrix.weights, index_BT, axis=0) * jnp.take(matrix.scale, index_BT, axis=0)[..., None]


def product(x: Float[Array, "*rows D"], matrix: Transposed | Int8) -> Float[Array, "*rows F"]:
    """x @ weightsᵀ, of `Int8` times its scale, in float32.

    Int8 on a CPU in parts, one after the other: of a whole matrix in one XLA would keep the converted weights, four
    times as many bytes, and read those for every token.
    """

    def whole(weights: jax.Array) -> jax.Array:
        return jnp.einsum("...D,FD->...F", x, weights.astype(x.dtype), preferred_element_type=jnp.float32)

    def in_parts(weights: jax.Array) -> jax.Array:
        n_out, n_in = weights.shape
        most = PART if weights.size >= 2 * PART else SMALL_PART
        n = next(n for n in range(1, n_out + 1) if n_out % n == 0 and n_out // n * n_in <= most or n == n_out)
        if n == 1:
            return whole(weights)
        parts = jax.lax.map(whole, weights.reshape(n, -1, n_in))
        return jnp.moveaxis(parts, 0, -2).reshape(*x.shape[:-1], n_out)

    if isinstance(matrix, Transposed):
        return whole(matrix.weights)
    product = jax.lax.platform_dependent(matrix.weights, cpu=in_parts, default=whole)
    return product * matrix.scale.reshape((1,) * (x.ndim - 1) + (-1,))
