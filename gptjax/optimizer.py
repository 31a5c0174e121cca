"""The learning-rate schedule and the AdamW chain, from optax."""

from typing import Any

import jax
import optax

from gptjax.config import OptimizerConfig


def make_schedule(config: OptimizerConfig, max_steps: int) -> optax.Schedule:
    """Step -> learning rate: linear warm-up, then a cosine down to the floor at decay_steps, then the floor.

    Step n of the warm-up has (n + 1) / (warmup_steps + 1) of the peak, as in nanoGPT: the first is not lost on 0.
    """
    return optax.warmup_cosine_decay_schedule(
        init_value=config.learning_rate / (config.warmup_steps + 1),
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=max(config.decay_steps or max_steps, config.warmup_steps + 1),
        end_value=config.min_learning_rate,
    )


def make_optimizer(config: OptimizerConfig, max_steps: int, lora: bool = False) -> optax.GradientTransformation:
    """Global-norm clipping, then AdamW that decays matrices and embeddings but no bias and no LayerNorm.

    With `lora` only LoRA's parameters change, and only they have moments.
    Source: "Decoupled Weight Decay Regularization", algorithm 2; which parameters decay is nanoGPT's choice.
    """
    adamw = optax.adamw(
        make_schedule(config, max_steps),
        config.beta1,
        config.beta2,
        weight_decay=config.weight_decay,
        mask=_is_matrix,
    )
    clip = optax.clip_by_global_norm(config.grad_clip) if config.grad_clip else optax.identity()
    optimizer = optax.chain(clip, adamw)
    if not lora:
        return optimizer
    labels = {True: "trained", False: "frozen"}
    transforms = {"trained": optimizer, "frozen": optax.set_to_zero()}
    return optax.partition(transforms, lambda params: jax.tree.map(labels.get, _is_lora(params)))


def freeze(params: Any) -> Any:
    """Parameters through which gradients reach LoRA's alone, so that the compiler leaves out all others."""
    return jax.tree.map(lambda x, trained: x if trained else jax.lax.stop_gradient(x), params, _is_lora(params))


def _is_lora(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, leaf: path[-1].key.startswith("lora_"), params)


def _is_matrix(params: Any) -> Any:
    """True for kernels and embeddings; by name, since a layer axis leads the shapes of biases too."""

    def decays(path: tuple[Any, ...], leaf: Any) -> bool:
        return path[-1].key not in ("bias", "scale")

    return jax.tree_util.tree_map_with_path(decays, params)
