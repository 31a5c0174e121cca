"""Below nanoGPT's published loss on tiny Shakespeare, 1.4697 nats per character on an A100, on two CPU cores.

    python train.py --config configs/speedrun_long.py

Two cores of an AMD EPYC (Zen 4), Python 3.12, jax 0.12, bfloat16: 4 min 9 s from the command to a loss of 1.4532 nats
per character on the whole validation split. A token is a piece of a word, 2.4 characters on average, from a BPE
trained on the training split; report.md states the loss per character beside that per token. The corpus is downloaded;
without a network pass --data.source FILE.
"""

from gptjax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig

config = Config(
    data=DataConfig(
        source="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        tokenizer="bpe",
        vocab_size=1024,
    ),
    model=ModelConfig(
        n_layer=4,
        n_head=4,
        n_embd=256,
        block_size=256,
        activation="relu2",
        norm="nonparametric_rmsnorm",
        position="rope",
        rope_theta=1000.0,
        qk_norm=True,
        embedding_norm=True,
        logit_cap=15.0,
        tied_head=False,
        dropout=0.1,
        attention_dropout=0.0,
    ),
    optimizer=OptimizerConfig(
        learning_rate=5e-3,
        min_learning_rate=0.0,
        warmup_steps=10,
        schedule="linear",
        decay_fraction=0.8,
        beta2=0.95,
        weight_decay=0.1,
        matrix_optimizer="muon",
        muon_learning_rate=0.05,
        muon_weight_decay=0.1,
    ),
    train=TrainConfig(max_steps=420, batch_size=16, eval_interval=140, save_interval=420, log_interval=10),
)
