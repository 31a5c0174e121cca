"""The forms of attention that never hold all scores are plain causal attention, gradients too, documents or not."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu import splash_attention

from gptjax import attention
from gptjax.attention import block_pairs, cached_attention, causal_attention, sequence_attention
from gptjax.errors import UserError


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(
    ("kind", "n_head", "n_kv_head", "length", "block", "window"),
    [
        ("splash", 2, 2, 128, 1024, 0),
        ("splash", 2, 2, 128, 1024, 50),
        pytest.param("splash", 4, 2, 256, 128, 0, marks=pytest.mark.slow),
        pytest.param("splash", 4, 2, 512, 128, 130, marks=pytest.mark.slow),
        ("blockwise", 4, 2, 100, 32, 0),
        ("blockwise", 4, 2, 100, 16, 33),  # a query of some blocks attends to three of them, of others to four
        ("blockwise", 4, 2, 100, 16, 1),
        ("blockwise", 4, 2, 64, 64, 0),
    ],
)
def test_sequence_attention_is_causal_attention(monkeypatch, kind, n_head, n_kv_head, length, block, window, documents):
    monkeypatch.setattr(attention, "SPLASH_BLOCK", block)
    monkeypatch.setattr(attention, "BLOCK", block)
    monkeypatch.setattr(splash_attention, "make_splash_mha", partial(splash_attention.make_splash_mha, interpret=True))
    rng = np.random.default_rng(0)
    shapes = [(2, length, heads, 64) for heads in (n_head, n_kv_head, n_kv_head, n_head)]
    q_BTNH, k_BTKH, v_BTKH, direction_BTNH = [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]
    document_BT = jnp.cumsum(jnp.asarray(rng.random((2, length)) < 0.05), axis=1) if documents else None

    def both(function):
        return jax.jit(jax.value_and_grad(lambda *qkv: jnp.sum(function(*qkv) * direction_BTNH), (0, 1, 2)))

    def plain(*qkv):
        return causal_attention(*qkv, document_BT=document_BT, window=window)

    def blocks(*qkv):
        return sequence_attention(kind, *qkv, document_BT, window)

    expected, found = [both(function)(q_BTNH, k_BTKH, v_BTKH) for function in (plain, blocks)]
    # Sums of hundreds of float32 terms of order 1, in another order and rescaled block by block.
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-4)
    for ours, theirs in zip(found[1], expected[1], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-4)


def test_a_window_leaves_the_last_keys_alone():
    q, k, v = [jnp.asarray(np.random.default_rng(i).standard_normal((1, 9, 1, 4)), jnp.float32) for i in range(3)]
    found = causal_attention(q, k, v, window=3)
    for t in range(9):
        last = slice(max(0, t - 2), t + 1)
        alone = causal_attention(q[:, last], k[:, last], v[:, last])[:, -1]
        np.testing.assert_allclose(found[:, t], alone, rtol=0, atol=1e-6)


def test_blocks_outside_of_the_window_are_not_computed():
    n_pairs = [len(block_pairs(8, 16, window)[0]) for window in (0, 1, 2, 17, 18, 128)]
    assert n_pairs == [36, 8, 15, 15, 21, 36]


@pytest.mark.parametrize("window", [0, 5])
def test_cached_attention_is_causal_attention_of_what_each_row_has_read(window):
    """Three queries a row behind different numbers of keys, what lies behind them being anything; heads in groups."""
    rng = np.random.default_rng(0)
    q, k, v = [jnp.asarray(rng.standard_normal((2, 12, heads, 8)), jnp.float32) for heads in (4, 2, 2)]
    offset_B = np.array([2, 6])
    keys_JSH = k.swapaxes(1, 2).reshape(4, 12, 8)
    values_JHS = jnp.moveaxis(v, 1, 3).reshape(4, 8, 12)
    position_BT = jnp.asarray(offset_B[:, None] + np.arange(3))
    new = jnp.stack([row[start : start + 3] for row, start in zip(q, offset_B, strict=True)])
    found = cached_attention(new, keys_JSH, values_JHS, position_BT, window)
    for row, start in enumerate(offset_B):
        one = slice(row, row + 1), slice(0, start + 3)
        np.testing.assert_allclose(
            found[one[0]], causal_attention(q[one], k[one], v[one], window=window)[:, start:], rtol=0, atol=1e-6
        )


def test_a_refused_kernel_names_the_way_out():
    x_BTNH = jnp.zeros((1, 128, 2, 64), jnp.bfloat16)  # on a CPU, where cuDNN is not
    with pytest.raises(UserError, match="^cuDNN refuses attention: .*--model.attention blockwise$"):
        sequence_attention("cudnn", x_BTNH, x_BTNH, x_BTNH)


def test_blockwise_attention_never_holds_all_scores():
    def largest(kind):
        shape = jax.ShapeDtypeStruct((1, 4096, 1, 8), jnp.float32)
        loss = jax.grad(lambda *qkv: jnp.sum(kind(*qkv)), (0, 1, 2))
        return jax.jit(loss).lower(shape, shape, shape).compile().memory_analysis().temp_size_in_bytes

    scores = 4 * 4096**2
    assert largest(causal_attention) > scores
    assert largest(partial(sequence_attention, "blockwise")) < scores / 4


def test_tokens_of_one_document_do_not_see_another():
    q, k, v = [jnp.asarray(np.random.default_rng(i).standard_normal((1, 6, 1, 4)), jnp.float32) for i in range(3)]
    document_BT = jnp.asarray([[0, 0, 1, 1, 1, 2]])
    whole = causal_attention(q, k, v, document_BT=document_BT)
    for start, end in ((0, 2), (2, 5), (5, 6)):
        alone = causal_attention(q[:, start:end], k[:, start:end], v[:, start:end])
        np.testing.assert_allclose(whole[:, start:end], alone, rtol=1e-6, atol=1e-6)
