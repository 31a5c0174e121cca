"""The size, data and tokens of gpt2_124m_10b.py with a modern architecture, and Muon for the matrices of the blocks.

    python train.py --config configs/gpt2_124m_muon.py

RMSNorm without weights, rotary positions, normalized queries and keys, squared ReLU, 6 heads of 128, no biases; the
head stays tied, so the model has no more parameters. Not yet run; `python -m benchmarks.recipes` compares the losses of
both recipes on the plays, at a tenth of the parameters. The closest published run is modded-nanogpt's of 14 October
2024, whose README states 15.2 minutes on 8 H100s to a loss of 3.28 on FineWeb; it has 5,100 steps of 0.5M tokens
(--train.max_steps 5100). Learning rates and their linear decay are near those of that run.
"""

from gptjax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig

config = Config(
    data=DataConfig(source="data/fineweb-edu", tokenizer="gpt2", order="epoch"),
    model=ModelConfig(
        n_layer=12,
        n_head=6,
        n_embd=768,
        block_size=1024,
        activation="relu2",
        norm="nonparametric_rmsnorm",
        position="rope",
        qk_norm=True,
        embedding_norm=True,
    ),
    optimizer=OptimizerConfig(
        learning_rate=3.6e-3,
        min_learning_rate=0.0,
        warmup_steps=0,
        schedule="linear",
        decay_fraction=0.3,
        beta2=0.95,
        weight_decay=0.0,
        matrix_optimizer="muon",
        muon_learning_rate=0.01,
    ),
    train=TrainConfig(max_steps=18_865, batch_size=512, accumulate=4, eval_interval=250, save_interval=500),
)
