"""nanoGPT's README recipe for a CPU with the same hyperparameters: 4 layers, 4 heads, width 128, context 64.

    python train.py --config configs/nanogpt_cpu.py

Two cores of an AMD EPYC (Zen 5): 52 s to a loss of 1.904 on the whole validation split. Seeds 1, 2, 4 and 1337 give
1.905, 1.914, 1.924 and 1.910; nanoGPT gives 1.898, 1.891 and 1.908 with seeds 1337, 1 and 2. The corpus is downloaded;
without a network pass --data.source FILE.
"""

from gptjax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig

config = Config(
    data=DataConfig(
        source="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    ),
    model=ModelConfig(n_layer=4, n_head=4, n_embd=128, block_size=64, bias=False, dropout=0.0),
    optimizer=OptimizerConfig(
        learning_rate=1e-3,
        min_learning_rate=1e-4,
        warmup_steps=100,
        beta1=0.9,
        beta2=0.99,
        weight_decay=0.1,
        grad_clip=1.0,
    ),
    train=TrainConfig(max_steps=2000, batch_size=12, eval_interval=250, seed=3),
)
