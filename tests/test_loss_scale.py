"""float16 trains as float32 does: a scaled loss, an overflow that costs one update, a scale that is state."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import loss_scale
from gptjax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimizerConfig, TrainConfig
from gptjax.errors import UserError
from gptjax.loop import train
from gptjax.loss_scale import LEAST, MOST, PATIENCE, LossScale, is_overflow
from gptjax.reporting.metrics import Metrics
from gptjax.sharding import batch_sharding, make_mesh
from gptjax.training import compile_steps, gradient

MODEL = ModelConfig(vocab_size=128, block_size=16, n_layer=2, n_head=2, n_embd=32, bias=True, dtype="float16")
CONFIG = Config(
    model=MODEL,
    optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=5),
    train=TrainConfig(batch_size=8, max_steps=100),
    mesh=MeshConfig(data=1),
)
TEXT = np.frombuffer(
    b"To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer " * 9, np.uint8
)


def windows_of(step):
    starts = np.random.default_rng(step).integers(0, len(TEXT) - 17, 8)
    return np.stack([TEXT[i : i + 17] for i in starts]).astype(np.int32)[None]


def train_steps(config, n, state=None, start=0):
    """The states before and after each step, on the host, and each step's metrics."""
    mesh = make_mesh(config.mesh, config.train.batch_size)
    steps = compile_steps(config, mesh)
    state = steps.init() if state is None else state
    states, rows = [jax.device_get(state)], []
    for step in range(start, start + n):
        state, metrics = steps.train(state, jax.device_put(windows_of(step), batch_sharding(mesh)))
        states.append(jax.device_get(state))
        rows.append({name: float(value) for name, value in metrics.items()})
    return states, rows


def same(one, other):
    return jax.tree.all(jax.tree.map(np.array_equal, one, other))


@pytest.mark.parametrize(
    ("scale", "good_steps", "loss_finite", "gradient_finite", "expected"),
    [
        (8.0, 5, True, True, (8.0, 6)),
        (8.0, PATIENCE - 1, True, True, (16.0, 0)),
        (MOST, PATIENCE - 1, True, True, (MOST, 0)),
        (8.0, 5, True, False, (4.0, 0)),
        (LEAST, 5, True, False, (LEAST, 0)),
        (8.0, PATIENCE - 1, False, False, (8.0, PATIENCE - 1)),
    ],
)
def test_the_scale_of_the_next_step(scale, good_steps, loss_finite, gradient_finite, expected):
    state = LossScale(jnp.float32(scale), jnp.int32(good_steps))
    after = state.after(jnp.array(loss_finite), jnp.array(gradient_finite))
    assert tuple(map(float, after)) == expected
    assert [leaf.dtype for leaf in after] == [leaf.dtype for leaf in state]


@pytest.fixture(scope="module")
def gradients(scramble):
    """The loss and the gradient of a batch, flat, by dtype and scale."""
    params = jax.tree.map(lambda leaf: leaf / 4, scramble(MODEL))

    def compute(dtype, scale):
        config = replace(CONFIG, model=replace(MODEL, dtype=dtype))
        call = jax.jit(
            lambda scale: gradient(config, jax.random.key(0), params, jnp.asarray(windows_of(0)), scale=scale)
        )
        loss, grads = call(None if scale is None else jnp.float32(scale))
        return loss, np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(grads)])

    return compute


def test_a_power_of_two_changes_no_bit_in_float32(gradients):
    (loss, plain), (scaled_loss, scaled) = gradients("float32", None), gradients("float32", 2.0**16)
    assert loss == scaled_loss
    np.testing.assert_array_equal(scaled, plain)


def test_a_scale_keeps_small_gradients_that_float16_loses(gradients):
    """In sixteen thousand times as large a batch the gradient of each token is as much smaller."""
    exact = gradients("float32", None)[1]
    errors = [np.linalg.norm(gradients("float16", scale)[1] - exact) for scale in (2.0**-14, 2.0**10)]
    norm = np.linalg.norm(exact)
    assert errors[1] < 0.005 * norm < 0.05 * norm < errors[0]


def test_float16_trains_to_within_a_hundredth_of_float32s_loss(monkeypatch):
    """At each step, with a scale that does not overflow: a lost update costs a run as short as this more than that."""
    monkeypatch.setattr(loss_scale, "FIRST", 2.0**12)
    exact = losses_of(replace(CONFIG, model=replace(MODEL, dtype="float32")))
    assert exact[0] > 4.5 and exact[-1] < 2.1, "nothing is learned, so little is compared"
    np.testing.assert_allclose(losses_of(CONFIG), exact, rtol=0, atol=0.01)


def losses_of(config):
    return np.array([row["train_loss"] for row in train_steps(config, 60)[1]])


def test_an_overflow_changes_nothing_but_the_scale_and_the_run_goes_on(monkeypatch):
    monkeypatch.setattr(loss_scale, "FIRST", 2.0**40)
    states, rows = train_steps(CONFIG, 40)
    overflows = [not math.isfinite(row["grad_norm"]) for row in rows]
    n = overflows.index(False)
    assert 3 < n < 35 and not any(overflows[n : n + 5]) and all(math.isfinite(row["train_loss"]) for row in rows)
    for step in range(n):
        (optimizer, scale), (next_optimizer, next_scale) = (states[i].opt_state for i in (step, step + 1))
        assert same(states[step].params, states[step + 1].params) and same(optimizer, next_optimizer)
        assert next_scale.loss_scale == scale.loss_scale / 2 == 2.0 ** (39 - step) and next_scale.good_steps == 0
        assert rows[step]["loss_scale"] == scale.loss_scale
    assert not same(states[n].params, states[n + 1].params)
    assert states[n + 5].opt_state[1].good_steps == 5


@pytest.mark.slow
def test_devices_that_take_their_own_gradients_share_a_scale(monkeypatch):
    monkeypatch.setattr(loss_scale, "FIRST", 2.0**24)
    one, two = [train_steps(replace(CONFIG, mesh=MeshConfig(data=n)), 30)[1] for n in (1, 2)]
    np.testing.assert_allclose([row["train_loss"] for row in two], [row["train_loss"] for row in one], atol=0.01)


def test_a_resumed_run_is_bit_equal_with_its_scale(monkeypatch, tmp_path, state_of, capsys):
    monkeypatch.setattr(loss_scale, "FIRST", 2.0**34)
    (tmp_path / "text.txt").write_bytes(TEXT.tobytes() * 8)
    data = DataConfig(source=str(tmp_path / "text.txt"), dir=str(tmp_path / "data"))
    options = TrainConfig(batch_size=8, max_steps=24, max_skipped=2, save_interval=6, eval_interval=24)
    config = replace(CONFIG, data=data, train=options, model=replace(MODEL, vocab_size=0, n_layer=1))
    assert train(config, tmp_path / "whole", resume=False) == 0
    out = capsys.readouterr().out
    assert out.count("note: float16 overflowed at step") > 3, "more than train.max_skipped, which counts none of them"
    decay = replace(config.optimizer, decay_steps=24)
    for i, last in enumerate((6, 24)):
        part = replace(config, optimizer=decay, train=replace(options, max_steps=last))
        assert train(part, tmp_path / "parts", resume=i > 0) == 0
    (step, whole), (_, parts) = (state_of(tmp_path / name) for name in ("whole", "parts"))
    assert step == 24 and same(whole, parts)
    assert 1 < float(whole["opt_state"][1].loss_scale) < 2.0**31


def test_an_overflow_is_no_divergence_until_the_scale_is_least(tmp_path, capsys):
    config = replace(CONFIG, train=replace(CONFIG.train, max_skipped=1))
    with Metrics(tmp_path, config, 0, 0.0, flops=1.0, peak=1.0) as metrics:
        for step, scale in enumerate([8.0, 4.0, 2.0, 1.0, 1.0], 1):
            row = {"train_loss": 3.0, "grad_norm": math.inf, "learning_rate": 0.5, "loss_scale": scale}
            metrics.add(step, {name: jnp.float32(value) for name, value in row.items()})
        assert metrics.skipped == 1
        with pytest.raises(UserError, match="diverged: .* at step 5.* or start again with --model.dtype float32"):
            metrics.flush()
    out = capsys.readouterr().out
    assert out.count("its update is skipped, and the loss scale of") == 3
    assert "note: float16 overflowed at step 1: its update is skipped, and the loss scale of 8 halved" in out
    assert is_overflow(True, False, 2.0) and not is_overflow(False, False, 2.0) and not is_overflow(True, False, LEAST)
