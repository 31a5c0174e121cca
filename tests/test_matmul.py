"""gptjax.matmul beside numpy, and what XLA makes of it on a CPU."""

import re
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import host
from gptjax import matmul as matmuls
from gptjax.config import ModelConfig
from gptjax.matmul import matmul
from gptjax.model import GPT, param_shapes
from gptjax.training import loss_sum


@pytest.fixture(params=[False, True], ids=["any layout", "row-major"])
def layout(request, monkeypatch):
    monkeypatch.setattr(matmuls, "multiplies_bfloat16", lambda: request.param)


SHAPES = [((5, 3), (3, 4)), ((2, 5, 3), (2, 3, 4)), ((2, 6, 5, 3), (2, 6, 3, 4))]


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_product_and_gradients(layout, shapes, dtype):
    rng = np.random.default_rng(0)
    # Small whole numbers: every product and every sum is exact in bfloat16.
    x, w, dy = (rng.integers(-2, 3, shape).astype(np.float32) for shape in (*shapes, (*shapes[0][:-1], shapes[1][-1])))
    y, gradients = jax.vjp(matmul, jnp.asarray(x, dtype), jnp.asarray(w, dtype))
    dx, dw = gradients(jnp.asarray(dy, dtype))
    for ours, exact in ((y, x @ w), (dx, dy @ w.swapaxes(-1, -2)), (dw, x.swapaxes(-1, -2) @ dy)):
        assert ours.dtype == dtype
        np.testing.assert_array_equal(np.asarray(ours, np.float32), exact)


def test_a_float32_result_of_bfloat16_is_not_rounded_and_its_gradients_are():
    x, w = jnp.full((1, 2), 1, jnp.bfloat16), jnp.array([[256], [1]], jnp.bfloat16)  # 257 is no bfloat16
    y, gradients = jax.vjp(lambda x, w: matmul(x, w, jnp.float32), x, w)
    assert y.dtype == jnp.float32 and y[0, 0] == 257
    assert [gradient.dtype for gradient in gradients(y)] == [jnp.bfloat16] * 2


def test_weights_that_are_frozen_have_no_gradient_and_keep_nothing():
    x, w = jnp.ones((5, 3)), jnp.ones((3, 4))
    _, pulled = jax.vjp(lambda x: matmul(x, w), x)
    assert [leaf.shape for leaf in jax.tree.leaves(pulled)] == [w.shape]
    _, pulled = jax.vjp(lambda w: matmul(x, w), w)
    assert [leaf.shape for leaf in jax.tree.leaves(pulled)] == [x.shape]
    unused = jax.grad(lambda x: jnp.sum(x) + jnp.sum(jax.lax.stop_gradient(matmul(x, w))))(x)
    np.testing.assert_array_equal(unused, np.ones((5, 3)))


def test_every_matmul_of_a_training_step_has_row_major_operands(monkeypatch):
    """In layers, attention and head, forward and backward: XLA on CPUs multiplies other layouts in float32."""
    monkeypatch.setattr(matmuls, "multiplies_bfloat16", lambda: True)
    config = ModelConfig(vocab_size=64, n_layer=1, n_head=2, n_kv_head=1, n_embd=64, block_size=32, dtype="bfloat16")
    config = replace(config, activation="swiglu", tied_head=False)
    params = param_shapes(config)
    gradient = jax.jit(jax.grad(lambda params, windows: loss_sum(GPT(config), params, windows)[0]))
    text = gradient.lower(params, jax.ShapeDtypeStruct((8, 33), jnp.int32)).compile().as_text()
    dots = [line for line in text.splitlines() if " dot(" in line]
    assert len(dots) > 25
    for line in dots:
        n = len(re.findall(r"\d", "".join(re.findall(r"lhs_batch_dims={(.*?)}", line))))
        assert f"lhs_contracting_dims={{{n + 1}}}" in line and f"rhs_contracting_dims={{{n}}}" in line, line


def test_bfloat16_is_for_cpus_that_multiply_it_and_a_jax_that_has_them_do_so(monkeypatch):
    def answer(flags, version):
        monkeypatch.setattr(Path, "read_text", lambda *arguments, **options: f"flags : fpu {flags} sse\n")
        monkeypatch.setattr(jax, "__version_info__", version)
        return host.multiplies_bfloat16.__wrapped__()

    assert answer("amx_bf16", (0, 12, 0)) and answer("avx512_bf16", (1, 0, 0))
    assert not answer("amx_bf16", (0, 11, 1)) and not answer("avx512f", (0, 12, 0))
