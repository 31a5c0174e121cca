"""Loss, train_step and eval_step: pure functions, compiled over the mesh.

Shape suffixes as in model.py, and A micro-steps, each of S splits, W the T + 1 tokens of a window: inputs and, one on,
targets.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Key

from gptjax.config import Config
from gptjax.loss import cross_entropy_sum, pieces_of
from gptjax.model import GPT
from gptjax.optimizer import freeze, make_optimizer, make_schedule
from gptjax.sharding import (
    BATCH_AXES,
    batch_sharding,
    mesh_in_use,
    require_divisible,
    shardings,
    with_shardings,
)

CACHED_TOKENS = 2048  # of all devices at a time on a CPU; half as many with dropout


class TrainState(NamedTuple):
    """All that a step changes, arrays only: with config and data it determines everything that follows."""

    step: jax.Array
    params: Any
    opt_state: Any


def loss_sum(
    model: GPT, params: Any, windows_BW: Int[Array, "B W"], rngs: dict[str, jax.Array] | None = None
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Cross-entropy in nats of each window's tokens after its first, summed, and how many those are.

    A place past the end of the text holds -1 and does not count. Dropout is on where `rngs` has a "dropout".
    """
    inputs_BT, targets_BT = jnp.maximum(windows_BW[:, :-1], 0), windows_BW[:, 1:]
    x_BTD, _ = model.apply({"params": params}, inputs_BT, method="hidden", rngs=rngs)
    pieces = pieces_of(len(inputs_BT), inputs_BT.shape[1], model.config.padded_vocab_size)
    head_VD, config = model.head_of(params), model.config
    nats = cross_entropy_sum(x_BTD, head_VD, targets_BT, config.vocab_size, pieces, config.logit_cap)
    return nats, jnp.sum(targets_BT >= 0).astype(jnp.float32)


def init_state(config: Config) -> TrainState:
    """Step 0, from train.seed alone; compile it with `out_shardings` and no device ever holds it whole."""
    # Plain attention: the others want a row for each device. A loop: it compiles three times as fast.
    model = GPT(replace(config.model, attention="plain", layers="looped"))
    return start_state(config, model.init(jax.random.key(config.train.seed), jnp.zeros((1, 1), jnp.int32))["params"])


def start_state(config: Config, params: Any) -> TrainState:
    """Step 0 of a run that begins with these parameters."""
    return TrainState(jnp.zeros((), jnp.int32), params, _optimizer(config).init(params))


def state_bytes(config: Config) -> int:
    """Bytes of the whole train state, and of the gradients beside it."""
    state = jax.eval_shape(lambda: init_state(config))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((state, state.params)))


def _optimizer(config: Config) -> optax.GradientTransformation:
    return make_optimizer(config.optimizer, config.train.max_steps, lora=config.model.lora_rank > 0)


def train_step(
    config: Config, state: TrainState, windows_ABW: Int[Array, "A B W"], splits: int = 1, apart: bool = False
) -> tuple[TrainState, Any]:
    """One optimizer step on the mean loss over all A x B windows; A micro-steps bound the memory, `splits` of each the
    working set.

    Dropout is keyed by (train.seed, step, micro-step, split), so the step is a function of state and batch alone.
    `apart`: each device takes the gradient of its own share of the splits, and one sum, in one array, follows.
    """
    n_targets = windows_ABW.size // windows_ABW.shape[-1] * (windows_ABW.shape[-1] - 1)
    key = jax.random.fold_in(jax.random.key(config.train.seed), state.step)
    given = (state.params, windows_ABW, jnp.arange(len(windows_ABW) * splits).reshape(-1, splits))
    if apart:

        def own(*given: Any) -> Any:
            flat, tree = ravel_pytree(gradient(config, n_targets, key, *given))
            return tree(jax.lax.psum(flat, "data"))

        split = (PartitionSpec(), PartitionSpec(None, "data"), PartitionSpec(None, "data"))
        loss, grads = jax.shard_map(own, in_specs=split, out_specs=PartitionSpec(), check_vma=False)(*given)
    else:
        loss, grads = gradient(config, n_targets, key, *given)
    updates, opt_state = _optimizer(config).update(grads, state.opt_state, state.params)
    metrics = {
        "train_loss": loss,
        "grad_norm": optax.tree.norm(grads),
        "learning_rate": make_schedule(config.optimizer, config.train.max_steps)(state.step),
    }
    return TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state), metrics


def gradient(
    config: Config,
    n_targets: int,
    key: Key[Array, ""],
    params: Any,
    windows_ABW: Int[Array, "A B W"],
    numbers_AS: Int[Array, "A S"],
) -> tuple[Float[Array, ""], Any]:
    """Nats of the windows, summed and divided by n_targets, and their gradient; a split of a micro-step at a time.

    Dropout in a split is keyed by its number.
    """
    model, (A, B, W), S = GPT(config.model), windows_ABW.shape, numbers_AS.shape[1]
    if S > 1:
        windows_ABW = windows_ABW.reshape(A * S, B // S, W)
        if not mesh_in_use().empty:
            windows_ABW = jax.lax.with_sharding_constraint(windows_ABW, PartitionSpec(None, BATCH_AXES))

    def micro_loss(params: Any, windows_BW: jax.Array, number: jax.Array) -> jax.Array:
        rngs = {"dropout": jax.random.fold_in(key, number)} if config.model.drops else None
        if config.model.lora_rank:
            params = freeze(params)
        return loss_sum(model, params, windows_BW, rngs)[0] / n_targets

    if len(windows_ABW) == 1:
        return jax.value_and_grad(micro_loss)(params, windows_ABW[0], numbers_AS[0, 0])

    def accumulate(total: Any, micro: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, jax.value_and_grad(micro_loss)(params, *micro)), None

    zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
    return jax.lax.scan(accumulate, zero, (windows_ABW, numbers_AS.reshape(-1)))[0]


def eval_step(config: Config, params: Any, windows_ABW: Int[Array, "1 B W"]) -> Float[Array, "2"]:
    """A batch's nats, summed, and the number of its targets."""
    return jnp.stack(loss_sum(GPT(config.model), params, windows_ABW[0]))


class Steps(NamedTuple):
    """The compiled functions of a run on its mesh."""

    init: Callable[[], TrainState]
    start: Callable[[Any], TrainState]  # from parameters, which it takes over
    train: Callable[[TrainState, jax.Array], tuple[TrainState, Any]]
    evaluate: Callable[[Any, jax.Array], jax.Array]
    state: TrainState  # shapes, dtypes and shardings


def trace_train_step(config: Config, mesh: Mesh) -> tuple[TrainState, jax.stages.Traced]:
    """The very step of `compile_steps`, to look at or to compile for devices that need not be here, and its state."""
    require_divisible(config.model, mesh)
    abstract = jax.eval_shape(lambda: init_state(config))
    state, options = with_shardings(mesh, abstract), config.train
    shape = (options.accumulate, options.batch_size // options.accumulate, config.model.block_size + 1)
    windows = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding(mesh))
    with jax.set_mesh(mesh):
        return state, _jit_train_step(config, mesh, shardings(mesh, abstract)).trace(state, windows)


def splits_of(config: Config, mesh: Mesh) -> int:
    """In how many parts, one after the other, a CPU takes a micro-step, so that activations stay in its cache; else 1.

    6 layers, width 384, 64 x 256 tokens on two cores: 18.9 s in one part, 8.3 s in eight.
    """
    rows = config.train.batch_size // config.train.accumulate
    n_devices = mesh.shape["data"] * mesh.shape["fsdp"]
    if mesh.devices.flat[0].platform != "cpu":
        return 1
    most = CACHED_TOKENS // 2 if config.model.drops else CACHED_TOKENS
    enough = [n for n in range(1, rows // n_devices + 1) if rows % (n * n_devices) == 0]
    small = [n for n in enough if rows // n * config.model.block_size <= most]
    return small[0] if small else enough[-1]


def _jit_train_step(config: Config, mesh: Mesh, split: Any) -> Any:
    on_cpu, n_data, splits = mesh.devices.flat[0].platform == "cpu", mesh.shape["data"], splits_of(config, mesh)
    apart = on_cpu and mesh.size == n_data > 1 and not config.model.lora_rank
    if apart and not config.model.drops:  # with it splits stay as they are, so that any devices draw the same masks
        splits *= n_data
    return jax.jit(
        partial(train_step, config, splits=splits, apart=apart and splits % n_data == 0),
        in_shardings=(split, batch_sharding(mesh)),
        out_shardings=(split, NamedSharding(mesh, PartitionSpec())),
        donate_argnums=0,
    )


def _ahead(compile: Callable[[], Any]) -> Callable[..., Any]:
    """The compiled function, which a thread begins to make now and the first call waits for."""
    made = ThreadPoolExecutor(1).submit(compile)
    return lambda *arguments: made.result()(*arguments)


def compile_steps(config: Config, mesh: Mesh, ahead: bool = False) -> Steps:
    """jit with shardings: the state is born sharded by the table, donated from step to step.

    `ahead`: the step of training is compiled at once, in a thread, while the caller prepares the first batch.
    """
    require_divisible(config.model, mesh)
    abstract = jax.eval_shape(lambda: init_state(config))
    state, split = with_shardings(mesh, abstract), shardings(mesh, abstract)

    one_at_a_time = mesh.size > 1 and mesh.devices.flat[0].platform == "cpu"

    def on_mesh(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            with jax.set_mesh(mesh):
                result = function(*arguments)
            # CPU devices share a pool of as many threads: of two programs in flight, each could hold a thread in a
            # collective that waits for the other's, for ever.
            return jax.block_until_ready(result) if one_at_a_time else result

        return call

    batch, replicated = batch_sharding(mesh), NamedSharding(mesh, PartitionSpec())
    # What runs once is compiled with less care, in half the time.
    quick = {"xla_backend_optimization_level": 1} if mesh.devices.flat[0].platform == "cpu" else None
    train = _jit_train_step(config, mesh, split)
    if ahead:
        train = _ahead(lambda: trace_train_step(config, mesh)[1].lower().compile())
    return Steps(
        init=on_mesh(jax.jit(partial(init_state, config), out_shardings=split, compiler_options=quick)),
        start=on_mesh(jax.jit(partial(start_state, config), out_shardings=split, donate_argnums=0)),
        train=on_mesh(train),
        evaluate=on_mesh(
            jax.jit(partial(eval_step, config), in_shardings=(split.params, batch), out_shardings=replicated)
        ),
        state=state,
    )
