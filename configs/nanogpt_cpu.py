from gptjax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig

config = Config(
    data=DataConfig(source="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"),
    model=ModelConfig(n_layer=4, n_head=4, n_embd=128, block_size=64, bias=False, dropout=0.0),
    optimizer=OptimizerConfig(learning_rate=1e-3, min_learning_rate=1e-4, warmup_steps=100, beta2=0.99),
    train=TrainConfig(max_steps=2000, batch_size=12, eval_interval=250),
)
