"""Products of matrices as a CPU multiplies them fastest, in their gradients too."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float

from gptjax.host import multiplies_bfloat16


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def multiply(
    x: Float[Array, "*batch R D"], w: Float[Array, "*batch D F"], dtype: Any = None
) -> Float[Array, "*batch R F"]:
    """x @ w, rows by a matrix, of one dtype, added up in float32; the result in `dtype`, by default theirs.

    The gradients are products of the inputs' dtype too, whatever the result's is. On a CPU that multiplies bfloat16
    faster than float32 each matrix of it is first written by rows: XLA multiplies all others as float32.
    """
    product = partial(jnp.matmul, preferred_element_type=dtype)
    if x.dtype != jnp.bfloat16 or not multiplies_bfloat16():
        return product(x, w)

    def by_rows(x: jax.Array) -> jax.Array:
        return with_layout_constraint(x, Layout(tuple(range(x.ndim))))

    return jax.lax.platform_dependent(x, w, cpu=lambda x, w: product(by_rows(x), by_rows(w)), default=product)


def _forward(x: Any, w: Any, dtype: Any) -> Any:
    """Keeps what a gradient that is wanted needs: frozen weights have none."""
    kept = x.value if w.perturbed else None, w.value if x.perturbed else None
    return multiply(x.value, w.value, dtype), kept


def _backward(dtype: Any, kept: Any, dy: Any) -> Any:
    x, w = kept
    if isinstance(dy, SymbolicZero):
        return None, None
    dy = dy.astype(w.dtype if x is None else x.dtype)
    return None if w is None else multiply(dy, w.mT), None if x is None else multiply(x.mT, dy)


multiply.defvjp(_forward, _backward, symbolic_zeros=True)
