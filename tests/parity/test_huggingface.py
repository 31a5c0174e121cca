"""gptjax computes what `transformers` and nanoGPT compute from the same files, and writes folders that they read."""

import json
import math
import os
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.checkpoint import Checkpoints
from gptjax.config import Config, ModelConfig
from gptjax.export import main
from gptjax.hub.families import expected_tensors, read_config
from gptjax.hub.weights import open_weights
from gptjax.inference.generate import generate
from gptjax.inference.language_model import LanguageModel
from gptjax.inference.sampling import Sampling
from gptjax.model import GPT, rope_angles
from gptjax.tokenizer import Tokenizer

torch = pytest.importorskip("torch", reason="the reference is PyTorch; pip install 'gptjax[test]' brings it")
transformers = pytest.importorskip("transformers", reason="the reference; pip install 'gptjax[test]' brings it")

import tokenizers  # noqa: E402
from reference import Block, Reference, load  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers  # noqa: E402

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)  # more would only wait for each other at this size

LENGTH, N_NEW = 48, 32  # positions of a model; tokens of greedy text
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 400, "n_positions": LENGTH}
LLAMA = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 44,
    "vocab_size": 400,
    "max_position_embeddings": LENGTH,
}
# Of the eight pairs of features some turn as before, some slower by the factor and some in between.
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MHA = {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True}
ATTENTION_BIAS = {"attention_bias": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}
MQA = {"num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-2, "rope_parameters": LLAMA3_ROPE}
PADDED = {"vocab_size": 1030}  # to 1152 rows
QWEN3_WINDOW = {"head_dim": 8, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0}
CASES = {
    "gpt2": ("gpt2", GPT2),
    "gpt2-erf-n_inner-eps-untied-padded": (
        "gpt2",
        GPT2
        | PADDED
        | {"activation_function": "gelu", "n_inner": 52, "layer_norm_epsilon": 1e-2, "tie_word_embeddings": False},
    ),
    "llama-3-rope-mqa-eps": ("llama", LLAMA | MQA),
    "llama-mha-biases-tied-padded": ("llama", LLAMA | MHA | PADDED | {"tie_word_embeddings": True}),
    "llama-attention-biases": ("llama", LLAMA | ATTENTION_BIAS),
    "qwen2-gqa": ("qwen2", LLAMA | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "llama-head_dim": ("llama", LLAMA | {"head_dim": 12}),
    "mistral-window": ("mistral", LLAMA | {"head_dim": 12, "sliding_window": 9}),
    "mistral-odd-width": ("mistral", LLAMA | {"hidden_size": 30, "head_dim": 8, "sliding_window": None}),
    "qwen2-window": ("qwen2", LLAMA | {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0}),
    "qwen3": ("qwen3", LLAMA | {"head_dim": 12, "rms_norm_eps": 1e-2}),
    "qwen3-biases-window": ("qwen3", LLAMA | QWEN3_WINDOW | {"attention_bias": True, "tie_word_embeddings": True}),
    "smollm3": ("smollm3", LLAMA | {"no_rope_layer_interval": 2, "rope_parameters": {**LLAMA3_ROPE}}),
    "smollm3-biases-window": (
        "smollm3",
        LLAMA
        | {"num_hidden_layers": 3, "no_rope_layers": [1, 0, 1], "attention_bias": True, "mlp_bias": True}
        | {"use_sliding_window": True, "sliding_window": 9, "layer_types": ["sliding_attention"] * 3},
    ),
    "nanochat": ("nanochat", LLAMA | {"final_logit_softcapping": 3.0, "rms_norm_eps": 1e-2}),
    "nanochat-biases-mha-tied-padded": (
        "nanochat",
        LLAMA
        | PADDED
        | {"num_key_value_heads": 4, "attention_bias": True, "tie_word_embeddings": True}
        | {"final_logit_softcapping": None},
    ),
}
TEXTS = [
    "To be, or not to be: that is the question.",
    "  two  spaces\n\n\nnew lines\t tabs \r\n end ",
    "don't I'll WE'VE it's 'tis you'd",
    "naïve café — 你好，世界 🙂👩‍👩‍👧 e\u0301 \u212b ﬁ",
    "1234567 3.14 x=1;",
    "",
]


# Tiny models of transformers with weights far from their initialization, in folders such as people download

NO_MARKS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
# Qwen2.5's: contractions, words, single digits, signs with the newlines behind them, white space.
_QWEN_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = """\
{% for message in messages %}
    {% if loop.first and message.role != 'system' %}
<|im_start|>system
You are Bard, made of plays.<|im_end|>
    {% endif %}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""


@torch.no_grad()
def draw(model):
    """Draw weights that hide no mistake: norms vary around 1 by 0.3, biases around 0, kernels keep sizes.

    Queries and keys are larger and embeddings alike in length, so that greedy text looks back and soon is no loop.
    """
    generator = torch.Generator().manual_seed(0)
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


def make_model(family, fields):
    """A model of a family, in float32, with `fields` of its config."""
    config = transformers.AutoConfig.for_model(family, **NO_MARKS, **fields)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    draw(model)
    return model


def make_tokenizer():
    """A byte-level BPE of 400 tokens with Qwen2.5's rules, special tokens and a chat template."""
    library = tokenizers.Tokenizer(models.BPE())
    library.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(tokenizers.Regex(_QWEN_PIECES), "isolated")
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    library.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=397, initial_alphabet=alphabet, show_progress=False)
    corpus = "To be, or not to be: that is the question. Whether 'tis nobler in the mind to suffer\nThe slings don't "
    library.train_from_iterator([corpus * 3], trainer)
    library.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=library,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=CHAT_TEMPLATE,
    )


@torch.no_grad()
def their_logits(model, tokens_BT):
    return model(torch.from_numpy(tokens_BT).long()).logits.float().numpy()


def continue_greedily(model, prompt):
    """The tokens that `transformers` generates after a prompt, each the likeliest."""
    tokens = torch.from_numpy(prompt)[None].long()
    length = {"max_new_tokens": N_NEW, "min_new_tokens": N_NEW}
    made = model.generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=False, **length)
    return made[0, tokens.shape[1] :].tolist()


def save(model, folder, max_shard_size):
    """A folder with the model's weights, its config and a tokenizer."""
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def open_case(tmp_path_factory):
    """The case of that name, made once."""
    made = {}

    def open_case(name):
        if name not in made:
            model = make_model(*CASES[name])
            folder = save(model, tmp_path_factory.mktemp(name), "10KB" if "llama" in name else "1GB")
            assert len(list(folder.glob("*.safetensors"))) > 2 * ("llama" in name)
            tokens_BT = np.random.default_rng(1).integers(0, model.config.vocab_size, (3, LENGTH), np.int32)
            ours, logits_BTV = LanguageModel.load(str(folder)), their_logits(model, tokens_BT)
            made[name] = SimpleNamespace(
                model=model, folder=folder, ours=ours, tokens_BT=tokens_BT, logits_BTV=logits_BTV
            )
        return made[name]

    return open_case


@partial(jax.jit, static_argnums=0)
def forward(config, params, tokens_BT):
    return GPT(config).apply({"params": params}, tokens_BT)


def logits_of(config, params, tokens_BT):
    """Without those of padded ids."""
    return np.asarray(forward(config, params, jnp.asarray(tokens_BT)))[..., : config.vocab_size]


def assert_same_logits(actual_BTV, expected_BTV, atol=1e-4):
    """Logits of order 1 (asserted), of which float32 resolves 1e-7: sums in another order leave 1e-5 as measured."""
    assert 0.5 < expected_BTV.std() < 5
    np.testing.assert_allclose(actual_BTV, expected_BTV, rtol=0, atol=atol)
    np.testing.assert_array_equal(actual_BTV.argmax(-1), expected_BTV.argmax(-1))


def assert_same_tensors(folder, model, dtype):
    """The files hold the model's tensors, bit by bit and no others; a tied head is not among them."""
    expected = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del expected["lm_head.weight"]
    found = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == dtype and torch.equal(found[name], tensor.to(dtype)), name


def read_back(folder):
    """The model that `transformers` finds in a folder, which must lack and ignore nothing."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


# Logits and greedy text


@pytest.mark.parametrize("name", CASES)
def test_logits(name, open_case):
    case = open_case(name)
    assert_same_logits(logits_of(case.ours.config, case.ours.params, case.tokens_BT), case.logits_BTV)


GREEDY = ("gpt2", "llama-3-rope-mqa-eps", "qwen2-gqa", "mistral-window", "qwen3", "smollm3", "nanochat")


@pytest.mark.parametrize("name", GREEDY)
def test_greedy_text_with_the_cache_and_without(name, open_case):
    case = open_case(name)
    config, params, prompt = case.ours.config, case.ours.params, case.tokens_BT[0, :13]
    expected = continue_greedily(case.model, prompt)
    assert len(set(expected)) >= 5, "a text that repeats itself tells little"
    tokens_BT = case.tokens_BT.copy()
    tokens_BT[0] = [*prompt, *expected, *[0] * (LENGTH - 13 - N_NEW)]
    logits_TV = logits_of(config, params, tokens_BT)[0, 12 : 12 + N_NEW]
    assert np.diff(np.sort(logits_TV)[:, -2:]).min() > 2e-4, "a tie up to rounding, which cannot be compared"
    assert logits_TV.argmax(-1).tolist() == expected
    chunks = generate(config, params, [prompt], N_NEW, Sampling(temperature=0.0), [0])
    assert np.hstack([chunk.tokens_BC for chunk in chunks])[0].tolist() == expected


# Folders


@pytest.mark.parametrize("name", CASES)
def test_what_is_exported_comes_back(name, open_case, tmp_path):
    case, dtype = open_case(name), "bfloat16" if name == "qwen2-gqa" else "float32"
    main([str(case.folder), str(tmp_path / "out"), "--dtype", dtype])
    assert_same_tensors(tmp_path / "out", case.model, getattr(torch, dtype))
    again = read_back(tmp_path / "out")
    assert type(again) is type(case.model) and again.dtype == getattr(torch, dtype)
    if dtype == "float32":
        np.testing.assert_array_equal(their_logits(again, case.tokens_BT), case.logits_BTV)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    expected = make_tokenizer()
    for text in (*TEXTS, "<|im_start|>user\nHi<|im_end|>\n"):
        assert theirs(text).input_ids == expected(text).input_ids
    assert theirs.chat_template == CHAT_TEMPLATE and theirs.eos_token == "<|im_end|>"


@pytest.mark.parametrize("name", ["gpt2", "llama-mha-biases-tied-padded"])
@pytest.mark.parametrize("file_has", ["another head", "the same head", "the head alone"])
def test_a_head_beside_a_tied_embedding(name, file_has, open_case, tmp_path, capsys):
    """As in transformers, one of other values is used, and one alone is the embedding."""
    case, tensors = open_case(name), {}
    shutil.copytree(case.folder, tmp_path, dirs_exist_ok=True)
    for path in tmp_path.glob("*.safetensors"):
        tensors |= load_file(path)
        path.unlink()
    embedding = next(key for key in tensors if key.endswith(("wte.weight", "embed_tokens.weight")))
    tensors["lm_head.weight"] = tensors[embedding].clone()
    if file_has == "another head":
        tensors["lm_head.weight"] += 0.5 * torch.randn(tensors[embedding].shape, generator=torch.manual_seed(3))
    elif file_has == "the head alone":
        del tensors[embedding]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    ours, theirs = LanguageModel.load(str(tmp_path)), transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same_logits(logits_of(ours.config, ours.params, case.tokens_BT), their_logits(theirs.eval(), case.tokens_BT))
    differs = file_has == "another head"
    assert ours.config.tied_head is not differs and ("lm_head.weight differs" in capsys.readouterr().err) is differs


def test_a_run_is_exported(scramble, tmp_path):
    """Of a model with less than its family: LoRA is merged, and GPT-2's biases are zeros."""
    run, tokenizer = tmp_path / "run", Tokenizer.characters("\n ,.?abcdefghijklmnopqrstuvwxyzT")
    size = {"vocab_size": tokenizer.vocab_size, "n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 48}
    config = ModelConfig(**size, dtype="float32", activation="relu2", lora_rank=2)
    params = scramble(config)
    checkpoints = Checkpoints(run / "checkpoints" / "best")
    checkpoints.save(7, {}, params=params)
    checkpoints.close()
    (run / "config.json").write_text(Config(model=config).to_json())
    tokenizer.save(run / "tokenizer.json")
    main([str(run), str(tmp_path / "out")])
    verse = "To be, or not to be\n  that is the question?."
    ids, ours, theirs = tokenizer.encode(verse), LanguageModel.load(str(run)), read_back(tmp_path / "out")
    expected_BTV = logits_of(config, params, ids[None])
    assert_same_logits(logits_of(ours.config, ours.params, ids[None]), expected_BTV)
    # In float64: of two sums in float32 each is off by up to 6e-5, which varies with the CPU.
    assert_same_logits(their_logits(theirs.double(), ids[None]), expected_BTV)
    numbers = sum(tensor.numel() for tensor in theirs.parameters() if tensor.any())  # without biases of zero
    assert numbers == ours.n_params
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs(verse).input_ids == ids.tolist() and theirs.decode(ids.tolist()) == verse


# nanoGPT's ckpt.pt


class _ErfBlock(Block):
    def forward(self, x):  # nanoGPT's nn.GELU() is exact
        x = x + self.attend(self.ln_1(x))
        return x + self.mlp_proj(torch.nn.functional.gelu(self.c_fc(self.ln_2(x))))


class _TanhBlock(Block):
    def forward(self, x):  # as nanoGPT's own GELU before it had the option `bias`
        x = x + self.attend(self.ln_1(x))
        return x + self.mlp_proj(torch.nn.functional.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))


def nanogpt_name(name):
    """The name that a parameter of the reference has in nanoGPT."""
    name = name.replace("blocks.", "h.").replace("attn_proj", "attn.c_proj").replace("mlp_proj", "mlp.c_proj")
    return "transformer." + name.replace("c_attn", "attn.c_attn").replace("c_fc", "mlp.c_fc")


@pytest.mark.parametrize(("bias", "prefix"), [(True, "_orig_mod."), (False, ""), (None, "")], ids=str)
def test_nanogpts_checkpoint(bias, prefix, scramble, tmp_path):
    """Compiled, without biases, and of a time when biases were no option."""
    tokenizer = Tokenizer.characters("\n abcdefghijklmnopqrstuvwxyz.,;:!?")
    size = {"vocab_size": tokenizer.vocab_size, "n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 48}
    config = ModelConfig(**size, bias=bias is not False, dtype="float32")
    reference = Reference(config)
    block = _TanhBlock if bias is None else _ErfBlock
    reference.blocks = torch.nn.ModuleList(block(config, 0.0) for _ in range(config.n_layer))
    load(reference, scramble(config))
    state = {nanogpt_name(name): tensor for name, tensor in reference.state_dict().items()}
    state["lm_head.weight"] = state["transformer.wte.weight"]
    state["transformer.h.0.attn.bias"] = torch.ones(1, 1, 48, 48).tril()
    checkpoint = {
        "model": {prefix + name: tensor for name, tensor in state.items()},
        "model_args": size | {"dropout": 0.2} | ({} if bias is None else {"bias": bias}),
        "iter_num": 1,
        "best_val_loss": torch.tensor(1.5),
    }
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    tokenizer.save(tmp_path / "tokenizer.json")
    activation = "gelu_tanh" if bias is None else "gelu_erf"
    assert open_weights(tmp_path / "ckpt.pt").config == replace(config, activation=activation, dtype="auto")
    ours = LanguageModel.load(str(tmp_path / "ckpt.pt"))
    tokens_BT = np.random.default_rng(0).integers(0, config.vocab_size, (2, 48), np.int32)
    expected_BTV = reference(torch.from_numpy(tokens_BT).long()).detach().numpy()
    assert_same_logits(logits_of(ours.config, ours.params, tokens_BT), expected_BTV)
    main([str(tmp_path / "ckpt.pt"), str(tmp_path / "out")])
    assert_same_logits(their_logits(read_back(tmp_path / "out"), tokens_BT), expected_BTV)


# The published models: names, shapes and numbers, without the weights

SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
PUBLISHED = {
    "mistral": (
        dict(zip(SIZES, (4096, 14336, 32, 32, 8), strict=True))
        | {"vocab_size": 32000, "max_position_embeddings": 32768, "sliding_window": 4096}
        | {"rms_norm_eps": 1e-05, "rope_theta": 10000.0, "tie_word_embeddings": False},
        7_241_732_096,
    ),
    "qwen3": (
        dict(zip(SIZES, (1024, 3072, 28, 16, 8), strict=True))
        | {"vocab_size": 151936, "max_position_embeddings": 40960, "head_dim": 128, "attention_bias": False}
        | {"sliding_window": None, "use_sliding_window": False, "max_window_layers": 28}
        | {"rms_norm_eps": 1e-06, "rope_theta": 1000000, "rope_scaling": None, "tie_word_embeddings": True},
        596_049_920,
    ),
    "smollm3": (
        dict(zip(SIZES, (2048, 11008, 36, 16, 4), strict=True))
        | {"vocab_size": 128256, "max_position_embeddings": 65536, "attention_bias": False, "mlp_bias": False}
        | {"no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0] * 9, "layer_types": ["full_attention"] * 36}
        | {"rms_norm_eps": 1e-06, "rope_theta": 5000000.0, "use_sliding_window": False, "sliding_window": None},
        3_075_098_624,
    ),
    "nanochat": (
        dict(zip(SIZES, (2048, 8192, 32, 16, 16), strict=True))
        | {"vocab_size": 65536, "max_position_embeddings": 2048, "final_logit_softcapping": 15.0}
        | {"rms_norm_eps": 1e-06, "tie_word_embeddings": False, "rope_parameters": {"rope_theta": 10000.0}},
        1_879_048_192,
    ),
    "gpt2": (
        GPT2 | {"n_embd": 1600, "n_layer": 48, "n_head": 25, "n_positions": 1024, "vocab_size": 50257},
        1_557_611_200,
    ),
    "qwen2": (
        {
            "hidden_size": 896,
            "intermediate_size": 4864,
            "max_position_embeddings": 32768,
            "num_attention_heads": 14,
            "num_hidden_layers": 24,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0,
            "sliding_window": 32768,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
        494_032_768,
    ),
    "llama": (
        {
            "attention_bias": False,
            "head_dim": 64,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "max_position_embeddings": 131072,
            "mlp_bias": False,
            "num_attention_heads": 32,
            "num_hidden_layers": 16,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_theta": 500000.0,
            "rope_scaling": {
                **LLAMA3_ROPE,
                "factor": 32.0,
                "original_max_position_embeddings": 8192,
                "rope_theta": 5e5,
            },
            "tie_word_embeddings": True,
            "vocab_size": 128256,
        },
        1_235_814_400,
    ),
}


@pytest.mark.parametrize("family", PUBLISHED)
def test_names_shapes_and_numbers_of_published_models(family, tmp_path):
    """GPT-2 XL, Llama-3.2-1B, Mistral-7B, Qwen2.5-0.5B, Qwen3-0.6B, SmolLM3-3B and nanochat d32."""
    values, n_params = PUBLISHED[family]
    (tmp_path / "config.json").write_text(json.dumps(values | {"model_type": family}))
    theirs, (_, config) = transformers.AutoConfig.from_pretrained(tmp_path), read_config(tmp_path / "config.json")
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(theirs)
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    if theirs.tie_word_embeddings:
        del expected["lm_head.weight"]  # the embedding under another name
    found = {key: tensor.shape for key, tensor in expected_tensors(config, family).items()}
    assert found == expected
    assert sum(math.prod(shape) for shape in found.values()) == n_params
    assert_same_numbers(config, theirs)


def assert_same_numbers(config, theirs):
    """What no shape shows: epsilon, activation, positions, a tied head and the rotary embedding's angles."""
    assert (config.block_size, config.tied_head) == (theirs.max_position_embeddings, theirs.tie_word_embeddings)
    if theirs.model_type == "gpt2":
        assert (config.norm_eps, config.mlp_width) == (theirs.layer_norm_epsilon, theirs.n_inner or 0)
        assert (config.activation, theirs.activation_function) == ("gelu_tanh", "gelu_new")
        return
    activation = ("relu2", "relu2") if theirs.model_type == "nanochat" else ("swiglu", "silu")
    assert (config.norm_eps, config.activation, theirs.hidden_act) == (theirs.rms_norm_eps, *activation)
    assert config.bias == getattr(theirs, "attention_bias", False) == getattr(theirs, "mlp_bias", False)
    assert config.window == (theirs.sliding_window if theirs.model_type == "mistral" else 0)
    assert config.nope_interval == getattr(theirs, "no_rope_layer_interval", 0)
    assert config.logit_cap == getattr(theirs, "final_logit_softcapping", 0)
    assert config.kv_heads == theirs.num_key_value_heads
    assert_same_angles(config, theirs)


def assert_same_angles(config, theirs):
    module = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(theirs)
    angle_H = rope_angles(config, jnp.ones((1, 1), jnp.int32))[0, 0]
    np.testing.assert_allclose(angle_H, module.inv_freq.numpy(), rtol=1e-6)  # float32's last places
    assert module.attention_scaling == 1


BOTH = {"rope_type": "default", "rope_theta": 1e6}


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_scaling": LLAMA3_ROPE, "rope_parameters": LLAMA3_ROPE},
        {"rope_scaling": {**LLAMA3_ROPE, "type": "llama3"}, "rope_theta": 3e4},
        {"rope_scaling": {"type": "default"}, "rope_parameters": BOTH, "rope_theta": 1e6},
        {"rope_scaling": None, "rope_parameters": BOTH, "rope_theta": 1e4},
        {"rope_scaling": {}, "rope_theta": 3e4},
    ],
    ids=str,
)
def test_every_spelling_of_the_rotary_fields(fields, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **LLAMA, **fields}))
    config = read_config(tmp_path / "config.json")[1]
    assert_same_angles(config, transformers.AutoConfig.from_pretrained(tmp_path))


@pytest.mark.parametrize("family", PUBLISHED)
def test_fields_that_a_config_leaves_out(family, tmp_path):
    """They have the defaults of transformers."""
    needed = {"gpt2": ["n_layer", "n_head", "n_embd"]}.get(family, [*LLAMA][:-2])
    values = {name: (GPT2 | LLAMA)[name] for name in ["vocab_size", *needed]}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, **values}))
    config = read_config(tmp_path / "config.json")[1]
    assert_same_numbers(config, transformers.AutoConfig.from_pretrained(tmp_path))


# Tokenizers


@pytest.fixture(scope="module")
def tokenized(open_case):
    case = open_case("qwen2-gqa")
    return case.ours, transformers.AutoTokenizer.from_pretrained(case.folder)


def test_ids_of_texts(tokenized):
    ours, theirs = tokenized
    for text in TEXTS:
        assert ours.tokenizer.encode(text).tolist() == theirs(text).input_ids
        assert ours.tokenizer.decode(theirs(text).input_ids) == theirs.decode(theirs(text).input_ids)
        prompt = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        assert ours.tokenizer.prompt(prompt).tolist() == theirs(prompt).input_ids
        assert len(ours.tokenizer.encode(prompt)) > len(theirs(prompt).input_ids) + 10, "in a text they are characters"


@pytest.mark.parametrize("system", [None, "You are  terse.\n"])
def test_ids_of_a_chat(tokenized, system):
    ours, theirs = tokenized
    talk = [("user", "Who's there?\n\n"), ("assistant", " 你好 🙂 <|im_end"), ("user", TEXTS[3])]
    for turns in (talk[:1], talk):
        messages = [{"role": "system", "content": system}] if system else []
        messages += [{"role": role, "content": text} for role, text in turns]
        expected = theirs.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)["input_ids"]
        assert ours.chat_prompt(messages).tolist() == expected
        messages[-1]["content"] += "<|im_end|>\n<|im_start|>system\n"  # which no user can write
        assert np.isin(ours.chat_prompt(messages), list(ours.stop_tokens)).sum() == len(messages) + (system is None)
    assert ours.stop_tokens == {theirs.convert_tokens_to_ids(name) for name in ("<|im_end|>", "<|endoftext|>")}


def test_ids_of_gpt2():
    data = Path(os.environ.get("GPTJAX_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
    folder = data / "gpt2"
    if not (folder / "vocab.bpe").exists():
        pytest.skip(f"{folder} has no encoder.json and vocab.bpe of GPT-2; GPTJAX_TEST_DATA names the folder above it")
    ours = Tokenizer.from_name_or_path(str(folder))
    merges = [tuple(line.split()) for line in (folder / "vocab.bpe").read_text("utf-8").splitlines()[1:] if line]
    vocabulary = json.loads((folder / "encoder.json").read_text("utf-8"))
    theirs = transformers.GPT2Tokenizer(vocab=vocabulary, merges=merges)
    assert ours.vocab_size == len(theirs) == 50257
    for text in (*TEXTS, "Ünïcödé \u3000\xa0x\u200b", "HE'LL we're 'LL", "     \n  ", "\x00\x7f", " <|endoftext"):
        assert ours.encode(text).tolist() == theirs(text).input_ids
    text = "one<|endoftext|>two <|endoftext|>\n"
    assert ours.prompt(text).tolist() == theirs(text).input_ids
    assert theirs(text).input_ids.count(50256) == 2 and 50256 not in ours.encode(text)
    assert ours.encode("Hello world").tolist() == [15496, 995]
