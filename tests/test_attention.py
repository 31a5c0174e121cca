"""The TPU's attention kernel, interpreted on the CPU, is plain causal attention, gradients too."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu import splash_attention

from gptjax import attention
from gptjax.attention import causal_attention, flash_attention


@pytest.mark.parametrize(("n_head", "n_kv_head", "length", "block"), [(2, 2, 128, 1024), (4, 2, 256, 128)])
def test_splash_attention_is_causal_attention(monkeypatch, n_head, n_kv_head, length, block):
    monkeypatch.setattr(attention, "SPLASH_BLOCK", block)
    rng = np.random.default_rng(0)
    shapes = [(2, length, heads, 64) for heads in (n_head, n_kv_head, n_kv_head, n_head)]
    q_BTNH, k_BTKH, v_BTKH, direction_BTNH = [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]

    def both(function):
        return jax.value_and_grad(lambda *qkv: jnp.sum(function(*qkv) * direction_BTNH), (0, 1, 2))

    position_bT = jnp.arange(length)[None]
    value, gradients = both(lambda *qkv: causal_attention(*qkv, position_bT))(q_BTNH, k_BTKH, v_BTKH)
    monkeypatch.setattr(splash_attention, "make_splash_mha", partial(splash_attention.make_splash_mha, interpret=True))
    kernel = jax.jit(both(lambda *qkv: flash_attention(*qkv, "splash")))(q_BTNH, k_BTKH, v_BTKH)
    # Sums of hundreds of float32 terms of order 1, in another order and rescaled block by block.
    np.testing.assert_allclose(kernel[0], value, rtol=1e-4)
    for ours, theirs in zip(kernel[1], gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-4)
