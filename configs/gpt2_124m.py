"""GPT-2 124M on OpenWebText, after nanoGPT's reproduction: 0.5M tokens a step, 600,000 steps.

    python train.py --config configs/gpt2_124m.py

Wants a machine with several accelerators (nanoGPT's README: 4 days on 8 A100s to 2.85); not run here.
data/openwebtext holds the shards that docs/data.md says how to make, or the train.bin and val.bin that nanoGPT's
data/openwebtext/prepare.py writes. On a smaller machine raise --train.accumulate: the batch, and so the result, stays
the same.
"""

from gptjax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig

config = Config(
    data=DataConfig(source="data/openwebtext", tokenizer="gpt2"),
    model=ModelConfig(n_layer=12, n_head=12, n_embd=768, block_size=1024, bias=False, dropout=0.0, remat="dots"),
    optimizer=OptimizerConfig(
        learning_rate=6e-4, min_learning_rate=6e-5, warmup_steps=2000, beta2=0.95, weight_decay=0.1, grad_clip=1.0
    ),
    train=TrainConfig(
        max_steps=600_000, batch_size=512, accumulate=4, eval_interval=1000, eval_batches=200, save_interval=1000
    ),
)
