"""Matmuls of activations by weights, whatever form the weights are stored in."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Int

from gptjax.host import multiplies_bfloat16
from gptjax.sharding import gathered

# Int8 weights that a CPU converts to float32 at a time, so that they stay in cache: at most INT8_PART of a large
# matrix, where all cores work together, and SMALL_INT8_PART of one below twice INT8_PART, where one core works alone.
INT8_PART, SMALL_INT8_PART = 1 << 19, 1 << 15


class Transposed(NamedTuple):
    """Weights stored [outputs, inputs]: a CPU multiplies one row of activations by them at its memory's speed."""

    weights: jax.Array


class Int8(NamedTuple):
    """Weights [outputs, inputs] as integers from -127 to 127, and a float32 scale for each output.

    Both may have a leading axis of layers.
    """

    weights: jax.Array
    scale: jax.Array


def prepared(weights: Any, name: str, dtype: Any = None) -> Any:
    """Weights ready for `linear` and `lookup`: an array is cast to `dtype` and gathered over the mesh's fsdp axis.

    `name` is the parameter's path, by which the sharding table knows it. Other forms of storage are used as they are.
    """
    if isinstance(weights, Transposed | Int8):
        return weights
    return gathered(weights if dtype is None else weights.astype(dtype), name)


def linear(x: Float[Array, "R D"], weights: Any) -> Float[Array, "R F"]:
    """x @ weights in x's dtype; an array of weights may have several axes of inputs or of outputs."""
    if isinstance(weights, Transposed):
        return linear_transposed(x, weights.weights).astype(x.dtype)
    if isinstance(weights, Int8):
        return linear_transposed(x, weights).astype(x.dtype)
    return matmul(x, weights.reshape(x.shape[1], -1))


def linear_transposed(x: Float[Array, "*rows D"], weights: Any) -> Float[Array, "*rows F"]:
    """x @ weightsᵀ in float32, for weights [F, D] as an array or as `Int8`."""
    if not isinstance(weights, Int8):
        return _linear_transposed(x, weights)
    integers, scale = weights
    # XLA on CPUs would convert a whole matrix to float32 in memory, four times as many bytes to read for every token.
    y = jax.lax.platform_dependent(x, integers, cpu=_linear_in_parts, default=_linear_transposed)
    return y * scale.reshape((1,) * (x.ndim - 1) + (-1,))


def _linear_transposed(x: jax.Array, weights: jax.Array) -> jax.Array:
    return jnp.einsum("...D,FD->...F", x, weights.astype(x.dtype), preferred_element_type=jnp.float32)


def _linear_in_parts(x: jax.Array, weights: jax.Array) -> jax.Array:
    """`_linear_transposed` for one part of the outputs after the other."""
    n_out, n_in = weights.shape
    most = INT8_PART if weights.size >= 2 * INT8_PART else SMALL_INT8_PART
    n_parts = next(n for n in range(1, n_out + 1) if n == n_out or (n_out % n == 0 and n_out // n * n_in <= most))
    if n_parts == 1:
        return _linear_transposed(x, weights)
    y_parts = jax.lax.map(partial(_linear_transposed, x), weights.reshape(n_parts, -1, n_in))
    return jnp.moveaxis(y_parts, 0, -2).reshape(*x.shape[:-1], n_out)


def lookup(table: Any, ids_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """The rows of an embedding table [V, D], as an array or as `Int8`."""
    if isinstance(table, Int8):
        return jnp.take(table.weights, ids_BT, axis=0) * jnp.take(table.scale, ids_BT, axis=0)[..., None]
    return jnp.take(table, ids_BT, axis=0)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(
    x: Float[Array, "*batch R D"], w: Float[Array, "*batch D F"], dtype: Any = None
) -> Float[Array, "*batch R F"]:
    """x @ w for operands of one dtype, accumulated in float32; the result has `dtype`, by default theirs.

    The gradients are matmuls in the operands' dtype, whatever the result's is. On CPUs with bfloat16 instructions the
    operands are made row-major first: XLA multiplies all other layouts as float32.
    """
    multiply = partial(jnp.matmul, preferred_element_type=dtype)
    if x.dtype != jnp.bfloat16 or not multiplies_bfloat16():
        return multiply(x, w)

    def row_major(x: jax.Array) -> jax.Array:
        return with_layout_constraint(x, Layout(tuple(range(x.ndim))))

    return jax.lax.platform_dependent(x, w, cpu=lambda x, w: multiply(row_major(x), row_major(w)), default=multiply)


def _forward(x: Any, w: Any, dtype: Any) -> Any:
    """Keeps an operand only where the other one's gradient is needed: frozen weights have none."""
    kept = x.value if w.perturbed else None, w.value if x.perturbed else None
    return matmul(x.value, w.value, dtype), kept


def _backward(dtype: Any, kept: Any, dy: Any) -> Any:
    x, w = kept
    if isinstance(dy, SymbolicZero):
        return None, None
    dy = dy.astype(w.dtype if x is None else x.dtype)
    return None if w is None else matmul(dy, w.mT), None if x is None else matmul(x.mT, dy)


matmul.defvjp(_forward, _backward, symbolic_zeros=True)
