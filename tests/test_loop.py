"""The loop: exact evaluation, best and latest, early stopping, divergence, resumption on other devices."""

import dataclasses
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import loop
from gptjax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimizerConfig, TrainConfig
from gptjax.data.prepare import load_dataset
from gptjax.distributed import StopSignal
from gptjax.errors import UserError
from gptjax.hub.init_from import open_pretrained
from gptjax.loop import Run, fit_to_data, train, validation_loss
from gptjax.model import GPT
from gptjax.reporting.report import read_metrics
from gptjax.run_dir import load_run
from gptjax.sharding import make_mesh
from gptjax.training import compile_steps, loss_sum

MODEL = ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, dtype="float32")
TRAIN = TrainConfig(max_steps=12, batch_size=8, eval_interval=4, save_interval=5, log_interval=3)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    words = np.random.default_rng(0).choice(["to", "be", "or", "not", "that", "is", "the", "question"], 3000)
    (folder / "text.txt").write_text(" ".join(words))
    return DataConfig(source=str(folder / "text.txt"), dir=str(folder / "data"))


def config_with(data, **sections):
    return Config(data=data, **{"model": MODEL, "train": TRAIN, **sections})


def with_train(config, **changes):
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))


def run_of(config):
    dataset = load_dataset(config.data)
    config = fit_to_data(config, dataset)
    mesh = make_mesh(config.mesh, config.train.micro_batch_size)
    return Run(config, None, dataset, mesh, compile_steps(config, mesh), None, None)


@pytest.fixture(scope="module")
def run(data):
    return run_of(config_with(data))


@pytest.fixture(scope="module")
def params(run):
    return run.steps.init().params


def test_the_whole_split_is_evaluated_exactly(run, params):
    """Against one pass over all windows by hand: each token after the first counts once."""
    ids = run.dataset.val.window(0, len(run.dataset.val)).astype(np.int32)
    nats, loss = 0.0, jax.jit(lambda params, window: loss_sum(GPT(run.config.model), params, window)[0])
    for start in range(0, len(ids) - 1, 16):
        window = jnp.asarray(ids[start : start + 17])[None]
        nats += float(loss(jax.device_get(params), window))
    assert len(ids) % 16 != 1 and -(-(len(ids) - 1) // 16) % 8  # the last window and the last batch are padded
    np.testing.assert_allclose(validation_loss(run, params), nats / (len(ids) - 1), rtol=1e-6)  # sums in another order


def test_a_part_of_the_split_is_spread_over_it_and_the_same_each_time(run, params):
    some = run._replace(config=with_train(run.config, eval_batches=3))
    assert validation_loss(some, params) == validation_loss(some, params) != validation_loss(run, params)
    np.testing.assert_allclose(validation_loss(some, params), validation_loss(run, params), rtol=0.05)


def test_an_evaluation_ends_between_two_batches_when_the_run_is_asked_to_stop(run, params, monkeypatch):
    answers = iter([0, 0, 15])
    monkeypatch.setattr(StopSignal, "agree", lambda self: next(answers))
    assert validation_loss(run, params, stop=StopSignal(run.mesh)) is None
    assert next(answers, None) is None, "it went on after it was asked to stop"


@pytest.mark.slow
def test_before_the_first_step_a_few_batches_are_enough(data, run, params, tmp_path, monkeypatch):
    """For random weights; given ones may fit one part of the split better, and are evaluated on all of it."""
    monkeypatch.setattr(loop, "FIRST_BATCHES", 2)
    config = with_train(config_with(data), max_steps=1)
    assert train(config, tmp_path / "run", resume=False) == 0
    first = read_metrics(tmp_path / "run" / "metrics.csv")["val_loss"][0]
    np.testing.assert_allclose(first, validation_loss(run, params, n_batches=2), rtol=1e-6)
    assert validation_loss(run, params) != validation_loss(run, params, n_batches=2)
    weights = open_pretrained(str(tmp_path / "run"))
    tuned = weights.adapt(replace(config, init_from=str(tmp_path / "run")))
    assert train(tuned, tmp_path / "tuned", resume=False, weights=weights) == 0
    first = read_metrics(tmp_path / "tuned" / "metrics.csv")["val_loss"][0]
    best = jax.device_put(load_run(tmp_path / "run", "best")[1], run.steps.state.step.sharding)
    np.testing.assert_allclose(first, validation_loss(run, best), rtol=1e-5)


def test_best_and_latest_are_both_kept_and_an_overfitting_run_can_stop_early(data, run, tmp_path, capsys):
    """At this learning rate the validation loss soon rises again."""
    config = config_with(
        data, optimizer=OptimizerConfig(learning_rate=0.3, warmup_steps=0, grad_clip=0.0), mesh=MeshConfig(data=1)
    )
    config = with_train(config, max_steps=400, patience=3, eval_interval=2)
    assert train(config, tmp_path / "run", resume=False) == 0
    metrics = read_metrics(tmp_path / "run" / "metrics.csv")
    evaluated = np.isfinite(metrics["val_loss"])
    steps, losses = metrics["step"][evaluated], metrics["val_loss"][evaluated]
    best = int(steps[losses.argmin()])
    assert steps[-1] == best + 6 < 400
    best_params, latest_params = [load_run(tmp_path / "run", which)[1] for which in ("best", "latest")]
    on_mesh = jax.tree.map(lambda a: a.sharding, run.steps.state.params)
    for params, loss in ((best_params, losses.min()), (latest_params, losses[-1])):
        np.testing.assert_allclose(validation_loss(run, jax.device_put(params, on_mesh)), loss, rtol=1e-6)
    assert f"at step {best}" in capsys.readouterr().out


def test_a_run_that_diverges_skips_updates_and_then_ends_with_its_state_as_it_was(data, tmp_path, state_of, capsys):
    optimizer = OptimizerConfig(learning_rate=1e30, warmup_steps=3, grad_clip=0.0)
    config = config_with(data, optimizer=optimizer, mesh=MeshConfig(data=1))
    config = with_train(config, max_skipped=2, save_interval=1, max_steps=20)
    with pytest.raises(UserError, match=r"diverged: train_loss=.* and grad_norm=.* at step \d+ .* from tokens [\d, ]+"):
        train(config, tmp_path / "run", resume=False)
    step, trees = state_of(tmp_path / "run")
    assert step and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(trees))
    assert capsys.readouterr().out.count("its update is skipped") == 2
    load_run(tmp_path / "run", "best")


def test_a_run_continues_from_an_earlier_checkpoint_if_the_newest_is_damaged_or_unwanted(
    data, tmp_path, state_of, capsys
):
    config, run_dir = config_with(data, mesh=MeshConfig(data=1)), tmp_path / "run"
    config = with_train(config, save_interval=5, eval_interval=12)
    train(config, run_dir, resume=False)
    step, whole = state_of(run_dir)
    latest = run_dir / "checkpoints" / "latest"
    assert step == 12 and {path.name for path in latest.iterdir()} == {"10", "12"}
    next(path for path in (latest / "12" / "opt_state").rglob("d/*")).write_bytes(b"")
    train(config, run_dir, resume=True)
    assert "latest/12 is damaged and not used" in capsys.readouterr().out
    assert jax.tree.all(jax.tree.map(np.array_equal, state_of(run_dir)[1], whole))

    damaged = next(path for path in (latest / "10" / "params").rglob("d/*"))
    data_before = damaged.read_bytes()
    damaged.write_bytes(b"")
    with pytest.raises(UserError, match="latest/10 is damaged"):
        train(config, run_dir, resume=True, from_step=10)
    damaged.write_bytes(data_before)
    with pytest.raises(UserError, match="no checkpoint of step 11: pass --resume with one of 10, 12"):
        train(config, run_dir, resume=True, from_step=11)
    gentler = replace(config, optimizer=replace(config.optimizer, learning_rate=5e-4))
    train(gentler, run_dir, resume=True, from_step=10, named={"optimizer.learning_rate"})
    assert {path.name for path in latest.iterdir()} == {"10", "12", "12.unused", "12.unused-2"}
    assert not jax.tree.all(jax.tree.map(np.array_equal, state_of(run_dir)[1], whole))
    assert load_run(run_dir, "latest")[0].optimizer.learning_rate == 5e-4


@pytest.mark.slow
def test_a_run_resumes_on_other_meshes(data, tmp_path):
    """Of 8, 4, 2 devices and one: sums in another order change bits, but not losses beyond rounding."""
    whole = config_with(data)
    assert train(whole, tmp_path / "whole", resume=False) == 0
    last = whole.train.max_steps
    decay = OptimizerConfig(decay_steps=last)
    meshes = [MeshConfig(data=8), MeshConfig(data=1, fsdp=2, tensor=2), MeshConfig(data=1, fsdp=2), MeshConfig(data=1)]
    for i, mesh in enumerate(meshes):
        part = with_train(whole, max_steps=last * (i + 1) // len(meshes))
        assert train(dataclasses.replace(part, optimizer=decay, mesh=mesh), tmp_path / "parts", resume=i > 0) == 0
    rows = [read_metrics(tmp_path / name / "metrics.csv") for name in ("whole", "parts")]
    np.testing.assert_allclose(*[columns["val_loss"][-1] for columns in rows], rtol=1e-5)


def test_a_resumed_run_keeps_the_dtype_that_it_was_saved_with(data):
    auto, dataset = config_with(data, model=replace(MODEL, dtype="auto")), load_dataset(data)
    saved = replace(auto, model=replace(MODEL, dtype="bfloat16"))
    assert fit_to_data(auto, dataset, saved).model.dtype == "bfloat16"
    assert fit_to_data(config_with(data), dataset, saved).model.dtype == "float32"


@pytest.mark.slow
def test_a_changed_text_is_not_resumed_on(data, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be " * 200)
    config = config_with(DataConfig(source=str(text), dir=str(tmp_path / "data")))
    assert train(config, tmp_path / "run", resume=False) == 0
    text.write_text("to be or to be not " * 200)
    with pytest.raises(UserError, match=r"cannot resume: the tokens of data.source=.*text.txt are not those"):
        train(config, tmp_path / "run", resume=True)


def test_every_window_is_visited_once_per_epoch(data, run):
    from gptjax.loop import batch_maker

    ordered = with_train(config_with(replace(data, order="epoch")), accumulate=2, batch_size=16)
    n_windows = (len(run.dataset.train) - 1) // 16
    make = batch_maker(run._replace(config=fit_to_data(ordered, run.dataset)))
    rows = np.concatenate([np.asarray(make(step)).reshape(16, 17) for step in range(-(-n_windows // 16))])[:n_windows]
    ids = run.dataset.train.window(0, len(run.dataset.train))
    expected = sorted(tuple(ids[start : start + 17]) for start in range(0, 16 * n_windows, 16))
    assert sorted(map(tuple, rows)) == expected
