"""The loss in pieces is the plain cross-entropy, gradients too, and never holds the logits of a whole batch."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gptjax import loss
from gptjax.config import MeshConfig
from gptjax.flops import Peak
from gptjax.loss import cross_entropy_sum, pieces_of
from gptjax.sharding import make_mesh

B, T, D, V, N_TOKENS = 3, 16, 8, 40, 37


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    targets_BT = rng.integers(0, N_TOKENS, (B, T))
    targets_BT[1, 9:] = -1
    x_BTD, head_VD = rng.standard_normal((B, T, D)), rng.standard_normal((V, D))
    return jnp.asarray(x_BTD, jnp.float32), jnp.asarray(head_VD, jnp.float32), jnp.asarray(targets_BT, jnp.int32)


@pytest.fixture(params=[False, True], ids=["whole", "parts"])
def by_parts(request, monkeypatch):
    """Whether the vocabulary is scored in parts, as on a TPU bound by memory; here by 16 of the 40 ids."""
    monkeypatch.setattr(loss, "is_bound_by_memory", lambda: request.param)
    monkeypatch.setattr(loss, "VOCABULARY_PART", 16)
    return request.param


def plain(x_BTD, head_VD, targets_BT, logit_cap=0.0):
    logits_BTV = x_BTD @ head_VD[:N_TOKENS].T
    if logit_cap:
        logits_BTV = logit_cap * jnp.tanh(logits_BTV / logit_cap)
    nats_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, jnp.maximum(targets_BT, 0))
    return jnp.sum(jnp.where(targets_BT >= 0, nats_BT, 0.0))


@pytest.mark.parametrize(("n_pieces", "logit_cap"), [(1, 0.0), (2, 0.0), (16, 0.0), (1, 3.0), (2, 1.5)])
@pytest.mark.usefixtures("by_parts")
def test_loss_and_gradients_are_the_plain_ones(inputs, n_pieces, logit_cap):
    x_BTD, head_VD, targets_BT = inputs

    def scaled(function, *weights):
        return 0.7 * function(*weights)  # a gradient from behind that is not 1

    ours = partial(scaled, lambda x, head: cross_entropy_sum(x, head, targets_BT, N_TOKENS, n_pieces, logit_cap))
    theirs = partial(scaled, lambda x, head: plain(x, head, targets_BT, logit_cap))
    value, gradients = jax.jit(jax.value_and_grad(ours, (0, 1)))(x_BTD, head_VD)
    expected, expected_gradients = jax.value_and_grad(theirs, (0, 1))(x_BTD, head_VD)
    # float32 sums of 41 terms of order 1, in another order.
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for ours_, theirs_ in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(ours_, theirs_, rtol=0, atol=1e-5)
    np.testing.assert_allclose(jax.jit(ours)(x_BTD, head_VD), expected, rtol=1e-5)


@pytest.mark.usefixtures("by_parts")
def test_a_vocabulary_in_parts_has_the_plain_gradients_too(inputs):
    """With a cap, on a mesh that splits rows and vocabulary; ids from N_TOKENS on are in its last part."""
    x_BTD, head_VD, targets_BT = [jnp.concatenate([each, each]) if i != 1 else each for i, each in enumerate(inputs)]
    ours = jax.value_and_grad(lambda x, head: cross_entropy_sum(x, head, targets_BT, N_TOKENS, 2, 2.0), (0, 1))
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=1, tensor=4), 6)):
        value, gradients = jax.block_until_ready(jax.jit(ours)(x_BTD, head_VD))
    expected, expected_gradients = jax.value_and_grad(plain, (0, 1))(x_BTD, head_VD, targets_BT, 2.0)
    np.testing.assert_allclose(value, expected, rtol=1e-5)  # as above
    for ours_, theirs_ in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(ours_, theirs_, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("by_parts")
def test_gradients_of_bfloat16_are_near_the_float32_ones(inputs):
    x_BTD, head_VD, targets_BT = inputs
    ours = jax.grad(lambda x, head: cross_entropy_sum(x, head, targets_BT, N_TOKENS, 2), (0, 1))
    narrow = ours(x_BTD.astype(jnp.bfloat16), head_VD.astype(jnp.bfloat16))
    for ours_, theirs_ in zip(narrow, jax.grad(plain, (0, 1))(x_BTD, head_VD, targets_BT), strict=True):
        assert ours_.dtype == jnp.bfloat16
        # Eight bits of mantissa in the inputs and in the result.
        assert np.linalg.norm(ours_.astype(jnp.float32) - theirs_) < 0.02 * np.linalg.norm(theirs_)


def test_logits_of_the_whole_batch_never_exist(inputs):
    def compiled(n_pieces):
        function = partial(cross_entropy_sum, vocab_size=N_TOKENS, n_pieces=n_pieces)
        return jax.jit(jax.grad(lambda x, head, targets: function(x, head, targets))).lower(*inputs).compile().as_text()

    whole = [f"f32[{B},{T},{V}]", f"f32[{B * T},{V}]"]
    assert any(shape in compiled(1) for shape in whole), "this test does not see logits"
    assert not any(shape in compiled(4) for shape in whole)


def test_parts_never_hold_the_logits_of_the_whole_vocabulary(inputs, by_parts):
    loss_and_gradients = jax.value_and_grad(lambda *arrays: cross_entropy_sum(*arrays, N_TOKENS, 1), (0, 1))
    text = str(jax.make_jaxpr(loss_and_gradients)(*inputs))
    assert (f"f32[{B * T},{V}]" in text) != by_parts
    assert (f"f32[{B * T},16]" in text) == by_parts


@pytest.mark.parametrize(
    ("platform", "kind", "expected"),
    [
        ("tpu", "TPU v6 lite", True),
        ("tpu", "TPU v5 lite", False),
        ("tpu", "TPU v9", False),
        ("gpu", "NVIDIA L4", False),
    ],
)
def test_logits_are_computed_twice_only_on_a_tpu_bound_by_memory(monkeypatch, platform, kind, expected):
    device = SimpleNamespace(platform=platform, device_kind=kind)
    monkeypatch.setattr(loss, "platform_in_use", lambda: platform)
    monkeypatch.setattr(loss, "mesh_in_use", lambda: SimpleNamespace(abstract_device=device))
    assert loss.is_bound_by_memory() == expected


def test_one_pass_over_the_logits_finds_what_two_passes_find():
    rng = np.random.default_rng(0)
    logits_BtV = jnp.asarray(30 * rng.standard_normal((2, 3, V)), jnp.float32)
    logits_BtV = logits_BtV.at[0, 0, 1:].set(loss.MASKED).at[0, 1, :].set(loss.MASKED)  # padding, in part and whole
    hit_BtV = jnp.arange(V)[None, None] == jnp.asarray(rng.integers(0, V, (2, 3, 1)))
    for found, expected in zip(
        *(jax.jit(each)(logits_BtV, hit_BtV) for each in (loss.one_pass, loss.two_passes)), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-5)  # float32 sums of 40 terms, in another order


def test_pieces_are_as_few_as_fit(monkeypatch):
    monkeypatch.setattr(loss, "PIECE_BYTES", 4 * 1000 * 64)  # 64 places of 1,000 logits
    assert [pieces_of(rows, 32, 1000) for rows in (1, 2, 4, 8, 64, 1000)] == [1, 1, 2, 4, 32, 32]
    assert pieces_of(64, 31, 1000) == 1, "an odd length is not split"
    memory = int(4 * 1000 * 16 / loss.PIECE_SHARE)  # of a device: 16 places of 1,000 logits are its share
    monkeypatch.setattr(loss, "device_peak", lambda kind: Peak(1.0, 1.0, memory))
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2), 4)):
        assert [pieces_of(rows, 32, 1000) for rows in (1, 2, 4, 8)] == [1, 1, 2, 4]
