"""Tiny models of `transformers` with weights far from their initialization, in folders such as people download."""

from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)  # more would only wait for each other at this size

NO_MARKS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
# Qwen2.5's: contractions, words, single digits, signs with the newlines behind them, white space.
_QWEN_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = """\
{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are Bard, made of plays.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' or message.role == 'assistant' %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


@torch.no_grad()
def scramble(model: torch.nn.Module, seed: int = 0) -> None:
    """Draw weights that hide no mistake: norms vary around 1 by 0.3, biases around 0, kernels keep sizes.

    Queries and keys are larger and embeddings alike in length, so that greedy text looks back and soon is no loop.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.named_parameters():
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("bias"):
            tensor.copy_(0.3 * noise)
        elif tensor.dim() == 1:
            tensor.copy_(1 + 0.3 * noise)
        elif any(part in name for part in ("wte", "embed_tokens", "lm_head")):
            tensor.copy_(2 * noise / noise.norm(dim=1, keepdim=True))
        elif "wpe" in name:
            tensor.copy_(0.3 * noise)
        else:
            conv1d = type(model).__name__.startswith("GPT2")  # keeps [in, out] where a Linear keeps [out, in]
            larger = next((n for part, n in (("c_attn", 2.0), ("q_proj", 1.5), ("k_proj", 1.5)) if part in name), 1.0)
            tensor.copy_(larger * noise * tensor.shape[0 if conv1d else 1] ** -0.5)


def make_model(family: str, seed: int = 0, **fields: Any) -> Any:
    """A scrambled model of a family, in float32, with `fields` of its config."""
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(family, **NO_MARKS, **fields)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    scramble(model, seed)
    return model


def make_tokenizer(vocab_size: int = 400) -> Any:
    """A byte-level BPE with Qwen2.5's rules, special tokens and a chat template; below 300 ids it lacks some bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet()) if vocab_size >= 300 else []
    library = tokenizers.Tokenizer(models.BPE())
    library.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(tokenizers.Regex(_QWEN_PIECES), "isolated")
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    library.decoder = decoders.ByteLevel()
    size = min(vocab_size, 400) - len(_SPECIAL)
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    corpus = "To be, or not to be: that is the question. Whether 'tis nobler in the mind to suffer\nThe slings don't "
    library.train_from_iterator([corpus * 3], trainer)
    library.add_special_tokens(_SPECIAL)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=library,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=CHAT_TEMPLATE,
    )


@torch.no_grad()
def logits_of(model: Any, tokens_BT: Any) -> Any:
    return model(torch.from_numpy(tokens_BT).long()).logits.float().numpy()


def continue_greedily(model: Any, prompt: Any, n: int, **rules: Any) -> list[int]:
    """The n tokens that `transformers` generates after a prompt, each the likeliest."""
    tokens = torch.from_numpy(prompt)[None].long()
    mask = torch.ones_like(tokens)
    made = model.generate(tokens, attention_mask=mask, do_sample=False, max_new_tokens=n, min_new_tokens=n, **rules)
    return made[0, tokens.shape[1] :].tolist()


def save(model: Any, folder: Path, **arguments: Any) -> Path:
    """A folder with the model's weights, its config and a tokenizer."""
    model.save_pretrained(folder, **arguments)
    make_tokenizer(model.config.vocab_size).save_pretrained(folder)
    return folder
