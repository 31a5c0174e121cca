"""The plays of Shakespeare with Llama's architecture in miniature, which transformers, llama.cpp, Ollama and vLLM run.

    python train.py --config configs/shakespeare_llama.py

`gptjax export out/shakespeare_llama my-model.gguf` writes the file for llama.cpp. 2.6M parameters. Not yet run to its
end; the data and the number of tokens are those of shakespeare.py.
"""

from gptjax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig

config = Config(
    data=DataConfig(source="shakespeare", tokenizer="bpe", vocab_size=2048, order="epoch"),
    model=ModelConfig(
        n_layer=4,
        n_head=3,
        n_embd=192,
        mlp_width=512,
        block_size=128,
        activation="swiglu",
        norm="rmsnorm",
        position="rope",
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
    train=TrainConfig(max_steps=400, batch_size=32, eval_interval=50, eval_batches=10, save_interval=100),
)
