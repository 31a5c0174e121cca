"""A mesh changes where numbers are, not what they are: 8 virtual devices train as one does."""

from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gptjax import cpu
from gptjax.checkpoint import Checkpoints
from gptjax.config import Config, MeshConfig, ModelConfig, OptimizerConfig, TrainConfig
from gptjax.errors import UserError
from gptjax.model import GPT
from gptjax.sharding import batch_sharding, by_path, gathered, make_mesh, require_memory, spec_of, state_share
from gptjax.training import Steps, TrainState, compile_steps, loss_sum

CONFIG = Config(
    model=ModelConfig(
        vocab_size=64, block_size=8, n_layer=1, n_head=8, n_embd=32, bias=True, dropout=0.1, dtype="float32"
    ),
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2, grad_clip=0.5),
    train=TrainConfig(batch_size=32, max_steps=20),
)
MESHES = {
    "8x1x1": MeshConfig(data=8),
    "1x8x1": MeshConfig(data=1, fsdp=8),
    "1x1x8": MeshConfig(data=1, tensor=8),
    "2x2x2": MeshConfig(data=2, fsdp=2, tensor=2),
}
ONE_DEVICE, PAIR = None, MeshConfig(data=2)
N_STEPS = 10
PLAIN = replace(CONFIG, model=replace(CONFIG.model, dropout=0.0))  # micro-steps draw dropout masks of their own
SPEEDRUN = replace(
    CONFIG,
    model=replace(
        CONFIG.model,
        activation="relu2",
        norm="nonparametric_rmsnorm",
        position="rope",
        qk_norm=True,
        embedding_norm=True,
        logit_cap=2.0,
        tied_head=False,
        bias=False,
        dropout=0.0,
    ),
    optimizer=replace(CONFIG.optimizer, schedule="linear", matrix_optimizer="muon", muon_weight_decay=0.1),
)
MODERN = replace(
    SPEEDRUN, model=replace(SPEEDRUN.model, norm="rmsnorm", qk_norm_scale=True, head_dim=8, window=5, nope_interval=2)
)
MICRO = replace(SPEEDRUN, train=replace(SPEEDRUN.train, accumulate=4))

# Eight devices on two cores are slow: by default the mesh with all axes stands for the others.
every_mesh = pytest.mark.parametrize(
    "mesh_config",
    [pytest.param(mesh, id=name, marks=() if name == "2x2x2" else pytest.mark.slow) for name, mesh in MESHES.items()],
)


def mesh_of(mesh_config):
    if mesh_config is not ONE_DEVICE:
        return make_mesh(mesh_config, CONFIG.train.batch_size)
    axis_types = (jax.sharding.AxisType.Auto,) * 3
    return jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"), axis_types, devices=jax.devices()[:1])


def batch(mesh, step, accumulate=1):
    """Windows of a text with a pattern that can be learned."""
    rng, shape = np.random.default_rng(step), (CONFIG.train.batch_size, CONFIG.model.block_size + 1)
    windows = (rng.integers(0, 64, shape) // 4 * 4 + np.arange(shape[1]) % 4).astype(np.int32)
    return jax.device_put(windows.reshape(accumulate, -1, shape[1]), batch_sharding(mesh))


class Trained(NamedTuple):
    mesh: Mesh
    steps: Steps
    state: TrainState
    losses: list[float]
    params: Any  # on the host
    evaluation: np.ndarray
    planned: dict[str, NamedSharding]
    born: dict[str, NamedSharding]
    last: dict[str, NamedSharding]
    shard_sizes: dict[str, tuple[int, int]]  # of the initial state: entries on the first device, and in all
    donated: bool
    compiled_late: list[str]  # programs compiled after the first step and evaluation


@pytest.fixture(scope="module")
def train(compilations):
    """Ten steps and an evaluation of a config on a mesh, once for each; a CPU cuts micro-steps into `n_splits`."""

    @cache
    def run(config, mesh_config, splits=1) -> Trained:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cpu, "n_splits", lambda *arguments: splits)
            return measure(config, mesh_config)

    def measure(config, mesh_config) -> Trained:
        mesh = mesh_of(mesh_config)
        steps = compile_steps(config, mesh)
        batches = [batch(mesh, step, config.train.accumulate) for step in range(N_STEPS)]
        held_out = batch(mesh, 99)
        born = steps.init()
        shardings_born = {name: leaf.sharding for name, leaf in by_path(born).items()}
        sizes = {name: (leaf.addressable_shards[0].data.size, leaf.size) for name, leaf in by_path(born).items()}
        state, metrics = steps.train(born, batches[0])
        steps.evaluate(state.params, held_out)
        losses = [float(metrics["train_loss"])]
        with compilations() as late:
            for windows in batches[1:]:
                state, metrics = steps.train(state, windows)
                losses.append(float(metrics["train_loss"]))
            evaluation = np.asarray(steps.evaluate(state.params, held_out))
        return Trained(
            mesh,
            steps,
            state,
            losses,
            jax.device_get(state.params),
            evaluation,
            planned={name: leaf.sharding for name, leaf in by_path(steps.state).items()},
            born=shardings_born,
            last={name: leaf.sharding for name, leaf in by_path(state).items()},
            shard_sizes=sizes,
            donated=all(leaf.is_deleted() for leaf in jax.tree.leaves(born)),
            compiled_late=late,
        )

    return run


def assert_same_training(actual, expected, assert_trees_close):
    assert expected.losses[0] - expected.losses[-1] > 0.3, "nothing is learned, so little is compared"
    # Float32 sums in another order, 1e-7 each; the steps carry them on. Measured: 2e-7.
    np.testing.assert_allclose(actual.losses, expected.losses, rtol=1e-5)
    np.testing.assert_allclose(actual.evaluation, expected.evaluation, rtol=1e-5)
    # Adam divides a gradient by its own size: rounding of 1e-8 in an entry of size g moves the parameter by
    # learning_rate * 1e-8 / g in a step, so 1e-4 over ten where g is 1e-5. Measured: 3e-5, in one of 1e5 entries;
    # the steps themselves move parameters by 5e-2. The key bias, to which softmax is blind, has gradient 0 but for
    # rounding, and moves at random by learning_rate a step at most.
    trees = [jax.tree.map(np.asarray, run.params) for run in (actual, expected)]
    key_biases = [tree["layers"]["attention"]["key"].pop("bias", 0.0) for tree in trees]
    assert_trees_close(*trees, atol=2e-4)
    np.testing.assert_allclose(*key_biases, rtol=0, atol=2 * N_STEPS * CONFIG.optimizer.learning_rate)


@every_mesh
def test_every_mesh_trains_as_one_device_does(train, mesh_config, assert_trees_close):
    """With dropout, whose masks must not depend on the mesh either."""
    assert_same_training(train(CONFIG, mesh_config, 4), train(CONFIG, ONE_DEVICE, 4), assert_trees_close)


@every_mesh
@pytest.mark.parametrize("config", [PLAIN, MODERN], ids=["plain", "modern"])
def test_gradients_on_every_mesh_are_those_of_one_device(mesh_config, config, assert_trees_close):
    def gradients(mesh_config):
        mesh = mesh_of(mesh_config)
        state = compile_steps(config, mesh).init()
        with jax.set_mesh(mesh):
            function = jax.jit(jax.grad(lambda params, windows: loss_sum(GPT(config.model), params, windows)[0]))
            return jax.device_get(function(state.params, batch(mesh, 99)[0]))

    # Sums of 256 targets' gradients, each of order 1, in another order.
    assert_trees_close(gradients(mesh_config), gradients(ONE_DEVICE), rtol=1e-5, atol=1e-4)


@pytest.mark.slow
def test_no_way_to_compute_a_step_changes_it(train, assert_trees_close):
    """Looped layers, recomputation, blockwise attention, on a mesh with every axis: as one device."""
    whole = replace(PLAIN, model=replace(PLAIN.model, n_layer=2, separator=3))
    lean = replace(whole.model, attention="blockwise", layers="looped", remat="full")
    lean_run = train(replace(whole, model=lean), MESHES["2x2x2"])
    assert_same_training(lean_run, train(whole, ONE_DEVICE), assert_trees_close)


@pytest.mark.slow
def test_a_speedrun_in_micro_batches_on_a_mesh_trains_as_one_device_does(train, assert_trees_close):
    assert_same_training(train(MICRO, MESHES["2x2x2"]), train(SPEEDRUN, ONE_DEVICE), assert_trees_close)


def test_micro_steps_and_their_splits_are_one_large_batch(train, assert_trees_close):
    parts = replace(PLAIN, train=replace(PLAIN.train, accumulate=2))
    assert_same_training(train(parts, MESHES["2x2x2"], 2), train(PLAIN, ONE_DEVICE), assert_trees_close)


def test_cpu_devices_that_take_their_own_gradients_train_as_one_does(train, assert_trees_close):
    """With dropout each takes two of four splits whole, with the masks that one device draws for them."""
    assert_same_training(train(CONFIG, PAIR, 4), train(CONFIG, ONE_DEVICE, 4), assert_trees_close)


@pytest.mark.parametrize("config", [PLAIN, pytest.param(SPEEDRUN, marks=pytest.mark.slow)])
def test_a_split_update_trains_as_one_device_does(monkeypatch, train, config, assert_trees_close):
    """As on GPUs and TPUs: the data axis splits the optimizer's moments and its work."""
    monkeypatch.setattr("gptjax.sharding.splits_updates", lambda mesh: mesh.shape["data"] > 1)
    run = train(config, MeshConfig(data=4, fsdp=2))
    assert_same_training(run, train(config, ONE_DEVICE), assert_trees_close)
    moments = [sizes for name, sizes in run.shard_sizes.items() if "opt_state" in name and name.endswith("kernel")]
    assert moments and all(8 * part == whole for part, whole in moments)


def test_splits_fit_the_cache_and_divide_evenly(monkeypatch):
    monkeypatch.setattr(cpu, "CACHED_TOKENS", 10 * PLAIN.model.block_size)
    mesh = mesh_of(MESHES["2x2x2"])
    assert cpu.n_splits(PLAIN, mesh) == 4  # of 32 windows 8 at a time: at most 10, a multiple of 4 devices
    assert cpu.n_splits(replace(PLAIN, train=replace(PLAIN.train, accumulate=2)), mesh) == 2
    assert cpu.n_splits(replace(PLAIN, train=replace(PLAIN.train, batch_size=4)), mesh) == 1
    assert cpu.n_splits(CONFIG, mesh) == 8  # dropout takes memory too


def test_a_large_model_with_few_tokens_a_step_trains_on_one_cpu_device():
    shapes = {(12, 768, 2, 256): 1, (12, 768, 64, 256): 0, (4, 128, 12, 64): 0, (6, 384, 64, 256): 0}
    for (n_layer, n_embd, rows, length), n in shapes.items():
        model = ModelConfig(n_layer=n_layer, n_head=4, n_embd=n_embd, block_size=length)
        assert cpu.n_devices(Config(model=model, train=TrainConfig(batch_size=rows))) == n


@pytest.mark.slow
def test_muon_goes_on_from_a_checkpoint_bit_for_bit(train, tmp_path):
    run, checkpoints = train(MICRO, MESHES["2x2x2"]), Checkpoints(tmp_path)
    checkpoints.save(10, {}, params=run.state.params, opt_state=run.state.opt_state)
    checkpoints.wait()
    trees, _ = checkpoints.restore(params=run.steps.state.params, opt_state=run.steps.state.opt_state)
    checkpoints.close()
    copies = [jax.tree.map(jnp.array, run.state), run.state._replace(step=jnp.array(run.state.step), **trees)]
    nexts = [run.steps.train(each, batch(run.mesh, 10, accumulate=4))[0] for each in copies]
    jax.tree.map(np.testing.assert_array_equal, *nexts)
    assert not np.array_equal(nexts[0].params["head"], run.state.params["head"])


@every_mesh
def test_steps_are_compiled_once_and_their_state_is_donated(train, mesh_config):
    run = train(CONFIG, mesh_config, 4)
    assert run.compiled_late == []
    assert run.donated


def test_compilations_are_seen(compilations):
    with compilations() as names:
        jax.block_until_ready(jax.jit(lambda x: x + 1)(jnp.ones(7)))
    assert names


# The table as it is meant: what each parameter and both of its moments must be split over.
WANTED = {
    "token_embedding": P("tensor", "fsdp"),
    "head": P("tensor", "fsdp"),
    "position_embedding": P(None, "fsdp"),
    "final_norm/bias": P(),
    "final_norm/scale": P(),
    "layers/attention_norm/bias": P(),
    "layers/attention_norm/scale": P(),
    "layers/attention/query/kernel": P(None, "fsdp", "tensor", None),
    "layers/attention/query/bias": P(None, "tensor", None),
    "layers/attention/key/kernel": P(None, "fsdp", "tensor", None),
    "layers/attention/key/bias": P(None, "tensor", None),
    "layers/attention/value/kernel": P(None, "fsdp", "tensor", None),
    "layers/attention/value/bias": P(None, "tensor", None),
    "layers/attention/out/kernel": P(None, "tensor", None, "fsdp"),
    "layers/attention/out/bias": P(),
    "layers/mlp_norm/bias": P(),
    "layers/mlp_norm/scale": P(),
    "layers/mlp/up/kernel": P(None, "fsdp", "tensor"),
    "layers/mlp/up/bias": P(None, "tensor"),
    "layers/mlp/down/kernel": P(None, "tensor", "fsdp"),
    "layers/mlp/down/bias": P(),
}


@pytest.mark.parametrize(
    ("config", "mesh_config"),
    [
        *(pytest.param(CONFIG, m, id=n, marks=() if n == "2x2x2" else pytest.mark.slow) for n, m in MESHES.items()),
        pytest.param(MICRO, MESHES["2x2x2"], id="speedrun", marks=pytest.mark.slow),
    ],
)
def test_state_is_born_sharded_and_stays_so(train, config, mesh_config):
    run = train(config, mesh_config, 1 if config is MICRO else 4)
    absent = ("position_embedding", "bias", "scale") if config is MICRO else ("head",)
    wanted_here = {name for name in WANTED if not name.endswith(absent)}
    assert by_path(run.params).keys() == wanted_here
    n_found = 0
    for name, born in run.born.items():
        own = [own for own in WANTED if name.endswith("/" + own)]
        n_found += len(own)
        wanted = NamedSharding(run.mesh, WANTED[own[0]] if own else P())  # steps and counts are not split
        for sharding in (run.planned[name], born, run.last[name]):
            assert sharding.is_equivalent_to(wanted, 4), name
        n_parts = np.prod([run.mesh.shape[axis] for axis in wanted.spec if axis])
        assert run.shard_sizes[name][0] * n_parts == run.shard_sizes[name][1], name
    n_muon = sum(name.endswith("kernel") for name in WANTED) if config is MICRO else 0
    assert n_found == 3 * len(wanted_here) - n_muon, "parameters and both of Adam's moments, or Muon's one"


@pytest.mark.slow
def test_fsdp_leaves_no_matrix_whole(train):
    run = train(CONFIG, MESHES["1x8x1"], 4)
    for name, (size, whole) in run.shard_sizes.items():
        if name.endswith(("kernel", "embedding")):
            assert size == whole / 8, name


@pytest.mark.parametrize(
    "name",
    [
        "layers/attention/gate/kernel",
        "layers/mlp/value_head/kernel",
        "layers/mlp/value_head",
        "layers/cross_attention/out/bias",
        "layers/gmlp/up/kernel",
        "layers/groupnorm/scale",
        "final_step",
    ],
)
def test_a_parameter_that_no_row_names_is_an_error_with_its_name(name):
    with pytest.raises(KeyError, match=name):
        spec_of(name)


def test_the_batch_is_split_over_data_and_fsdp():
    windows = batch(mesh_of(MESHES["2x2x2"]), 0)
    assert windows.addressable_shards[0].data.shape == (1, 32 // 4, 9)


@pytest.mark.parametrize(
    ("mesh_config", "batch_size", "words"),
    [
        (MeshConfig(data=9), 18, ["mesh.data=9", "does not fit 8 devices", "-1"]),
        (MeshConfig(data=8, fsdp=2, tensor=1), 16, ["mesh.data=8", "mesh.fsdp=2", "mesh.tensor=1", "8 devices"]),
        (MeshConfig(data=-1, fsdp=3), 12, ["mesh.fsdp=3", "does not fit 8 devices"]),
        (MeshConfig(data=-1, fsdp=16), 16, ["mesh.fsdp=16", "does not fit 8 devices"]),
        (MeshConfig(), 12, ["train.batch_size", "12", "mesh.data=8", "multiple of 8"]),
        (MeshConfig(data=2, fsdp=2, tensor=2), 6, ["train.batch_size", "6", "mesh.fsdp=2", "multiple of 4"]),
    ],
)
def test_a_mesh_that_does_not_fit_is_an_error(mesh_config, batch_size, words):
    with pytest.raises(UserError) as error:
        make_mesh(mesh_config, batch_size)
    for word in words:
        assert word in str(error.value)


def test_only_one_axis_can_be_the_rest():
    with pytest.raises(UserError, match="mesh.tensor=-1"):
        MeshConfig(data=-1, tensor=-1)
    assert dict(make_mesh(MeshConfig(data=2, fsdp=-1), 8).shape) == {"data": 2, "fsdp": 4, "tensor": 1}


@pytest.mark.parametrize(
    ("mesh_config", "state_bytes", "sizes"),
    [
        (MeshConfig(), 500, (8, 1, 1)),
        (MeshConfig(), 501, (1, 8, 1)),
        (MeshConfig(fsdp=1), 501, (8, 1, 1)),
        (MeshConfig(tensor=2), 501, (4, 1, 2)),
        (MeshConfig(tensor=2), 1001, (1, 4, 2)),
        (MeshConfig(data=2), 501, (2, 1, 1)),
    ],
)
def test_a_state_that_would_fill_a_device_is_split_by_default(monkeypatch, mesh_config, state_bytes, sizes):
    monkeypatch.setattr("gptjax.sharding.memory", lambda device: 1000)
    assert tuple(make_mesh(mesh_config, 8, state_bytes).shape.values()) == sizes


def test_more_parts_than_devices_are_refused_on_an_accelerator_too():
    gpu = Mock(spec=jax.Device, platform="gpu", device_kind="NVIDIA H100 80GB HBM3", process_index=0)
    with pytest.raises(UserError, match="does not fit 1 devices"):
        make_mesh(MeshConfig(tensor=2), 8, 1000, [gpu])


def test_the_data_axis_of_an_accelerator_splits_the_moments():
    """16 bytes a parameter: its value, gradient and two moments."""
    assert state_share(1600, 8, 2, "cpu") == 1600 / 2
    assert state_share(1600, 8, 2, "tpu") == (800 + 800 / 8) / 2


@pytest.mark.parametrize(("mesh_config", "fits"), [(MeshConfig(data=2), 500), (MeshConfig(data=1, fsdp=2), 1000)])
def test_what_no_device_can_hold_is_refused_before_it_is_allocated(monkeypatch, mesh_config, fits):
    """Two CPU devices share 1,000 bytes and more for 50 tokens."""
    monkeypatch.setattr("gptjax.sharding.usable_memory", lambda: 1200.0)
    mesh = make_mesh(mesh_config, 2, devices=jax.devices()[:2])
    require_memory(mesh, fits, 50)
    with pytest.raises(UserError, match="state and batch take .* GiB: choose a smaller model"):
        require_memory(mesh, fits + 10, 50)


@pytest.mark.parametrize(
    ("mesh_config", "model", "words"),
    [
        (MESHES["1x1x8"], {"n_head": 4}, ["model.n_head=4", "mesh.tensor=8"]),
        (MESHES["1x8x1"], {"n_embd": 36, "n_head": 3}, ["model.n_embd=36", "mesh.fsdp=8"]),
    ],
    ids=["heads", "width"],
)
def test_a_model_that_does_not_split_is_said(mesh_config, model, words):
    config = replace(CONFIG, model=replace(CONFIG.model, **model))
    with pytest.raises(UserError) as error:
        compile_steps(config, mesh_of(mesh_config)).init()
    for word in words:
        assert word in str(error.value)


def test_a_vocabulary_that_does_not_split_stays_whole():
    config = replace(CONFIG, model=replace(CONFIG.model, vocab_size=65))
    state = compile_steps(config, make_mesh(MESHES["2x2x2"], config.train.batch_size)).state
    assert state.params["token_embedding"].sharding.spec == P(None, "fsdp")


def test_a_gathered_weight_has_a_gradient_that_is_split():
    mesh = make_mesh(MeshConfig(1, 4, 2), 4)
    w_DF, x_BD = jnp.ones((16, 8)), jnp.ones((4, 16))
    with jax.set_mesh(mesh):
        gradient = jax.jit(jax.grad(lambda w: jnp.sum(x_BD @ gathered(w, "layers/mlp/up/kernel"))))(w_DF)
    assert gradient.sharding.spec == P("fsdp", "tensor")  # not whole: a reduce-scatter moves half of an all-reduce
