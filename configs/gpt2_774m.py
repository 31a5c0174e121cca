"""GPT-2 large, 774M parameters, on OpenWebText with the recipe of gpt2_124m.py: 0.5M tokens per step.

    python train.py --config configs/gpt2_774m.py

Not yet run. `python -m gptjax.plan --config configs/gpt2_774m.py --topology v5e-8 --search` finds the mesh and the
micro-steps for 8 chips of v5e, with the memory and hours of the run. The learning rate is GPT-3's for this size (table
2.1). data/openwebtext is that of gpt2_124m.py.
"""

from gptjax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig

config = Config(
    data=DataConfig(source="data/openwebtext", tokenizer="gpt2"),
    model=ModelConfig(n_layer=36, n_head=20, n_embd=1280, block_size=1024, bias=False, dropout=0.0, remat="dots"),
    optimizer=OptimizerConfig(
        learning_rate=2.5e-4, min_learning_rate=2.5e-5, warmup_steps=2000, beta2=0.95, weight_decay=0.1, grad_clip=1.0
    ),
    train=TrainConfig(
        max_steps=600_000, batch_size=512, accumulate=8, eval_interval=1000, eval_batches=200, save_interval=1000
    ),
)
