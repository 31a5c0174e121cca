"""nanoGPT's published loss on tiny Shakespeare, 1.4697 nats a character on an A100, by two CPU cores in three minutes.

    python train.py --config configs/speedrun_long.py

From the command to the loss of a character on the whole validation split, Python 3.12, jax 0.12: 166 s to 1.4665 on
two cores of an Intel Xeon with AMX, in bfloat16; in float32 287 s to 1.4676 there and 561 s on two of Zen 3. Tokens
are pieces of words, learned from the training split, 2.4 characters each, where nanoGPT's are characters: the report
has the loss of a character beside that of a token. What else was tried is in docs/speedrun.md. The corpus is
downloaded; without a network pass --data.source FILE.
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
        dropout=0.05,
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
    train=TrainConfig(max_steps=330, batch_size=16, eval_interval=110, save_interval=330, log_interval=10),
)
