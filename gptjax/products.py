"""Products of matrices as a CPU multiplies them fastest, in their gradients too."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def multiply(x: Float[Array, "*J R D"], w: Float[Array, "*J D F"], dtype: Any = None) -> Float[Array, "*J R F"]:
    """x @ w of one dtype, added up in float32; the result in `dtype`, by default theirs.

    The gradients are products of the inputs' dtype too, whatever the result's is. On a CPU every matrix is first
    written by rows: XLA multiplies bfloat16 by what the CPU has for it only if both lie so, and else as float32.
    """

    def by_rows(x: jax.Array) -> jax.Array:
        return with_layout_constraint(x, Layout(tuple(range(x.ndim))))

    def on_cpu(x: jax.Array, w: jax.Array) -> jax.Array:
        return product(by_rows(x), by_rows(w)) if x.dtype == jnp.bfloat16 else product(x, w)

    product = partial(jnp.matmul, preferred_element_type=dtype)
    return jax.lax.platform_dependent(x, w, cpu=on_cpu, default=product)


def _forward(x: jax.Array, w: jax.Array, dtype: Any) -> Any:
    return multiply(x, w, dtype), (x, w)


def _backward(dtype: Any, kept: Any, dy: jax.Array) -> Any:
    x, w = kept
    dy = dy.astype(x.dtype)
    return multiply(dy, w.mT), multiply(x.mT, dy)


multiply.defvjp(_forward, _backward)
