"""GPT-2 124M, fine-tuned on the complete plays of Shakespeare with nanoGPT's recipe of the same name.

    python train.py --config configs/finetune_shakespeare.py

Downloads GPT-2 from the Hugging Face hub; `--init_from FOLDER` reads it from a folder. One optimizer step is 32 windows
of 1,024 tokens, 8 at a time. `--model.lora_rank 8 --optimizer.learning_rate 3e-4` trains low-rank updates only: 1.3M
parameters instead of 124M, with 0.9 GiB less memory. Not yet run to its end.
"""

from gptjax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig

config = Config(
    init_from="openai-community/gpt2",
    data=DataConfig(source="shakespeare"),
    model=ModelConfig(block_size=1024, dropout=0.0),
    optimizer=OptimizerConfig(learning_rate=3e-5, min_learning_rate=3e-5, warmup_steps=0),
    train=TrainConfig(max_steps=100, batch_size=32, accumulate=4, eval_interval=10, save_interval=50, patience=3),
)
