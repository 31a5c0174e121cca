"""What each idea of configs/speedrun.py is worth: python -m benchmarks.ablations CORPUS [--json]

Trains the recipe and, one at a time, the recipe without an idea or with another one, each from three seeds, on the
first nine tenths of the training split, and prints the loss of its last tenth: the corpus's own validation split is not
touched. Milliseconds are a step's, without evaluation.
"""

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from gptjax import host
from gptjax.cli import load_config_file
from gptjax.config import Config

SEEDS = (1, 2, 3)
HEADER = (
    "| change | loss, mean of three seeds | standard deviation | against the recipe | ms a step |\n" + "|---" * 5 + "|"
)
IDEAS: dict[str, dict[str, Any]] = {
    "the recipe": {},
    "AdamW at 1e-2 for matrices, not Muon": {"optimizer.matrix_optimizer": "adamw"},
    "AdamW at 3e-3 for all": {"optimizer.matrix_optimizer": "adamw", "optimizer.learning_rate": 3e-3},
    "learned positions, not RoPE": {"model.position": "learned"},
    "rope_theta 10,000, not 1,000": {"model.rope_theta": 10_000.0},
    "LayerNorm, not RMSNorm without weights": {"model.norm": "layernorm"},
    "GELU, not ReLU squared": {"model.activation": "gelu_tanh"},
    "SwiGLU, not ReLU squared": {"model.activation": "swiglu"},
    "queries and keys not normalized": {"model.qk_norm": False},
    "embeddings not normalized": {"model.embedding_norm": False},
    "logits capped at 15": {"model.logit_cap": 15.0},
    "head tied to the embedding": {"model.tied_head": True},
    "cosine decay, not linear": {"optimizer.schedule": "cosine"},
    "constant rate, then linear decay over the last 60%": {"optimizer.decay_fraction": 0.6},
    "a rate that falls to three tenths, not to zero": {"optimizer.min_learning_rate": 3e-3},
    "warm-up over 5 steps": {"optimizer.warmup_steps": 5},
    "beta2 0.99, not 0.95": {"optimizer.beta2": 0.99},
    "gradients not clipped": {"optimizer.grad_clip": 0.0},
    "MLP of 256, not 128": {"model.mlp_width": 256},
    "4 heads, not 2": {"model.n_head": 4},
    "1 layer, not 2": {"model.n_layer": 1},
    "4 layers": {"model.n_layer": 4},
    "24 windows a step, not 48": {"train.batch_size": 24},
    "half of Muon's rate": {"optimizer.muon_learning_rate": 0.05},
}


def changed(config: Config, changes: dict[str, Any]) -> Config:
    for name, value in changes.items():
        section, _, field = name.partition(".")
        config = replace(config, **{section: replace(getattr(config, section), **{field: value})})
    return config


def train(config: Config, tokens: np.ndarray, held_out: np.ndarray) -> tuple[float, float]:
    """The loss of the held-out tokens after the last step, and the median seconds of a step."""
    import jax

    from gptjax.data import batches
    from gptjax.resolve import resolve
    from gptjax.sharding import batch_sharding, make_mesh
    from gptjax.training import compile_steps

    length, rows = config.model.block_size, config.train.batch_size
    mesh = make_mesh(config.mesh, rows)
    config = replace(config, model=resolve(config.model, jax.default_backend()))
    steps, seconds = compile_steps(config, mesh), []
    state = steps.init()

    def windows(text: np.ndarray, starts: np.ndarray) -> jax.Array:
        return jax.device_put(np.stack([text[i : i + length + 1] for i in starts])[None], batch_sharding(mesh))

    for step in range(config.train.max_steps):
        given = {"block_size": length, "batch_size": rows, "seed": config.train.seed, "step": step}
        batch = windows(tokens, batches.starts(len(tokens), **given))
        start = time.perf_counter()
        state, metrics = steps.train(state, batch)
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - start)
    starts = np.arange(0, len(held_out) - length, length)
    whole = starts[: len(starts) // rows * rows].reshape(-1, rows)
    nats, n = np.sum([steps.evaluate(state.params, windows(held_out, part)) for part in whole], axis=0)
    return float(nats / n), statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", type=Path, help="tiny Shakespeare")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line in place of a table")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of activations")
    arguments = parser.parse_args()
    text = arguments.corpus.read_text()
    ids = {character: i for i, character in enumerate(sorted(set(text)))}
    split = np.array([ids[character] for character in text], np.int32)[: int(0.9 * len(text))]
    tokens, held_out = split[: int(0.9 * len(split))], split[int(0.9 * len(split)) :]
    recipe = load_config_file(Path("configs") / "speedrun.py")
    recipe = changed(recipe, {"model.vocab_size": len(ids), "model.dtype": arguments.dtype})
    host.use_cores(recipe.train.batch_size, 0)
    if not arguments.json:
        print(HEADER)
    base = None
    for name, changes in IDEAS.items():
        runs = [train(changed(recipe, changes | {"train.seed": seed}), tokens, held_out) for seed in SEEDS]
        losses, ms = [loss for loss, _ in runs], 1e3 * statistics.median(seconds for _, seconds in runs)
        mean, spread = statistics.mean(losses), statistics.stdev(losses)
        base = mean if base is None else base
        line = {"change": name, "losses": losses, "against_recipe": mean - base, "ms_per_step": ms}
        row = f"| {name} | {mean:.4f} | {spread:.4f} | {mean - base:+.4f} | {ms:.1f} |"
        print(json.dumps(line) if arguments.json else row, flush=True)


if __name__ == "__main__":
    main()
