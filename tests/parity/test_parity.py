"""gptjax computes what PyTorch computes: logits, loss, every gradient, ten optimizer steps, all in float32."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import Config, ModelConfig, OptimizerConfig, TrainConfig
from gptjax.model import GPT
from gptjax.optimizer import make_optimizer, make_schedule
from gptjax.training import TrainState, loss_sum, train_step

torch = pytest.importorskip("torch", reason="the reference is PyTorch; pip install 'gptjax[test]' brings it")

from reference import Reference, Trainer, as_tree, learning_rate, load  # noqa: E402

torch.set_num_threads(1)  # more would only wait for each other at this size

BASE = ModelConfig(vocab_size=61, block_size=16, n_layer=2, n_head=2, n_embd=24, bias=True, dtype="float32")
SHAPES = {
    "bias": (BASE, 16),
    "no bias": (replace(BASE, bias=False), 16),
    "padded vocabulary": (replace(BASE, vocab_size=1030), 16),
    "shorter than block_size": (replace(BASE, n_head=4, n_embd=16), 11),
    "one layer, one head": (replace(BASE, n_layer=1, n_head=1, n_embd=8), 16),
}


@pytest.fixture(scope="module", params=SHAPES.values(), ids=SHAPES)
def case(request, scramble):
    """A model, scrambled parameters, windows of tokens, and the reference with the same parameters."""
    config, length = request.param
    windows = np.random.default_rng(1).integers(0, config.vocab_size, (3, length + 1), np.int32)
    params = scramble(config)
    reference = Reference(config)
    load(reference, params)
    return config, params, windows, reference


def test_the_copied_parameters_come_back(case, assert_trees_close):
    config, params, _, reference = case
    assert_trees_close(as_tree(reference, lambda p: p), without_padding(params, config))


def test_logits(case):
    config, params, windows, reference = case
    logits = np.asarray(jax.jit(GPT(config).apply)({"params": params}, jnp.asarray(windows[:, :-1])))
    expected = reference(torch.from_numpy(windows[:, :-1]).long()).detach().numpy()
    # Logits are of order 1 (asserted), of which float32 resolves 1e-7; sums over up to 96 terms in another order, and
    # layers that pass their rounding on, leave 3e-6 as measured. LayerNorm's epsilon 1e-6 for 1e-5 would show 1e-4.
    assert 0.5 < expected.std() < 5
    np.testing.assert_allclose(logits[..., : config.vocab_size], expected, rtol=0, atol=1e-5)


def test_loss_and_every_gradient(case, assert_trees_close):
    config, params, windows, reference = case
    n_targets = windows[:, 1:].size

    def mean_loss(params):
        return loss_sum(GPT(config), params, jnp.asarray(windows))[0] / n_targets

    loss, grads = jax.jit(jax.value_and_grad(mean_loss))(params)
    expected = reference.loss(torch.from_numpy(windows).long())
    expected.backward()
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-6)  # a few units in the last place of float32
    # Sums of terms up to 1 with either sign, in another order: 4e-7 apart as measured. Each leaf has entries 100 times
    # the tolerance (asserted), but for the key bias: softmax does not see it, and its gradient is nothing but rounding.
    assert_trees_close(without_padding(grads, config), as_tree(reference, lambda p: p.grad), rtol=1e-5, atol=2e-6)
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        assert "['key']['bias']" in jax.tree_util.keystr(path) or np.abs(leaf).max() > 2e-4, path
    assert not np.asarray(grads["token_embedding"][config.vocab_size :]).any()


@pytest.mark.parametrize(
    ("grad_clip", "accumulate"),
    [
        pytest.param(0.25, 1, marks=pytest.mark.slow),
        (0.25, 4),
        pytest.param(100.0, 1, marks=pytest.mark.slow),
        pytest.param(100.0, 4, marks=pytest.mark.slow),
        (0.0, 1),
    ],
    ids=["clipped", "clipped-accumulated", "below the limit", "below the limit-accumulated", "no limit"],
)
def test_ten_steps_of_adamw(grad_clip, accumulate, scramble, assert_trees_close):
    model = replace(BASE, n_layer=1)
    optimizer = OptimizerConfig(
        learning_rate=3e-3,
        min_learning_rate=5e-4,
        warmup_steps=3,
        decay_steps=8,
        beta2=0.95,
        weight_decay=0.3,
        grad_clip=grad_clip,
    )
    config = Config(model=model, optimizer=optimizer, train=TrainConfig(max_steps=10, accumulate=accumulate))
    params = scramble(model)
    state = TrainState(jnp.int32(0), params, make_optimizer(optimizer, 10).init(params))
    reference = Reference(model)
    load(reference, params)
    trainer = Trainer(reference, optimizer, decay_steps=8)
    step = jax.jit(train_step, static_argnums=0)
    rng = np.random.default_rng(2)
    for _ in range(10):
        windows = rng.integers(0, model.vocab_size, (accumulate, 8 // accumulate, 17), np.int32)
        state, metrics = step(config, state, jnp.asarray(windows))
        loss, norm, rate = trainer.train(torch.from_numpy(windows).long())
        assert (norm > grad_clip) == (grad_clip < 1)
        # Float32 resolves 1e-7, and the parameters (below) are too near for their distance to show: 5e-7 as measured.
        np.testing.assert_allclose(metrics["train_loss"], loss, rtol=3e-6)
        np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=3e-6)
        np.testing.assert_allclose(metrics["learning_rate"], rate, rtol=1e-6)
    assert int(state.step) == 10
    # Ten steps move parameters by 1e-2. Adam divides a gradient by its own size, so rounding of 4e-7 (above) in an
    # entry of size g moves the parameter by learning_rate * 4e-7 / g a step: 1e-7 in most, 1e-5 in a rare entry with
    # g = 1e-4; 8e-7 as measured. The key bias, whose gradient is nothing but rounding, moves at random, by
    # learning_rate a step at most.
    actual, expected = state.params, as_tree(reference, lambda p: p)
    key_biases = [tree["layers"]["attention"]["key"].pop("bias") for tree in (actual, expected)]
    assert_trees_close(actual, expected, atol=1e-5)
    np.testing.assert_allclose(*key_biases, rtol=0, atol=2 * 10 * optimizer.learning_rate)


@pytest.mark.parametrize(("warmup_steps", "decay_steps"), [(0, None), (0, 5), (1, 9), (4, 12), (12, 12)])
def test_schedule(warmup_steps, decay_steps):
    optimizer = OptimizerConfig(warmup_steps=warmup_steps, decay_steps=decay_steps)
    schedule = make_schedule(optimizer, 15)
    end = max(decay_steps or 15, warmup_steps + 1)
    rates = [learning_rate(optimizer, step, end) for step in range(25)]
    np.testing.assert_allclose([float(schedule(step)) for step in range(25)], rates, rtol=1e-5)


def without_padding(tree, config):
    return {**tree, "token_embedding": tree["token_embedding"][: config.vocab_size]}
