"""GPT-2 124M on OpenWebText with nanoGPT's recipe: 0.5M tokens per step, 600,000 steps.

    python train.py --config configs/gpt2_124m.py

Not yet run; nanoGPT's README reports a loss of 2.85 after 4 days on 8 A100s. Needs several GPUs or TPUs. Make
data/openwebtext as docs/data.md describes, or put there the train.bin and val.bin that nanoGPT's
data/openwebtext/prepare.py writes. On a smaller machine raise --train.accumulate; the batch and the result stay the
same.
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
