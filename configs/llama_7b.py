"""A 7B of the Llama 2 kind (32 layers, width 4,096), with Llama 3's grouped keys, on 4,096 tokens of context.

    python train.py --config configs/llama_7b.py

Planned, not run (docs/plan.md): on v5p-128 (64 chips) with --mesh.data 4 --mesh.fsdp 16 16.9 GiB of 95 a chip and 82
hours at least for 147 billion tokens; it does not fit 8 chips of v5e. data/fineweb holds the shards that docs/data.md
says how to make, and tokenizer.json is the one that made them.
"""

from gptjax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimizerConfig, TrainConfig

config = Config(
    data=DataConfig(source="data/fineweb", tokenizer="tokenizer.json"),
    model=ModelConfig(
        vocab_size=32_000,
        block_size=4096,
        n_layer=32,
        n_head=32,
        n_kv_head=8,
        n_embd=4096,
        mlp_width=14_336,
        activation="swiglu",
        norm="rmsnorm",
        position="rope",
        tied_head=False,
        remat="full",
    ),
    optimizer=OptimizerConfig(
        learning_rate=3e-4, min_learning_rate=3e-5, warmup_steps=2000, beta2=0.95, weight_decay=0.1, grad_clip=1.0
    ),
    train=TrainConfig(max_steps=35_000, batch_size=1024, accumulate=4, eval_interval=1000, eval_batches=8),
    mesh=MeshConfig(data=1, fsdp=-1),
)
