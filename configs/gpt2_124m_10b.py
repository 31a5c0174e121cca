"""GPT-2 124M on ten billion tokens of FineWeb-Edu, each read once: 18,865 steps of 0.5M tokens, the recipe of llm.c.

    python -m gptjax.data tokenize 'hf://datasets/HuggingFaceFW/fineweb-edu/sample/10BT/*.parquet' \\
        --out data/fineweb-edu
    python train.py --config configs/gpt2_124m_10b.py

Not yet run. llm.c's scripts/run_gpt2_124M.sh has these hyperparameters, with FineWeb in place of FineWeb-Edu; the
README of modded-nanogpt reports for it a validation loss of 3.28 on FineWeb after 45 minutes on 8 H100s, which says
little of the loss on another text. docs/plan.md has hours and prices for TPUs, H100s and one RTX 4090. A smaller
machine needs more --train.accumulate; the batch and the result stay the same.
"""

from gptjax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig

config = Config(
    data=DataConfig(source="data/fineweb-edu", tokenizer="gpt2", order="epoch"),
    model=ModelConfig(n_layer=12, n_head=12, n_embd=768, block_size=1024, bias=True),
    optimizer=OptimizerConfig(
        learning_rate=6e-4, min_learning_rate=0.0, warmup_steps=700, beta2=0.95, weight_decay=0.1, grad_clip=1.0
    ),
    train=TrainConfig(max_steps=18_865, batch_size=512, accumulate=4, eval_interval=250, save_interval=500),
)
