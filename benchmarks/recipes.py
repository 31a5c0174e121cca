"""Losses of two recipes at a tenth of their size: python -m benchmarks.recipes [--json]

Takes configs/gpt2_124m_muon.py and, as the rival, gpt2_124m_10b.py, halves layers, heads and width and quarters the
context, and trains both on the bundled plays with a BPE of 2,048 tokens: the same windows in the same order, from the
same seed, in float32. The warm-up shrinks with the number of steps, and the decay ends at the last one. Losses are nats
per token of the validation split after the last step. The rival has several learning rates (`--rates`), since that of a
large model may be too low for a small one in a few steps; ours has its own alone. Losses do not depend on how busy the
machine is.
"""

import argparse
import contextlib
import json
import sys
from dataclasses import asdict, replace

import numpy as np

from benchmarks.ablations import train
from benchmarks.paired import HEADER, ROOT, Result, circumstances
from gptjax import host
from gptjax.cli import load_config_file
from gptjax.config import Config, DataConfig
from gptjax.data import load_dataset

BASELINE, MODERN = "gpt2_124m_10b", "gpt2_124m_muon"
PLAYS = DataConfig(source="shakespeare", tokenizer="bpe", vocab_size=2048)


def scaled(config: Config, steps: int, rows: int) -> Config:
    """The recipe with half of its layers, heads and width and a quarter of its context, for so many steps."""
    model, optimizer = config.model, config.optimizer
    halved = {name: getattr(model, name) // 2 for name in ("n_layer", "n_head", "n_embd")}
    warmup_steps = round(optimizer.warmup_steps * steps / config.train.max_steps)
    return replace(
        config,
        data=replace(PLAYS, order=config.data.order),
        model=replace(model, **halved, block_size=model.block_size // 4, vocab_size=PLAYS.vocab_size, dtype="float32"),
        optimizer=replace(optimizer, warmup_steps=warmup_steps),
        train=replace(config.train, max_steps=steps, batch_size=rows, accumulate=1),
    )


def parameters(config: Config) -> int:
    """How many parameters a model has."""
    import jax

    from gptjax.model import param_shapes

    return sum(leaf.size for leaf in jax.tree.leaves(param_shapes(config.model)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object a line in place of a table")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of each run")
    parser.add_argument("--rows", type=int, default=8, help="windows in a batch")
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[1.0, 3.0], help="of the rival, as factors of its own"
    )
    arguments = parser.parse_args()
    host.use_cores(arguments.rows, 1)  # Muon's work on each device would be the same
    with contextlib.redirect_stdout(sys.stderr):
        dataset = load_dataset(PLAYS)
    text, held_out = (np.asarray(split.window(0, len(split)), np.int32) for split in (dataset.train, dataset.val))
    recipes = [load_config_file(ROOT / "configs" / f"{name}.py") for name in (MODERN, BASELINE)]
    ours, rival = (scaled(config, arguments.steps, arguments.rows) for config in recipes)

    def loss(config: Config) -> float:
        return train(config, text, held_out)[0]

    if not arguments.json:
        print(HEADER)
    ours_loss, tokens = loss(ours), arguments.steps * arguments.rows * ours.model.block_size
    print(f"{MODERN}: {ours_loss:.4f} nats", file=sys.stderr, flush=True)  # kept if the rival's runs are stopped
    size = f"{parameters(ours) / 1e6:.1f}M parameters against {parameters(rival) / 1e6:.1f}M, {tokens:,} tokens"
    for rate in arguments.rates:
        optimizer = rival.optimizer
        faster = {name: rate * getattr(optimizer, name) for name in ("learning_rate", "min_learning_rate")}
        rival_loss = loss(replace(rival, optimizer=replace(optimizer, **faster)))
        name = f"{BASELINE} at {rate * optimizer.learning_rate:.1e}"
        result = Result(f"validation loss, {MODERN} scaled down, against {name}, {size}", ours_loss, rival_loss, "nats")
        print(json.dumps(asdict(result) | circumstances()) if arguments.json else result.row(), flush=True)


if __name__ == "__main__":
    main()
