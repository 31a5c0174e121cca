"""nanoGPT's README recipe for a CPU in PyTorch, from the corpus to the loss of the whole validation split."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.works import config_of
from tests.parity.reference import Reference, Trainer

EVAL_INTERVAL, EVAL_BATCHES = 250, 20


def whole_run(corpus: str, seed: int = 1337) -> tuple[dict[str, Any], Callable[[], float]]:
    """Train for 2,000 steps; the facts are the last loss of all of the split's windows."""
    config, text = config_of("nanogpt_cpu"), Path(corpus).read_text()
    ids = {character: i for i, character in enumerate(sorted(set(text)))}
    tokens = np.array([ids[character] for character in text], np.uint16)
    train, val = tokens[: int(0.9 * len(tokens))], tokens[int(0.9 * len(tokens)) :]
    block, batch = config.model.block_size, config.train.batch_size
    torch.manual_seed(seed)
    reference = Reference(config.model)
    for name, parameter in reference.named_parameters():  # GPT-2's, as nanoGPT draws them
        if parameter.dim() >= 2:
            std = 0.02 / (2 * config.model.n_layer) ** 0.5 if "proj" in name else 0.02
            torch.nn.init.normal_(parameter, std=std)
    reference.loss = torch.compile(reference.loss)
    trainer = Trainer(reference, config.optimizer, config.train.max_steps)

    def windows(split: np.ndarray, starts: Any) -> torch.Tensor:
        return torch.stack([torch.from_numpy(split[i : i + block + 1].astype(np.int64)) for i in starts])

    def batches(split: np.ndarray) -> torch.Tensor:
        return windows(split, torch.randint(len(split) - block, (batch,)).tolist())

    for step in range(config.train.max_steps + 1):
        if step % EVAL_INTERVAL == 0:
            with torch.no_grad():
                for split in (train, val):
                    for _ in range(EVAL_BATCHES):
                        reference.loss(batches(split)).item()
        if step < config.train.max_steps:
            trainer.train([batches(train)])
    starts = np.arange(0, len(val) - block - 1, block)
    with torch.no_grad():
        rows = [windows(val, part) for part in np.array_split(starts, -(-len(starts) // batch)) if len(part)]
        losses = [reference.loss(row).item() for row in rows]
    return {"loss": float(np.average(losses, weights=[len(row) for row in rows]))}, lambda: 0.0
