"""Damaged, hostile or unsupported folders and files are refused in one line that names them, and no code is run."""

import json
import pickle
import re
import shutil
import struct
from dataclasses import make_dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gptjax.config import ModelConfig, option
from gptjax.errors import UserError
from gptjax.hub import families
from gptjax.hub.families import expected_tensors, family_of, read_config
from gptjax.hub.init_from import open_pretrained
from gptjax.hub.weights import open_weights
from gptjax.inference.language_model import LanguageModel
from gptjax.tokenizer import Tokenizer

GPT2 = {"model_type": "gpt2", "vocab_size": 20, "n_positions": 8, "n_layer": 2, "n_head": 2, "n_embd": 4}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 20,
    "max_position_embeddings": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "hidden_size": 4,
    "intermediate_size": 6,
    "tie_word_embeddings": False,
}
CONFIGS = {"gpt2": GPT2, "llama": LLAMA} | {
    family: LLAMA | {"model_type": family, "head_dim": 2}
    for family in ("mistral", "qwen2", "qwen3", "smollm3", "nanochat")
}
# A kernel, a vector and a tensor that is in no layer.
NAMES = {
    "gpt2": ["transformer.h.1.attn.c_attn.weight", "transformer.h.0.ln_1.bias", "transformer.wpe.weight"],
    "llama": ["model.layers.1.self_attn.k_proj.weight", "model.norm.weight", "lm_head.weight"],
    "mistral": ["model.layers.1.mlp.down_proj.weight", "model.layers.1.input_layernorm.weight", "lm_head.weight"],
    "qwen2": ["model.layers.0.mlp.gate_proj.weight", "model.layers.1.self_attn.k_proj.bias", "lm_head.weight"],
    "qwen3": ["model.layers.0.mlp.gate_proj.weight", "model.layers.1.self_attn.k_norm.weight", "lm_head.weight"],
    "smollm3": ["model.layers.1.self_attn.q_proj.weight", "model.norm.weight", "model.embed_tokens.weight"],
    "nanochat": ["model.layers.0.mlp.fc1.weight", "model.layers.1.self_attn.q_proj.weight", "lm_head.weight"],
}
LLAMA3 = {"rope_type": "llama3", "factor": 2, "original_max_position_embeddings": 4}
WINDOW = {"use_sliding_window": True, "sliding_window": 4}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ALPHABET = "abcdefghijklmnopqrst"


class Trap:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


@pytest.fixture
def sprung(tmp_path):
    """The file that a trap makes; none of a test's traps may make it."""
    path = tmp_path / "sprung"
    pickle.loads(pickle.dumps(Trap(path)))
    assert path.exists(), "the trap does not work"
    path.unlink()
    yield path
    assert not path.exists(), "code in the file was run"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder of each family, which opens."""
    parent = tmp_path_factory.mktemp("whole")
    for family, values in CONFIGS.items():
        folder = parent / family
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(values))
        expected = expected_tensors(*reversed(read_config(folder / "config.json")))
        save_file({name: np.ones(tensor.shape, np.float32) for name, tensor in expected.items()}, folder / WEIGHTS)
        Tokenizer.characters(ALPHABET).save(folder / "tokenizer.json")
        open_weights(folder)
    return parent


@pytest.fixture
def make(whole, tmp_path):
    """A copy of a family's folder."""
    return lambda family="gpt2": shutil.copytree(whole / family, tmp_path / family)


def refusal(path, *words, read=open_weights):
    with pytest.raises(UserError) as caught:
        read(path if read in (open_weights, read_config) else str(path))
    message = str(caught.value)
    assert message.isprintable() and len(message) < 700
    for word in (str(path), *words):
        assert word in message, message
    return message


def change_tensors(folder, changes):
    """Replace tensors by name, or remove those that become None."""
    tensors = load_file(folder / WEIGHTS) | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / WEIGHTS)


def split(folder):
    """Spread the tensors over two files with an index; the tensors' files."""
    tensors = load_file(folder / WEIGHTS)
    weight_map = {name: f"model-{1 + i % 2}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    open_weights(folder)
    return weight_map


def test_whatever_reads_a_model_refuses_it_alike(make):
    folder = make()
    assert len(LanguageModel.load(str(folder)).tokenizer.encode("abc")) == 3
    change_tensors(folder, {NAMES["gpt2"][0]: None})
    readers = (open_weights, LanguageModel.load, open_pretrained)
    assert len({refusal(folder, "lacks the tensor", read=read) for read in readers}) == 1
    with pytest.raises(UserError, match="'/no/such/folder' does not exist"):
        LanguageModel.load("/no/such/folder")


# Files


def test_folders_without_weights(make, tmp_path, sprung):
    (tmp_path / "empty").mkdir()
    refusal(tmp_path / "empty", "has no config.json")
    folder = make()
    (folder / WEIGHTS).unlink()
    refusal(folder, f"has no {WEIGHTS} and no {INDEX}")
    for name in ("pytorch_model.bin", "model.pt", "consolidated.00.pth"):
        (folder / name).write_bytes(pickle.dumps(Trap(sprung)))
        refusal(folder, f"has no {WEIGHTS}", f"{name} could run code when it is read: convert it to safetensors")
        (folder / name).unlink()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", INDEX, WEIGHTS])
def test_a_pickle_in_place_of_a_file(name, make, sprung):
    folder = make()
    if name == INDEX:
        split(folder)
    (folder / name).write_bytes(pickle.dumps(Trap(sprung)))
    refusal(folder, str(folder / name), read=LanguageModel.load)


def test_an_index_may_name_only_files_of_its_folder(make):
    folder = make()
    weight_map = split(folder)
    for name in (
        "../../etc/passwd",
        "/etc/passwd",
        "../gpt2/model-1.safetensors",
        "sub/../model-1.safetensors",
        "",
        "..",
    ):
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map | {min(weight_map): name}}))
        refusal(folder, f"names {name!r}, which is not a file of its own folder")
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model-2.safetensors").unlink()
    refusal(folder, f"lacks model-2.safetensors, which {INDEX} names")
    for text in ("", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "[" * 100_000):
        (folder / INDEX).write_text(text)
        refusal(folder, INDEX)


def test_a_damaged_file(make):
    path = make() / WEIGHTS
    content = path.read_bytes()
    lie = json.dumps({NAMES["gpt2"][0]: {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 192]}}).encode()
    headers = [struct.pack("<Q", len(header)) + header for header in (b"", b"[]", b"\xff{}", lie)]
    for damaged in (content[:-1], content + b"\0", b"", struct.pack("<Q", 2**63) + content[8:], *headers):
        path.write_bytes(damaged)
        refusal(path.parent, f"{WEIGHTS} is not a safetensors file, or is damaged", "download it again")
    path.unlink()
    path.mkdir()
    refusal(path.parent, f"cannot read {path}")


# Tensors


@pytest.mark.parametrize("family", CONFIGS)
def test_tensors_that_are_not_those_of_the_config(family, make):
    folder = make(family)
    for name in NAMES[family]:
        tensor = load_file(folder / WEIGHTS)[name]
        change_tensors(folder, {name: None})
        refusal(folder, f"lacks the tensor {name} {list(tensor.shape)} that its config asks for")
        wrong = np.concatenate([tensor, tensor[:1]])
        change_tensors(folder, {name: wrong})
        refusal(folder, f"{name} is {list(wrong.shape)}, and its config asks for {list(tensor.shape)}")
        change_tensors(folder, {name: tensor})
    for name in ("transformer.h.2.ln_1.bias", "model.layers.0.self_attn.o_proj.bias", "two\nlines", "\x1b[2Jcleared"):
        change_tensors(folder, {name: np.ones((3, 2), np.float32)})
        refusal(folder, f"has a tensor {name!r} [3, 2] that its config has no place for")
        change_tensors(folder, {name: None})
    open_weights(folder)


def test_weights_of_another_dtype_or_in_two_files(make):
    folder, name = make(), NAMES["gpt2"][0]
    tensor = load_file(folder / WEIGHTS)[name]
    for dtype in ("int64", "bool", "float64"):
        change_tensors(folder, {name: tensor.astype(dtype)})
        refusal(folder, WEIGHTS, name, "only F32, BF16, F16 are read")
    change_tensors(folder, {name: tensor})
    for file in set(split(folder).values()):
        save_file(load_file(folder / file) | {name: tensor}, folder / file)
    refusal(folder, f"{name!r} twice")


# config.json


@pytest.fixture
def refuses(tmp_path):
    """Checks that a config.json is refused, and the words of the refusal."""
    path = tmp_path / "config.json"

    def check(content, *words):
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        assert refusal(path, *words, read=read_config).count("config.json") == 1

    return check


def test_a_config_that_is_no_json_object(refuses, tmp_path):
    for text in ("", "{", "[]", "null", "{'a': 1}", "[" * 100_000, "{} {}"):
        refuses(text, "JSON")
    (tmp_path / "config.json").write_bytes(b'{"model_type": "\xff"}')
    refusal(tmp_path / "config.json", "is not JSON", read=read_config)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_every_number_of_a_config_is_needed_and_plausible(family, refuses):
    values = CONFIGS[family]
    numbers = [name for name, value in values.items() if type(value) is int]
    assert len(numbers) >= 5
    for name in numbers:
        optional = name in ("n_positions", "max_position_embeddings", "num_key_value_heads")
        if not optional:
            refuses({key: value for key, value in values.items() if key != name}, f"has no {name}")
        for wrong in ("4", [4], -4, 4.5, True, 10**9, 10**30, *([] if name == "num_key_value_heads" else [None])):
            refuses(values | {name: wrong})
        if name not in ("intermediate_size", "num_key_value_heads"):
            refuses(values | {name: 0})


@pytest.mark.parametrize(
    ("family", "fields", "word"),
    [
        ("gpt2", {"n_head": 3}, "n_embd"),
        ("gpt2", {"n_inner": 10**30}, "mlp_width"),
        ("gpt2", {"layer_norm_epsilon": "1e-5"}, "'1e-5'"),
        ("gpt2", {"layer_norm_epsilon": 0}, "norm_eps"),
        ("gpt2", {"layer_norm_epsilon": float("nan")}, "norm_eps"),
        ("gpt2", {"layer_norm_epsilon": 10**400}, ""),
        ("gpt2", {"tie_word_embeddings": "no"}, "tied_head"),
        ("gpt2", {"activation_function": "relu"}, "activation_function 'relu'"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention=True"),
        ("llama", {"num_attention_heads": 4}, "rotary positions need an even width"),
        ("llama", {"num_key_value_heads": 3}, "n_kv_head"),
        ("llama", {"rope_theta": "1e4"}, "'1e4'"),
        ("llama", {"rope_scaling": LLAMA3 | {"factor": "2"}}, "'2'"),
        ("llama", {"rope_scaling": LLAMA3 | {"factor": 0.5}}, "rope_factor"),
        ("llama", {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 0}}, "rope_original_block_size"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 2}}, "original_max_position_embeddings"),
        ("llama", {"rope_scaling": LLAMA3 | {"high_freq_factor": 8.0}}, "high_freq_factor=8.0"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type 'linear'"),
        ("llama", {"rope_parameters": {"rope_theta": "much"}}, "'much'"),
        ("llama", {"hidden_act": "relu"}, "hidden_act='relu'"),
        ("llama", {"head_dim": 3}, "head_dim=3 with 2 heads is 3 a head: rotary positions need an even width"),
        ("llama", {"head_dim": "2"}, ""),
        ("mistral", {"sliding_window": 0}, "sliding_window=0"),
        ("mistral", {"sliding_window": "4"}, ""),
        ("mistral", {"sliding_window": 4, "layer_types": ["full_attention", "sliding_attention"]}, "some layers"),
        ("qwen3", WINDOW | {"max_window_layers": 1}, "only some layers attend to 4 tokens"),
        ("smollm3", WINDOW | {"no_rope_layer_interval": 2}, "only some layers attend to 4 tokens"),
        ("smollm3", {"no_rope_layers": [0, 1]}, "no_rope_layers=[0, 1]"),
        ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers=[1]"),
        ("smollm3", {"no_rope_layer_interval": "4"}, "nope_interval"),
        ("smollm3", {"no_rope_layer_interval": -4}, "nope_interval"),
        ("smollm3", {"mlp_bias": True}, "mlp_bias=True"),
        ("nanochat", {"hidden_act": "silu"}, "hidden_act='silu'"),
        ("nanochat", {"final_logit_softcapping": -1.0}, "logit_cap"),
        ("llama", {"mlp_bias": True}, "mlp_bias=True"),
        ("qwen2", WINDOW | {"max_window_layers": 1}, "use_sliding_window=True"),
        ("qwen2", WINDOW | {"layer_types": ["full_attention", "sliding_attention"]}, "use_sliding_window=True"),
        ("qwen2", {"rope_parameters": {"rope_theta": 1e6}, "rope_scaling": {"type": "yarn"}}, "contradict each other"),
        ("llama", {"rope_parameters": {"rope_theta": 1e6}, "rope_scaling": {"factor": 1.0}}, "contradict each other"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ("qwen2", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e6}}, "rope_type 'longrope'"),
        *(("gpt2", {"model_type": kind}, f"model_type {kind!r}") for kind in ("gemma2", "GPT2", None, ["gpt2"])),
    ],
    ids=str,
)
def test_a_config_of_another_model(family, fields, word, refuses):
    refuses(CONFIGS[family] | fields, word)


@pytest.mark.parametrize("fields", [{}, {"layer_types": ["full_attention"] * 2}, {"sliding_window": 8}], ids=str)
def test_a_sliding_window_that_hides_nothing_is_accepted(fields, make):
    """No layer has it (28 is the first by default), or it is as long as the context."""
    folder = make("qwen2")
    (folder / "config.json").write_text(json.dumps(CONFIGS["qwen2"] | WINDOW | {"max_window_layers": 28} | fields))
    open_weights(folder)


# A model of ours as one of a family

ROPE = {"activation": "swiglu", "norm": "rmsnorm", "position": "rope"}
NANOCHAT = {"activation": "relu2", "norm": "nonparametric_rmsnorm", "position": "rope", "qk_norm": True}
NANOCHAT |= {"embedding_norm": True}


def test_a_family_must_have_every_field_that_a_model_uses():
    assert family_of(ModelConfig(rope_theta=5.0, rope_factor=2.0, n_kv_head=6)) == "gpt2"
    assert family_of(ModelConfig(activation="relu2", bias=True, mlp_width=20, tied_head=False)) == "gpt2"
    assert family_of(ModelConfig(**ROPE, mlp_width=4 * 384, rope_original_block_size=5, bias=True)) == "llama"
    assert family_of(ModelConfig(**ROPE, qkv_bias=True, n_kv_head=2, rope_factor=2.0)) == "qwen2"
    assert family_of(ModelConfig(**ROPE, head_dim=32)) == "llama"
    assert family_of(ModelConfig(**ROPE, head_dim=32, window=7)) == "mistral"
    assert family_of(ModelConfig(**ROPE, head_dim=32, n_embd=100)) == "mistral"
    assert family_of(ModelConfig(**ROPE, qk_norm=True, qk_norm_scale=True, window=7)) == "qwen3"
    assert family_of(ModelConfig(**ROPE, nope_interval=3, qkv_bias=True, out_bias=True)) == "smollm3"
    assert family_of(ModelConfig(**NANOCHAT, n_kv_head=2, logit_cap=15.0, rope_theta=3.0)) == "nanochat"
    for fields, word in [
        ({"qk_norm": True}, "model.qk_norm=True"),
        ({"embedding_norm": True}, "model.embedding_norm=True"),
        ({"logit_cap": 15.0}, "model.logit_cap=15.0"),
        ({"norm": "nonparametric_rmsnorm"}, "model.norm='nonparametric_rmsnorm'"),
        ({"qkv_bias": True}, "model.qkv_bias=True"),
        ({"n_kv_head": 2}, "model.n_kv_head=2"),
        ({"activation": "swiglu"}, "model.activation='swiglu'"),
        (ROPE | {"norm": "layernorm"}, "model.norm='layernorm'"),
        (ROPE | {"activation": "relu2"}, "model.activation='relu2'"),
        (ROPE | {"bias": True, "qkv_bias": True}, "model.bias=True"),
        (ROPE | {"logit_cap": 15.0}, "model.logit_cap=15.0"),
        (ROPE | {"qk_norm": True}, "model.qk_norm=True"),
        (ROPE | {"window": 5, "bias": True}, "model.bias=True"),
        (ROPE | {"nope_interval": 2, "qk_norm": True, "qk_norm_scale": True}, "model.qk_norm=True"),
        ({"window": 5}, "model.window=5"),
        (NANOCHAT | {"qk_norm": False}, "model.qk_norm=False"),
        (NANOCHAT | {"embedding_norm": False}, "model.embedding_norm=False"),
        (NANOCHAT | {"activation": "swiglu"}, "model.activation='swiglu'"),
        (NANOCHAT | {"window": 5}, "model.window=5"),
    ]:
        with pytest.raises(UserError, match=f"{re.escape(word)} is in no Hugging Face family"):
            family_of(ModelConfig(**fields))


@pytest.mark.parametrize("fields", [{}, ROPE], ids=["gpt2", "llama"])
def test_a_field_that_no_family_knows_is_refused(fields, monkeypatch):
    """Whatever is added to ModelConfig, nothing here has to be told of it."""
    added = [("depth_scale", float, option(1.0, "of a branch")), ("epochs", int, option(1, "", architecture=False))]
    larger = make_dataclass("ModelConfig", added, bases=(ModelConfig,), frozen=True)
    monkeypatch.setattr(families, "ModelConfig", larger)
    assert family_of(larger(**fields, epochs=2)) == family_of(ModelConfig(**fields))
    with pytest.raises(UserError, match="model.depth_scale=0.5 is in no Hugging Face family"):
        family_of(larger(**fields, depth_scale=0.5))


# nanoGPT's ckpt.pt

ARGUMENTS = {"n_layer": 2, "n_head": 2, "n_embd": 4, "block_size": 8, "bias": True, "vocab_size": 20, "dropout": 0.0}


@pytest.fixture
def checkpoint():
    torch = pytest.importorskip("torch", reason="nanoGPT's ckpt.pt is PyTorch's")
    expected = expected_tensors(ModelConfig(activation="gelu_erf", **ARGUMENTS), "nanogpt")
    model = {name: torch.ones(tensor.shape) for name, tensor in expected.items()}
    return {"model": model, "model_args": dict(ARGUMENTS), "iter_num": 1, "config": {"dataset": "x"}}


@pytest.fixture
def saved(tmp_path):
    """Writes a ckpt.pt with a tokenizer beside it."""
    torch = pytest.importorskip("torch", reason="nanoGPT's ckpt.pt is PyTorch's")
    Tokenizer.characters(ALPHABET).save(tmp_path / "tokenizer.json")

    def save(content, **arguments):
        torch.save(content, tmp_path / "ckpt.pt", **arguments)
        return tmp_path / "ckpt.pt"

    return save


@pytest.mark.parametrize("place", ["pickle", "whole", "config", "model_args", "model", "tensor", "legacy"])
def test_a_checkpoint_with_a_trap(place, saved, checkpoint, sprung):
    trap = Trap(sprung)
    if place in ("config", "model_args", "model", "legacy"):
        checkpoint["config" if place == "legacy" else place] = trap
    elif place == "tensor":
        checkpoint["model"]["transformer.wte.weight"] = trap
    path = saved(trap if place == "whole" else checkpoint, _use_new_zipfile_serialization=place != "legacy")
    if place == "pickle":
        path.write_bytes(pickle.dumps(trap))
    for read in (open_weights, open_pretrained, LanguageModel.load):
        message = refusal(path, "is no checkpoint of nanoGPT that can be read without running code", read=read)
        assert "weights_only" not in message, "PyTorch's advice on how to run the code"


def test_files_that_are_no_checkpoint(saved, checkpoint):
    path = saved(checkpoint)
    open_weights(path)
    content = path.read_bytes()
    for damaged in (b"", b"PK", b"text\n", content[: len(content) // 2], content[:-30]):
        path.write_bytes(damaged)
        refusal(path, "is no checkpoint of nanoGPT that can be read")
    parts = [checkpoint | {name: value} for name in ("model", "model_args") for value in (None, 3, [1], "text")]
    for content in (3, [], {}, {"model": {}}, {"model_args": {}}, "text", *parts):
        refusal(saved(content), "is no checkpoint of nanoGPT that can be read")


def test_the_tensors_of_a_checkpoint_are_those_of_its_config(saved, checkpoint):
    name, model = "transformer.h.1.attn.c_attn.weight", dict(checkpoint["model"])
    checkpoint["model"] = {key: tensor for key, tensor in model.items() if key != name}
    refusal(saved(checkpoint), f"lacks the tensor {name} [12, 4] that its config asks for")
    checkpoint["model"] = model | {name: model[name].T}
    refusal(saved(checkpoint), f"{name} is [4, 12], and its config asks for [12, 4]")
    checkpoint["model"] = model | {"extra": model[name][0]}
    refusal(saved(checkpoint), "has a tensor 'extra' [4] that its config has no place for")
    for wrong in (3, "weights", model[name].long(), model[name] * 1j, model[name].to_sparse()):
        checkpoint["model"] = model | {name: wrong}
        refusal(saved(checkpoint), name, "is no tensor of float32, bfloat16 or float16")


def test_arguments_of_a_checkpoint_that_are_not_nanogpts(saved, checkpoint):
    arguments = checkpoint["model_args"]
    for name, value in [("n_layer", "2"), ("n_head", 0), ("n_embd", -4), ("vocab_size", None), ("dropout", 2.0)]:
        checkpoint["model_args"] = arguments | {name: value}
        refusal(saved(checkpoint), name)
    for name, value in [("n_kv_head", 1), ("position", "rope"), ("norm", "rmsnorm"), ("mlp_width", 4)]:
        checkpoint["model_args"] = arguments | {name: value}
        refusal(saved(checkpoint), f"nanoGPT's model has no {name}")


# Tokenizers and files beside the weights


def test_a_tokenizer_must_fit_the_model(make, saved, checkpoint):
    folder, path = make(), saved(checkpoint)
    Tokenizer.characters(ALPHABET + "uvw").save(folder / "tokenizer.json")
    refusal(folder, "tokenizer.json has 23 tokens and the model 20", read=LanguageModel.load)
    (path.parent / "tokenizer.json").unlink()
    refusal(path, "put its tokenizer.json beside it", read=LanguageModel.load)


@pytest.mark.parametrize("name", ["gpt2", "bpe"])
def test_a_folder_with_the_name_of_a_keyword_has_its_own_tokenizer(name, whole, tmp_path, monkeypatch):
    shutil.copytree(whole / "gpt2", tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert LanguageModel.load(name).tokenizer.vocab_size == 20
    assert Tokenizer.from_name_or_path(open_pretrained(name).tokenizer).vocab_size == 20


def test_broken_side_files(make):
    folder = make()
    for name in ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).write_text("[]")
        refusal(folder, str(folder / name), read=LanguageModel.load)
        (folder / name).unlink()
