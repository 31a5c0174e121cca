"""Products of matrices as a CPU multiplies them fastest, in their gradients too."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float

from gptjax.host import multiplies_bfloat16


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def multiply(x: Float[Array, "*J R D"], w: Float[Array, "*J D F"], dtype: Any = None) -> Float[Array, "*J R F"]:
    """x @ w of one dtype, added up in float32; the result in `dtype`, by default theirs.

    The gradients are products of the inputs' dtype too, whatever the result's is. On a CPU that multiplies bfloat16
    faster than float32 each matrix of it is first written by rows: XLA multiplies all others as float32.
    """
    product = partial(jnp.matmul, preferred_element_type=dtype)
    if x.dtype != jnp.bfloat16 or not multiplies_bfloat16():
        return product(x, w)

    def by_rows(x: jax.Array) -> jax.Array:
        return with_layout_constraint(x, Layout(tuple(range(x.ndim))))

    return jax.lax.platform_dependent(x, w, cpu=lambda x, w: product(by_rows(x), by_rows(w)), default=product)


def _forward(x: jax.Array, w: jax.Array, dtype: Any) -> Any:
    return multiply(x, w, dtype), (x, w)


def _backward(dtype: Any, kept: Any, dy: jax.Array) -> Any:
    x, w = kept
    dy = dy.astype(x.dtype)
    return multiply(dy, w.mT), multiply(x.mT, dy)


multiply.defvjp(_forward, _backward)
