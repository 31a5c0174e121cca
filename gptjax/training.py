"""The training and evaluation steps: pure functions, and their compiled forms over a mesh.

Shapes as in model.py, and: A micro-steps, W = T + 1 tokens of a window, whose first T are inputs and last T targets.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key

from gptjax import cpu
from gptjax.config import Config
from gptjax.data.packing import CONTEXT, FIRST, ID
from gptjax.host import overlap_options
from gptjax.loss import cross_entropy_sum, pieces_of
from gptjax.loss_scale import LossScale
from gptjax.model import GPT, init_params, param_shapes
from gptjax.optimizer import freeze, make_optimizer, make_schedule
from gptjax.sharding import batch_sharding, require_divisible, split_update, with_shardings


class TrainState(NamedTuple):
    """Everything that a step changes, as arrays: with config and data it determines all that follows.

    With dtype float16 `opt_state` is the optimizer's state and a `LossScale`.
    """

    step: jax.Array
    params: Any
    opt_state: Any


def loss_sum(
    model: GPT,
    params: Any,
    windows_BW: Int[Array, "B W"],
    rngs: dict[str, jax.Array] | None = None,
    packed: bool = False,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The summed cross-entropy in nats of each window's targets, and the number of targets.

    A token of -1 is past the end of the text and does not count. Dropout is on where `rngs` has a "dropout". `packed`:
    windows hold conversations with the marks of data/packing.py.
    """
    inputs_BT, targets_BT, first_BT = jnp.maximum(windows_BW[:, :-1], 0), windows_BW[:, 1:], None
    if packed:
        inputs_BT, first_BT = jnp.where(windows_BW < 0, 0, windows_BW & ID)[:, :-1], (windows_BW & FIRST)[:, :-1] != 0
        targets_BT = jnp.where(is_target(windows_BW), windows_BW & ID, -1)[:, 1:]
    x_BTD, _ = model.apply({"params": params}, inputs_BT, first_BT=first_BT, method="hidden", rngs=rngs)
    pieces = pieces_of(len(inputs_BT), inputs_BT.shape[1], model.config.padded_vocab_size)
    head_VD, config = model.head_of(params), model.config
    nats = cross_entropy_sum(x_BTD, head_VD, targets_BT, config.vocab_size, pieces, config.logit_cap)
    return nats, jnp.sum(targets_BT >= 0).astype(jnp.float32)


def is_target(windows: Int[Array, "*axes"]) -> Bool[Array, "*axes"]:
    """Which entries of packed windows are predicted; -1, past the end, is not."""
    return windows & CONTEXT == 0


def init_state(config: Config) -> TrainState:
    """The state before the first step, from train.seed alone.

    Compiled with `out_shardings`, no device ever holds all of it.
    """
    return start_state(config, init_params(config.model, config.train.seed))


def start_state(config: Config, params: Any) -> TrainState:
    """The state before the first step of a run that starts from these parameters."""
    opt_state = _optimizer(config).init(params)
    opt_state = (opt_state, LossScale.first()) if config.model.dtype == "float16" else opt_state
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state)


def state_shapes(config: Config) -> TrainState:
    """The state of `init_state` as `jax.ShapeDtypeStruct`s."""
    return jax.eval_shape(partial(start_state, config), param_shapes(config.model))


def state_bytes(config: Config) -> int:
    """Bytes of the whole train state and of the gradients."""
    state = state_shapes(config)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((state, state.params)))


def _optimizer(config: Config) -> optax.GradientTransformation:
    return make_optimizer(config.optimizer, config.train.max_steps, lora=config.model.lora_rank > 0)


def gradient(
    config: Config,
    key: Key[Array, ""],
    params: Any,
    windows_ABW: Int[Array, "A B W"],
    number_A: Int[Array, " A"] | None = None,
    scale: Float[Array, ""] | None = None,
) -> tuple[Float[Array, ""], Any]:
    """The mean loss of A x B windows in nats a token and its gradient, accumulated over A micro-steps.

    In packed windows it is the mean over all tokens, where those that are not predicted have no loss. Dropout in a
    micro-step is keyed by `key` and its number, by default 0 to A - 1. With a `scale` the gradient is that of the
    scaled loss, divided by the scale.
    """
    model, (A, B, W), packed = GPT(config.model), windows_ABW.shape, config.data.format == "chat"

    def micro_loss(params: Any, windows_BW: jax.Array, number: jax.Array) -> jax.Array:
        rngs = {"dropout": jax.random.fold_in(key, number)} if config.model.drops else None
        if config.model.lora_rank:
            params = freeze(params)
        loss = loss_sum(model, params, windows_BW, rngs, packed)[0] / (A * B * (W - 1))
        return loss if scale is None else loss * scale

    def unscaled(total: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        return total if scale is None else jax.tree.map(lambda x: x / scale, total)

    number_A = jnp.arange(A) if number_A is None else number_A
    if A == 1:
        return unscaled(jax.value_and_grad(micro_loss)(params, windows_ABW[0], number_A[0]))

    def accumulate(total: Any, micro: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, jax.value_and_grad(micro_loss)(params, *micro)), None

    zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
    return unscaled(jax.lax.scan(accumulate, zero, (windows_ABW, number_A))[0])


def select(pred: jax.Array, true_fun: Callable[..., Any], false_fun: Callable[..., Any], *operands: Any) -> Any:
    """`jax.lax.cond` that computes both branches: an accelerator need not wait for `pred`."""
    return jax.tree.map(partial(jnp.where, pred), true_fun(*operands), false_fun(*operands))


def train_step(
    config: Config,
    state: TrainState,
    windows_ABW: Int[Array, "A B W"],
    gradient: Callable[..., tuple[jax.Array, Any]] = gradient,
    cond: Callable[..., Any] = select,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimizer step on the mean loss of all A x B windows: the next state, and metrics.

    Dropout is keyed by train.seed and the step, so the result is a function of state and batch alone. Where the loss or
    the gradient is not finite, parameters and optimizer state stay as they are, but for the loss scale: `cond` is
    `select` or `jax.lax.cond`.
    """

    def update(params: Any, opt_state: Any) -> tuple[Any, Any]:
        with jax.named_scope("optimizer"):
            updates, opt_state = _optimizer(config).update(grads, opt_state, params)
            return split_update(optax.apply_updates(params, updates)), opt_state

    key = jax.random.fold_in(jax.random.key(config.train.seed), state.step)
    optimizer_state, scaling = state.opt_state if config.model.dtype == "float16" else (state.opt_state, None)
    loss, grads = gradient(config, key, state.params, windows_ABW, scale=scaling.loss_scale if scaling else None)
    if config.data.format == "chat":  # the mean over the tokens that are predicted
        targets_ABT = is_target(windows_ABW)[:, :, 1:]
        n_targets = jnp.maximum(jnp.sum(targets_ABT), 1)
        loss, grads = jax.tree.map(lambda x: x * (targets_ABT.size / n_targets), (loss, grads))
    params, grads = split_update((state.params, grads))
    grad_norm = optax.tree.norm(grads)
    loss_finite, gradient_finite = jnp.isfinite(loss), jnp.isfinite(grad_norm)
    params, opt_state = cond(loss_finite & gradient_finite, update, lambda *old: old, params, optimizer_state)
    metrics = {
        "train_loss": loss,
        "grad_norm": grad_norm,
        "learning_rate": make_schedule(config.optimizer, config.train.max_steps)(state.step),
    }
    if scaling:
        metrics["loss_scale"] = scaling.loss_scale
        opt_state = opt_state, scaling.after(loss_finite, gradient_finite)
    return TrainState(state.step + 1, params, opt_state), metrics


def eval_step(config: Config, params: Any, windows_ABW: Int[Array, "1 B W"]) -> Float[Array, "2"]:
    """The summed nats of a batch and the number of its targets."""
    packed = config.data.format == "chat"
    return jnp.stack(loss_sum(GPT(config.model), params, windows_ABW[0], packed=packed))


class Steps(NamedTuple):
    """A run's functions, compiled for its mesh."""

    init: Callable[[], TrainState]
    start: Callable[[Any], TrainState]  # from parameters, which it donates
    train: Callable[[TrainState, jax.Array], tuple[TrainState, Any]]
    evaluate: Callable[[Any, jax.Array], jax.Array]
    state: TrainState  # shapes, dtypes and shardings


def state_on_mesh(config: Config, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of a run's state on a mesh.

    Raises:
        UserError: the mesh does not divide what the sharding table splits.
    """
    require_divisible(config.model, mesh)
    return with_shardings(mesh, state_shapes(config))


def _jit_train_step(config: Config, mesh: Mesh, state: TrainState) -> Any:
    """The training step, jit-compiled with shardings: the state is donated from step to step."""
    split = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = partial(train_step, config)
    if cpu.is_cpu(mesh):
        # A branch instead of a selection: a CPU would copy the whole state.
        step = partial(step, gradient=cpu.split_gradient(gradient, config, mesh), cond=jax.lax.cond)
    inputs, outputs = (split, batch_sharding(mesh)), (split, NamedSharding(mesh, PartitionSpec()))
    options = overlap_options(mesh.devices.flat[0].platform, mesh.size)
    return jax.jit(step, in_shardings=inputs, out_shardings=outputs, donate_argnums=0, compiler_options=options or None)


def trace_train_step(config: Config, mesh: Mesh) -> tuple[TrainState, jax.stages.Traced]:
    """The state, and the traced training step of `compile_steps`, to compile for devices that need not be present."""
    state, train = state_on_mesh(config, mesh), config.train
    shape = (train.accumulate, train.micro_batch_size, config.model.block_size + 1)
    windows = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding(mesh))
    with jax.set_mesh(mesh):
        return state, _jit_train_step(config, mesh, state).trace(state, windows)


def compile_steps(config: Config, mesh: Mesh, ahead: bool = False) -> Steps:
    """The compiled steps of a config without "auto"; the state is created sharded by the table.

    `ahead`: a thread compiles the training step at once, while the caller prepares the first batch.
    """
    state = state_on_mesh(config, mesh)
    split = jax.tree.map(lambda leaf: leaf.sharding, state)

    def on_mesh(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            with jax.set_mesh(mesh):
                return function(*arguments)

        return cpu.one_at_a_time(call) if mesh.size > 1 and cpu.is_cpu(mesh) else call

    options = cpu.RUNS_ONCE if cpu.is_cpu(mesh) else None
    train = on_mesh(_compiled_ahead(config, mesh) if ahead else _jit_train_step(config, mesh, state))
    evaluate = jax.jit(
        partial(eval_step, config),
        in_shardings=(split.params, batch_sharding(mesh)),
        out_shardings=NamedSharding(mesh, PartitionSpec()),
    )
    return Steps(
        init=on_mesh(jax.jit(partial(init_state, config), out_shardings=split, compiler_options=options)),
        start=on_mesh(jax.jit(partial(start_state, config), out_shardings=split, donate_argnums=0)),
        train=cpu.keeping_memory(train) if cpu.is_cpu(mesh) else train,
        evaluate=on_mesh(evaluate),
        state=state,
    )


def _compiled_ahead(config: Config, mesh: Mesh) -> Callable[..., Any]:
    """The training step, compiled from now on by a thread that the first call waits for."""
    compiled = ThreadPoolExecutor(1).submit(lambda: trace_train_step(config, mesh)[1].lower().compile())
    return lambda *arguments: compiled.result()(*arguments)
