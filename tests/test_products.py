"""gptjax.products beside numpy, and what XLA makes of it on a CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import products
from gptjax.products import multiply

SHAPES = [((5, 3), (3, 4)), ((2, 5, 3), (2, 3, 4)), ((2, 6, 5, 3), (2, 6, 3, 4))]


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_product_and_gradients(shapes, dtype):
    rng = np.random.default_rng(0)
    # Small whole numbers: every product and every sum is exact in bfloat16.
    x, w, dy = (rng.integers(-2, 3, shape).astype(np.float32) for shape in (*shapes, (*shapes[0][:-1], shapes[1][-1])))
    y, gradients = jax.vjp(multiply, jnp.asarray(x, dtype), jnp.asarray(w, dtype))
    dx, dw = gradients(jnp.asarray(dy, dtype))
    for ours, exact in ((y, x @ w), (dx, dy @ w.swapaxes(-1, -2)), (dw, x.swapaxes(-1, -2) @ dy)):
        assert ours.dtype == dtype
        np.testing.assert_array_equal(np.asarray(ours, np.float32), exact)


def test_a_float32_result_of_bfloat16_is_not_rounded_and_its_gradients_are():
    x, w = jnp.full((1, 2), 1, jnp.bfloat16), jnp.array([[256], [1]], jnp.bfloat16)  # 257 is no bfloat16
    y, gradients = jax.vjp(lambda x, w: multiply(x, w, jnp.float32), x, w)
    assert y.dtype == jnp.float32 and y[0, 0] == 257
    assert [gradient.dtype for gradient in gradients(y)] == [jnp.bfloat16] * 2


def test_a_cpu_that_multiplies_bfloat16_faster_does_so_by_rows(monkeypatch):
    """In the compiled gradient each of the two has the axis that is summed over where rows have it."""
    monkeypatch.setattr(products, "multiplies_bfloat16", lambda: True)
    x, w = jnp.ones((256, 64), jnp.bfloat16), jnp.ones((64, 128), jnp.bfloat16)
    gradients = jax.jit(jax.grad(lambda x, w: multiply(x, w).astype(jnp.float32).sum(), argnums=(0, 1)))
    lines = gradients.lower(x, w).compile().as_text().splitlines()
    dots = [line for line in lines if " dot(" in line]
    assert len(dots) == 2
    for line in dots:
        assert "lhs_contracting_dims={1}, rhs_contracting_dims={0}" in line and "{1,0}" in line.split(" dot(")[0]
