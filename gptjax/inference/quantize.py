"""Convert weights to the forms of storage that sampling reads: transposed, and int8."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.matmul import Int8, Transposed
from gptjax.model import n_input_axes
from gptjax.sharding import path_name


def transpose(layer: Any) -> Any:
    """One layer's parameters with `Transposed` kernels; `Int8` kernels have that layout already."""

    def convert(path: tuple[Any, ...], leaf: Any) -> Any:
        is_kernel = not isinstance(leaf, Int8) and path[-1].key == "kernel"
        return Transposed(_transposed(path, leaf)) if is_kernel else leaf

    return jax.tree_util.tree_map_with_path(convert, layer, is_leaf=lambda leaf: isinstance(leaf, Int8))


def quantize(params: Any) -> Any:
    """Parameters with kernels, embedding and head as `Int8`: the largest weight of each output becomes 127 or -127."""

    def convert(path: tuple[Any, ...], weights: jax.Array) -> Any:
        if path[-1].key in ("token_embedding", "head"):
            return _rounded(weights)
        return _rounded(_transposed(path, weights, n_layer_axes=1)) if path[-1].key == "kernel" else weights

    return jax.tree_util.tree_map_with_path(convert, params)


def _transposed(path: tuple[Any, ...], kernel: jax.Array, n_layer_axes: int = 0) -> jax.Array:
    """A kernel as [outputs, inputs], with its layer axis, if any, in front."""
    layers, rest = kernel.shape[:n_layer_axes], kernel.shape[n_layer_axes:]
    n_in = math.prod(rest[: n_input_axes(path_name(path))])
    return kernel.reshape(*layers, n_in, -1).swapaxes(-1, -2)


def _rounded(weights: jax.Array) -> Int8:
    weights = weights.astype(jnp.float32)
    scale = jnp.max(jnp.abs(weights), axis=-1) / 127
    scale = jnp.where(scale > 0, scale, 1.0)
    return Int8(jnp.round(weights / scale[..., None]).astype(jnp.int8), scale)
