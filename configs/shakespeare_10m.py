"""nanoGPT's 10M character model of tiny Shakespeare: 6 layers, 6 heads, width 384, context 256, dropout 0.2.

    python train.py --config configs/shakespeare_10m.py

For one GPU or TPU; not yet run to its end. nanoGPT's README reports a loss of 1.4697 after 3 minutes on an A100. The
corpus is downloaded; without a network pass --data.source FILE.
"""

from gptjax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig

config = Config(
    data=DataConfig(
        source="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    ),
    model=ModelConfig(n_layer=6, n_head=6, n_embd=384, block_size=256, bias=False, dropout=0.2),
    optimizer=OptimizerConfig(learning_rate=1e-3, min_learning_rate=1e-4, warmup_steps=100, beta2=0.99),
    train=TrainConfig(max_steps=5000, batch_size=64, eval_interval=250),
)
