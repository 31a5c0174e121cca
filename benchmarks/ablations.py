"""What each idea of configs/speedrun.py is worth: python -m benchmarks.ablations CORPUS [--json]

Trains the recipe and, one at a time, the recipe with one idea replaced, each from three seeds, on the first nine tenths
of the training split, and prints the loss of the last tenth: the corpus's own validation split stays unseen.
Milliseconds are the median of a step, without evaluation.
"""

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.paired import circumstances
from gptjax import host
from gptjax.cli import load_config_file
from gptjax.config import Config

SEEDS = (1, 2, 3)
HEADER = "| change | loss, mean of three seeds | standard deviation | ms a step |\n" + "|---" * 4 + "|"
IDEAS: dict[str, dict[str, Any]] = {
    "the recipe": {},
    "AdamW at 1e-2 for the matrices too, not Muon": {"optimizer.matrix_optimizer": "adamw"},
    "learned positions, not RoPE": {"model.position": "learned"},
    "queries and keys not normalized": {"model.qk_norm": False},
    "embeddings not normalized": {"model.embedding_norm": False},
    "GELU, not squared ReLU": {"model.activation": "gelu_tanh"},
    "LayerNorm, not RMSNorm without weights": {"model.norm": "layernorm"},
    "output head tied to the token embedding": {"model.tied_head": True},
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
    config = replace(config, model=resolve(config.model, jax.devices()[0]))
    steps, seconds = compile_steps(config, mesh), []
    state = steps.init()

    def windows(text: np.ndarray, starts: np.ndarray) -> jax.Array:
        return jax.device_put(np.stack([text[i : i + length + 1] for i in starts])[None], batch_sharding(mesh))

    for step in range(config.train.max_steps):
        given = {"block_size": length, "batch_size": rows, "seed": config.train.seed, "step": step}
        given["order"] = config.data.order
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
    parser.add_argument("--rows", type=int, nargs="+", default=range(len(IDEAS)), help="rows of the table, from 0")
    parser.add_argument("--steps", type=int, help="optimizer steps; default: the recipe's")
    arguments = parser.parse_args()
    text = arguments.corpus.read_text()
    ids = {character: i for i, character in enumerate(sorted(set(text)))}
    split = np.array([ids[character] for character in text], np.int32)[: int(0.9 * len(text))]
    tokens, held_out = split[: int(0.9 * len(split))], split[int(0.9 * len(split)) :]
    recipe = load_config_file(Path("configs") / "speedrun.py")
    recipe = changed(recipe, {"model.vocab_size": len(ids), "model.dtype": arguments.dtype})
    if arguments.steps:
        recipe = changed(recipe, {"train.max_steps": arguments.steps})
    host.use_cores(recipe.train.batch_size, 0)
    if not arguments.json:
        print(HEADER)
    for name, changes in [list(IDEAS.items())[row] for row in arguments.rows]:
        runs = [train(changed(recipe, changes | {"train.seed": seed}), tokens, held_out) for seed in SEEDS]
        losses, ms = [loss for loss, _ in runs], 1e3 * statistics.median(seconds for _, seconds in runs)
        line = {"change": name, "losses": losses, "ms_per_step": ms}
        row = f"| {name} | {statistics.mean(losses):.4f} | {statistics.stdev(losses):.4f} | {ms:.1f} |"
        print(json.dumps(line | circumstances()) if arguments.json else row, flush=True)


if __name__ == "__main__":
    main()
