"""Reaches the loss of nanoGPT's CPU recipe in a seventh of nanoGPT's time.

    python train.py --config configs/speedrun.py

Two cores of an AMD EPYC (Zen 4), Python 3.11, jax 0.10.2, float32: 19 s from the command to a loss of 1.881 on the
whole validation split; nanoGPT's recipe in PyTorch with torch.compile takes 139 s to 1.916 on the same machine (python
-m benchmarks.time_to_loss FILE). docs/speedrun.md measures the ideas. The corpus is downloaded; without a network pass
--data.source FILE.
"""

from gptjax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig

config = Config(
    data=DataConfig(
        source="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    ),
    model=ModelConfig(
        n_layer=2,
        n_head=2,
        n_embd=128,
        mlp_width=128,
        block_size=64,
        activation="relu2",
        norm="nonparametric_rmsnorm",
        position="rope",
        rope_theta=1000.0,
        qk_norm=True,
        embedding_norm=True,
        tied_head=False,
    ),
    optimizer=OptimizerConfig(
        learning_rate=1e-2,
        min_learning_rate=0.0,
        warmup_steps=0,
        schedule="linear",
        decay_fraction=1.0,
        beta2=0.95,
        weight_decay=0.0,
        matrix_optimizer="muon",
        muon_learning_rate=0.1,
    ),
    train=TrainConfig(max_steps=130, batch_size=48, eval_interval=130, save_interval=130, log_interval=10),
)
