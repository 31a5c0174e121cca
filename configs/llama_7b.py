"""A 7B Llama: Llama 2's 32 layers of width 4,096 with Llama 3's grouped-query attention, and a context of 4,096 tokens.

    python train.py --config configs/llama_7b.py

Not yet run; docs/plan.md has its plan for v5p-128 (64 chips) with --mesh.data 4 --mesh.fsdp 16. It does not fit on 8
chips of v5e. Make data/fineweb as docs/data.md describes; tokenizer.json is the tokenizer of these shards.
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
