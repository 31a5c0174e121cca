"""The default: a small modern GPT on the complete plays of Shakespeare, with a BPE of 2,048 tokens.

    python train.py --config configs/shakespeare.py

Two cores of an AMD EPYC (Zen 3), Python 3.11, jax 0.10.2, float32: 6 min 8 s from the command to the report, and a
loss of 3.814 nats per token on the whole validation split, 1.450 per character. 2.6M parameters. The ideas are those of
speedrun.py (docs/speedrun.md).
"""

from gptjax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig

config = Config(
    data=DataConfig(source="shakespeare", tokenizer="bpe", vocab_size=2048, order="epoch"),
    model=ModelConfig(
        n_layer=4,
        n_head=3,
        n_embd=192,
        block_size=128,
        activation="relu2",
        norm="nonparametric_rmsnorm",
        position="rope",
        rope_theta=1000.0,
        qk_norm=True,
        embedding_norm=True,
        logit_cap=15.0,
        tied_head=False,
    ),
    optimizer=OptimizerConfig(
        learning_rate=5e-3,
        min_learning_rate=0.0,
        warmup_steps=10,
        schedule="linear",
        decay_fraction=0.8,
        beta2=0.95,
        weight_decay=0.0,
        matrix_optimizer="muon",
        muon_learning_rate=0.05,
    ),
    train=TrainConfig(max_steps=360, batch_size=32, eval_interval=40, eval_batches=5, save_interval=40),
)
