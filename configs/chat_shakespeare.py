"""The model of shakespeare.py, fine-tuned on the dialogues of the plays so that it can be talked to.

    python train.py --config configs/chat_shakespeare.py

Starts from out/shakespeare, the run of `python train.py --config configs/shakespeare.py`. The loss of held-out answers
falls from 4.412 to 3.747 nats per token. The run takes 7 minutes of processor time (AMD EPYC, Zen 3).
"""

from gptjax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig

config = Config(
    init_from="out/shakespeare",
    data=DataConfig(source="shakespeare-dialogues", format="chat"),
    model=ModelConfig(block_size=64),
    optimizer=OptimizerConfig(learning_rate=5e-4, min_learning_rate=5e-5, warmup_steps=20),
    train=TrainConfig(max_steps=1000, batch_size=16, eval_interval=250, eval_batches=40, save_interval=250),
)
