"""The learning-rate schedule, and AdamW and Muon from optax."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from gptjax.config import OptimizerConfig
from gptjax.model import n_input_axes
from gptjax.sharding import by_layer, path_name


def make_schedule(config: OptimizerConfig, max_steps: int) -> optax.Schedule:
    """Step -> AdamW's learning rate: linear warm-up, decay until decay_steps, then min_learning_rate.

    "cosine" decays along a cosine; "linear" is constant and then linear (warmup-stable-decay, "MiniCPM", section 4).
    Warm-up step n has (n + 1) / (warmup_steps + 1) of the peak, as in nanoGPT: the first step is not at rate 0.
    """
    end = max(config.decay_steps or max_steps, config.warmup_steps + 1)
    if config.schedule == "linear":
        start = max(round(end * (1 - config.decay_fraction)), config.warmup_steps)
        corners = jnp.array([0, config.warmup_steps, start, end], jnp.float32)
        first = config.learning_rate / (config.warmup_steps + 1)
        rates = jnp.array([first, config.learning_rate, config.learning_rate, config.min_learning_rate], jnp.float32)
        return lambda step: jnp.interp(step, corners, rates)
    return optax.warmup_cosine_decay_schedule(
        init_value=config.learning_rate / (config.warmup_steps + 1),
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=end,
        end_value=config.min_learning_rate,
    )


def make_optimizer(config: OptimizerConfig, max_steps: int, lora: bool = False) -> optax.GradientTransformation:
    """Global-norm clipping, then AdamW, which decays kernels and embeddings but no biases and no norms.

    With "muon" the blocks' kernels have Muon instead: momentum M = 0.95 M + 0.05 G and the update
    rate sqrt(max(1, out / in)) NS(0.95 M + 0.05 G), with Adam's bias correction of M and G (torch.optim.Muon has none).
    NS is five Newton-Schulz iterations in float32, which take singular values to about 0.7 to 1.2. With `lora` only
    LoRA's parameters are trained and have moments.
    Sources: "Decoupled Weight Decay Regularization", algorithm 2; nanoGPT (which parameters decay); "Muon: An optimizer
    for hidden layers in neural networks" (Jordan, 2024).
    """
    schedule = make_schedule(config, max_steps)
    optimizer = optax.adamw(
        schedule,
        config.beta1,
        config.beta2,
        weight_decay=config.weight_decay,
        mask=_is_matrix,
    )
    if config.matrix_optimizer == "muon":
        ratio = config.muon_learning_rate / config.learning_rate
        muon = optax.contrib.muon(
            lambda step: ratio * schedule(step),
            weight_decay=config.muon_weight_decay,
            muon_weight_dimension_numbers=_matrix_axes,
        )
        # Each kernel whole on one device: else every Newton-Schulz matmul is a collective.
        whole = optax.stateless(lambda updates, params: jax.tree.map(by_layer, updates))
        optimizer = optax.partition({"muon": optax.chain(whole, muon, whole), "adamw": optimizer}, _labels)
    clip = optax.clip_by_global_norm(config.grad_clip) if config.grad_clip else optax.identity()
    optimizer = optax.chain(clip, optimizer)
    if not lora:
        return optimizer
    labels = {True: "trained", False: "frozen"}
    transforms = {"trained": optimizer, "frozen": optax.set_to_zero()}
    return optax.partition(transforms, lambda params: jax.tree.map(labels.get, _is_lora(params)))


def freeze(params: Any) -> Any:
    """The parameters with gradients stopped at all but LoRA's, which the compiler then does not compute."""
    return jax.tree.map(lambda x, trained: x if trained else jax.lax.stop_gradient(x), params, _is_lora(params))


def _is_lora(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, leaf: path[-1].key.startswith("lora_"), params)


def _labels(params: Any) -> Any:
    """Muon for kernels, all of which are in the blocks; AdamW for embeddings, head, norms and biases."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: "muon" if path[-1].key == "kernel" else "adamw", params)


def _matrix_axes(params: Any) -> Any:
    """Which axes of a kernel [L, *inputs, *outputs] are inputs and which outputs."""

    def axes(path: tuple[Any, ...], kernel: Any) -> optax.contrib.MuonDimensionNumbers:
        first_output = 1 + n_input_axes(path_name(path))
        return optax.contrib.MuonDimensionNumbers(
            tuple(range(1, first_output)), tuple(range(first_output, kernel.ndim))
        )

    return jax.tree_util.tree_map_with_path(axes, params)


def _is_matrix(params: Any) -> Any:
    """True for kernels and embeddings; by name, since stacked biases have two axes."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in ("bias", "scale"), params)
