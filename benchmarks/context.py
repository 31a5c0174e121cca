"""What the two ways past block_size cost and lose: python -m benchmarks.context RUN

One JSON line: nats per token of the same 4,096 places of the validation text, each seen through the context that
sample.py --context exact or refill gives it, and tokens per second of one stream of both, in turn.
"""

import json
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gptjax.data.prepare import load_dataset
from gptjax.inference.generate import Sampling, generate
from gptjax.model import GPT
from gptjax.run_dir import load_run

PLACES, ROUNDS = 4096, 5


def main(folder: Path) -> None:
    config, params, tokenizer = load_run(folder, "best")
    model = config.model.sampled_on(jax.default_backend())
    tokens, block = load_dataset(config.data).val, model.block_size
    ends = np.random.default_rng(0).integers(block, len(tokens), PLACES)

    @jax.jit
    def nats(context_BT, length_B, target_B):
        logits_BTV = GPT(model).apply({"params": params}, context_BT)
        logits_BV = jnp.take_along_axis(logits_BTV, length_B[:, None, None] - 1, axis=1)[:, 0]
        return optax.softmax_cross_entropy_with_integer_labels(logits_BV, target_B)

    def loss(lengths: np.ndarray) -> float:
        total = 0.0
        for batch in np.split(np.arange(PLACES), PLACES // 64):
            rows = [tokens.window(ends[i] - lengths[i], lengths[i]) for i in batch]
            context = np.stack([np.pad(row, (0, block - len(row))) for row in rows]).astype(np.int32)
            target = np.array([tokens.window(ends[i], 1)[0] for i in batch], np.int32)
            total += float(nats(context, lengths[batch], target).sum())
        return total / PLACES

    prompts, n_new, rates = [tokenizer.prompt()], 8 * block, {"exact": [], "refill": []}
    for context in ["exact", "refill"] * (ROUNDS + 1):
        start = time.perf_counter()
        list(generate(model, params, prompts, n_new, Sampling(context=context), seeds=[0]))
        rates[context].append(n_new / (time.perf_counter() - start))
    result = {
        "name": f"context {folder.name}",
        "exact_nats": loss(np.full(PLACES, block)),
        "refill_nats": loss(block // 2 + np.arange(PLACES) % (block - block // 2 + 1)),
        **{f"{context}_tokens_per_second": statistics.median(rates[context][1:]) for context in rates},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
