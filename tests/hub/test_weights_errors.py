"""Folders and files that are damaged, hostile or of another kind: one line that names them, and no code is run."""

import json
import pickle
import re
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gptjax.config import Config, ModelConfig
from gptjax.errors import UserError
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
CONFIGS = {"gpt2": GPT2, "llama": LLAMA, "qwen2": LLAMA | {"model_type": "qwen2"}}
# A kernel, a vector and a tensor that is in no layer.
NAMES = {
    "gpt2": ["transformer.h.1.attn.c_attn.weight", "transformer.h.0.ln_1.bias", "transformer.wpe.weight"],
    "llama": ["model.layers.1.self_attn.k_proj.weight", "model.norm.weight", "lm_head.weight"],
    "qwen2": ["model.layers.0.mlp.gate_proj.weight", "model.layers.1.self_attn.k_proj.bias", "lm_head.weight"],
}
EVERY_NAME = [(family, name) for family, names in NAMES.items() for name in names]
LLAMA3 = {"rope_type": "llama3", "factor": 2, "original_max_position_embeddings": 4}
ALPHABET = "abcdefghijklmnopqrst"


class Trap:
    """Reading it with pickle makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


@pytest.fixture
def sprung(tmp_path):
    """The file that a trap makes; none may, of those that the test sets."""
    path = tmp_path / "sprung"
    pickle.loads(pickle.dumps(Trap(path)))
    assert path.exists(), "the trap does not work"
    path.unlink()
    yield path
    assert not path.exists(), "code of the file was run"


@pytest.fixture
def make(tmp_path):
    """A whole folder of a family."""

    def make(family="gpt2", **fields):
        folder = tmp_path / family
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(CONFIGS[family] | fields))
        rng = np.random.default_rng(0)
        expected = expected_tensors(*reversed(read_config(folder / "config.json")))
        tensors = {name: rng.normal(size=shape).astype(np.float32) for name, (shape, _) in expected.items()}
        save_file(tensors, folder / "model.safetensors")
        Tokenizer.characters(ALPHABET).save(folder / "tokenizer.json")
        return folder

    return make


def refusal(path, *parts):
    """The one line that all who read a model give."""
    messages = set()
    for read in (lambda: open_weights(path), lambda: LanguageModel.load(str(path)), lambda: open_pretrained(str(path))):
        with pytest.raises(UserError) as caught:
            read()
        messages.add(re.sub(r"tensor `.*?`", "tensor", str(caught.value)))  # the library names any of several
    assert len(messages) == 1
    message = messages.pop()
    plain = message.isprintable() or "Type-check error" in message  # beartype's words, which tests alone see
    assert plain and len(message) < 700 and "Traceback" not in message
    for part in (str(path), *parts):
        assert part in message, message
    return message


def change_config(folder, **fields):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | fields))


def change_tensors(folder, **tensors):
    path = folder / "model.safetensors"
    changed = load_file(path) | {name: tensor for name, tensor in tensors.items()}
    save_file({name: tensor for name, tensor in changed.items() if tensor is not None}, path)


def read_raw(path):
    content = path.read_bytes()
    [n_header] = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + n_header]), content[8 + n_header :]


def write_raw(path, header, data, n_header=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header) if n_header is None else n_header) + header + data)


@pytest.mark.parametrize("family", CONFIGS)
def test_the_folder_itself_is_good(family, make):
    """Else what follows would be refused for another reason; likewise its parts in two files."""
    folder = make(family)
    assert len(LanguageModel.load(str(folder)).tokenizer.encode("abc")) == 3
    shards(folder)
    open_weights(folder)
    header, data = read_raw(folder / "model-1.safetensors")
    write_raw(folder / "model-1.safetensors", header, data)
    open_weights(folder)


# Files


def shards(folder):
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[: len(names) // 2], "model-2.safetensors": names[len(names) // 2 :]}
    for file, some in parts.items():
        save_file({name: tensors[name] for name in some}, folder / file)
    weight_map = {name: file for file, some in parts.items() for name in some}
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"qk_norm": True}, "model.qk_norm=True"),
        ({"embedding_norm": True}, "model.embedding_norm=True"),
        ({"logit_cap": 15.0}, "model.logit_cap=15.0"),
        ({"norm": "nonparametric_rmsnorm"}, "model.norm=nonparametric_rmsnorm"),
        ({"activation": "relu2", "norm": "rmsnorm", "position": "rope"}, "activation=relu2"),
    ],
)
@pytest.mark.parametrize("base", [{}, {"activation": "swiglu", "norm": "rmsnorm", "position": "rope"}])
def test_a_model_of_ours_that_no_family_has(base, fields, named):
    with pytest.raises(UserError) as error:
        family_of(ModelConfig(**base | fields))
    assert named in str(error.value) and "Hugging Face family" in str(error.value) and "\n" not in str(error.value)


def test_no_folder_and_an_empty_one(tmp_path, make):
    (tmp_path / "empty").mkdir()
    refusal(tmp_path / "empty", "has no config.json")
    folder = make()
    (folder / "model.safetensors").unlink()
    refusal(folder, "has no model.safetensors and no model.safetensors.index.json")
    with pytest.raises(UserError, match="'/no/such/folder' does not exist"):
        LanguageModel.load("/no/such/folder")


def test_a_pickle_in_place_of_the_weights(make, sprung):
    folder = make()
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        (folder / "model.safetensors").write_bytes(pickle.dumps(Trap(sprung), protocol))
        refusal(folder, "model.safetensors is not a safetensors file, or is damaged")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_a_folder_of_pickles_alone(name, make, sprung):
    folder = make()
    (folder / "model.safetensors").rename(folder / "other")
    (folder / name).write_bytes(pickle.dumps(Trap(sprung)))
    refusal(folder, "has no model.safetensors", f"{name} could run code when it is read: convert it to safetensors")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors.index.json"])
def test_a_pickle_in_place_of_json(name, make, sprung):
    folder = make()
    shards(folder)
    (folder / name).write_bytes(pickle.dumps(Trap(sprung)))
    with pytest.raises(UserError, match=re.escape(str(folder / name))):
        LanguageModel.load(str(folder))


def test_a_missing_shard(make):
    folder = make()
    shards(folder)
    (folder / "model-2.safetensors").unlink()
    refusal(folder, "lacks model-2.safetensors, which model.safetensors.index.json names")


OUTSIDE = ["../../etc/passwd", "/etc/passwd", "../gpt2/model-1.safetensors", "sub/../model-1.safetensors"]


@pytest.mark.parametrize("name", [*OUTSIDE, "./model-1.safetensors", "..", ".", "", "a\0b", "~/x", "C:\\x"])
def test_an_index_that_names_what_is_no_file_of_the_folder(name, make):
    folder = make()
    weight_map = shards(folder)
    weight_map[min(weight_map)] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    message = refusal_of_any_text(folder)
    if name in OUTSIDE:
        assert f"index.json names {name!r}, which is not a file of its own folder" in message


def refusal_of_any_text(folder):
    with pytest.raises(UserError) as caught:
        open_weights(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": null}', "[" * 100_000],
)
def test_a_broken_index(text, make):
    folder = make()
    shards(folder)
    (folder / "model.safetensors.index.json").write_text(text)
    refusal(folder, "model.safetensors.index.json")


def test_an_empty_index(make):
    folder = make()
    shards(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    refusal(folder, "lacks the tensor transformer.")


# Tensors


@pytest.mark.parametrize(("family", "name"), EVERY_NAME)
def test_a_missing_tensor(family, name, make):
    folder = make(family)
    shape = list(load_file(folder / "model.safetensors")[name].shape)
    change_tensors(folder, **{name: None})
    refusal(folder, f"lacks the tensor {name} {shape} that its config asks for")


@pytest.mark.parametrize(("family", "name"), EVERY_NAME)
@pytest.mark.parametrize("other", ["longer", "flat", "scalar", "turned", "empty"])
def test_a_wrong_shape(family, name, other, make):
    folder = make(family)
    tensor = load_file(folder / "model.safetensors")[name]
    wrong = {
        "longer": np.concatenate([tensor, tensor[:1]]),
        "flat": tensor.reshape(1, -1, *[1] * (tensor.ndim == 1)),
        "scalar": np.ones((), np.float32),
        "turned": np.ascontiguousarray(tensor.T) if tensor.ndim == 2 else tensor[:, None],
        "empty": tensor[:0],
    }[other]
    assert wrong.shape != tensor.shape
    change_tensors(folder, **{name: wrong})
    refusal(folder, f"{name} is {list(wrong.shape)}, and its config asks for {list(tensor.shape)}")


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("name", ["extra.weight", "transformer.h.2.ln_1.bias", "model.layers.2.mlp.up_proj.weight", ""])
def test_an_extra_tensor(family, name, make):
    folder = make(family)
    change_tensors(folder, **{name: np.ones((3, 2), np.float32)})
    refusal(folder, f"has a tensor {name} [3, 2] that its config has no place for")


def test_biases_that_the_config_does_not_have(make):
    """As of a Llama with attention_bias=false in its config."""
    folder = make("llama")
    name = "model.layers.0.self_attn.q_proj.bias"
    change_tensors(folder, **{name: np.ones(4, np.float32)})
    refusal(folder, f"has a tensor {name} [4] that its config has no place for")


@pytest.mark.parametrize("dtype", ["int64", "int32", "uint8", "bool", "float64"])
def test_weights_of_another_dtype(dtype, make):
    folder = make()
    name = NAMES["gpt2"][0]
    change_tensors(folder, **{name: load_file(folder / "model.safetensors")[name].astype(dtype)})
    refusal(folder, "model.safetensors", f"{name} is ", "; only F32, BF16, F16 are read")


def test_eight_bit_floats(make):
    folder = make()
    header, data = read_raw(folder / "model.safetensors")
    name, entry = "transformer.wpe.weight", header["transformer.wpe.weight"]
    header[name] = entry | {"dtype": "F8_E4M3", "shape": [entry["shape"][0], 4 * entry["shape"][1]]}
    write_raw(folder / "model.safetensors", header, data)
    refusal(folder, "model.safetensors", f"{name} is F8_E4M3")


@pytest.mark.parametrize("name", ["two\nlines", "\x1b[2Jcleared", "\u202eturned"])
def test_names_that_are_no_text(name, make):
    folder = make()
    change_tensors(folder, **{name: np.ones(3, np.float32)})
    refusal(folder, "that its config has no place for")


def test_a_tensor_that_is_in_two_shards(make):
    folder = make()
    weight_map = shards(folder)
    name = next(name for name, file in weight_map.items() if file == "model-1.safetensors")
    both = load_file(folder / "model-2.safetensors")
    save_file(both | {name: load_file(folder / "model-1.safetensors")[name] + 1}, folder / "model-2.safetensors")
    refusal(folder, name)


# Headers that lie


def entries(header):
    """Two tensors of one size, the second behind the first."""
    first, second = sorted(
        (name for name in header if name.endswith("c_attn.weight")), key=lambda name: header[name]["data_offsets"]
    )
    return header[first], header[second]


def lie_about_shape(header):
    entries(header)[0]["shape"][0] += 1


def lie_about_size(header):
    entries(header)[0]["data_offsets"][1] -= 4


def overlap(header):
    first, second = entries(header)
    second["data_offsets"] = list(first["data_offsets"])


def overlap_in_part(header):
    first, second = entries(header)
    second["data_offsets"] = [offset - 4 for offset in second["data_offsets"]]


def run_past_the_end(header):
    entries(header)[1]["data_offsets"] = [10**9, 10**9 + 4 * 48]


def begin_behind_the_end(header):
    entries(header)[0]["data_offsets"].reverse()


def begin_before_the_start(header):
    entries(header)[0]["data_offsets"] = [-192, 0]


def leave_a_hole(header):
    del header["transformer.ln_f.weight"]


def halve_the_dtype(header):
    entries(header)[0]["dtype"] = "F16"


def unknown_dtype(header):
    entries(header)[0]["dtype"] = "F31"


def no_dtype(header):
    del entries(header)[0]["dtype"]


def no_shape(header):
    del entries(header)[0]["shape"]


def no_offsets(header):
    del entries(header)[0]["data_offsets"]


def negative_shape(header):
    entries(header)[0]["shape"] = [-4, -12]


def shape_of_texts(header):
    entries(header)[0]["shape"] = ["4", "12"]


def shape_that_overflows(header):
    entries(header)[0]["shape"] = [2**62, 2**62]


def shape_that_wraps_around(header):
    entries(header)[0]["shape"] = [2**32, 2**32 + 3, 16]  # mod 2**64 = 48 x 2**32


def no_object(header):
    header["transformer.wte.weight"] = 3


LIES = [
    lie_about_shape,
    lie_about_size,
    overlap,
    overlap_in_part,
    run_past_the_end,
    begin_behind_the_end,
    begin_before_the_start,
    leave_a_hole,
    halve_the_dtype,
    unknown_dtype,
    no_dtype,
    no_shape,
    no_offsets,
    negative_shape,
    shape_of_texts,
    shape_that_overflows,
    shape_that_wraps_around,
    no_object,
]


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: lie.__name__)
def test_a_header_that_lies(lie, make):
    folder = make()
    header, data = read_raw(folder / "model.safetensors")
    lie(header)
    write_raw(folder / "model.safetensors", header, data)
    refusal(folder, "model.safetensors is not a safetensors file, or is damaged", "download it again")


@pytest.mark.parametrize(
    "header", [b"", b"{", b"[]", b"null", b"\xff\xfe{}", b'{"a":' * 1000 + b"1" + b"}" * 1000, b"{} x", b'{"a": NaN}']
)
def test_a_header_that_is_none(header, make):
    folder = make()
    write_raw(folder / "model.safetensors", header, read_raw(folder / "model.safetensors")[1])
    refusal(folder, "model.safetensors is not a safetensors file, or is damaged")


@pytest.mark.parametrize("n_header", [0, 1, 2**20, 2**40, 2**63, 2**64 - 1])
def test_a_header_of_another_length(n_header, make):
    folder = make()
    header, data = read_raw(folder / "model.safetensors")
    write_raw(folder / "model.safetensors", header, data, n_header)
    refusal(folder, "model.safetensors is not a safetensors file, or is damaged")


def test_a_file_that_is_cut_or_goes_on(make):
    folder = make()
    path = folder / "model.safetensors"
    content = path.read_bytes()
    for n in (0, 1, 7, 8, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:n])
        refusal(folder, "model.safetensors is not a safetensors file, or is damaged")
    path.write_bytes(content + b"\0")
    refusal(folder, "model.safetensors is not a safetensors file, or is damaged")
    path.unlink()
    path.mkdir()
    refusal(folder, "model.safetensors")


# config.json


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '"gpt2"', "{'a': 1}", "[" * 100_000, "\ufeff{}", "{} {}"])
def test_a_config_that_is_no_json_object(text, make):
    folder = make()
    (folder / "config.json").write_text(text, encoding="utf-8")
    refusal(folder, "config.json", "JSON")


def test_a_config_that_is_no_text_or_no_file(make):
    folder = make()
    (folder / "config.json").write_bytes(b'{"model_type": "\xff"}')
    refusal(folder, "config.json", "JSON")
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    refusal(folder, "config.json")


NEEDED = {
    "gpt2": ["vocab_size", "n_layer", "n_head", "n_embd"],
    "llama": ["vocab_size", "num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size"],
}


@pytest.mark.parametrize(("family", "field"), [(family, field) for family, some in NEEDED.items() for field in some])
def test_a_config_that_lacks_a_field(family, field, make):
    folder = make(family)
    values = json.loads((folder / "config.json").read_text())
    del values[field]
    (folder / "config.json").write_text(json.dumps(values))
    refusal(folder, f"config.json has no {field}")


NUMBERS = {
    "gpt2": [*NEEDED["gpt2"], "n_positions"],
    "llama": [*NEEDED["llama"], "max_position_embeddings"],
}
FIELDS = [(family, field) for family, fields in NUMBERS.items() for field in fields]


@pytest.mark.parametrize(("family", "field"), FIELDS)
@pytest.mark.parametrize("value", ["4", [4], {}, None, -4, 4.5, True, ""], ids=repr)
def test_a_config_with_a_number_that_is_none(family, field, value, make):
    folder = make(family)
    change_config(folder, **{field: value})
    refusal(folder)


@pytest.mark.parametrize(("family", "field"), [pair for pair in FIELDS if "intermediate" not in pair[1]])
def test_a_config_with_a_zero(family, field, make):
    folder = make(family)
    change_config(folder, **{field: 0})
    refusal(folder)


@pytest.mark.parametrize(
    ("family", "field", "value"),
    [
        ("gpt2", "n_head", 3),
        ("gpt2", "n_inner", "16"),
        ("gpt2", "n_inner", -1),
        ("gpt2", "layer_norm_epsilon", "1e-5"),
        ("gpt2", "layer_norm_epsilon", None),
        ("gpt2", "layer_norm_epsilon", 0),
        ("gpt2", "layer_norm_epsilon", float("nan")),
        ("gpt2", "tie_word_embeddings", "no"),
        ("gpt2", "activation_function", "relu"),
        ("gpt2", "activation_function", ["gelu"]),
        ("gpt2", "activation_function", None),
        ("llama", "num_attention_heads", 3),
        ("llama", "num_attention_heads", 4),  # a width of 1 cannot be rotated
        ("llama", "num_key_value_heads", 3),
        ("llama", "num_key_value_heads", "1"),
        ("llama", "num_key_value_heads", -1),
        ("llama", "rms_norm_eps", -1e-5),
        ("llama", "rms_norm_eps", [1e-5]),
        ("llama", "rope_theta", -1),
        ("llama", "rope_theta", {}),
        ("llama", "rope_scaling", "llama3"),
        ("llama", "rope_scaling", [1]),
        ("llama", "rope_scaling", LLAMA3 | {"factor": "x"}),
        ("llama", "rope_scaling", LLAMA3 | {"factor": 0.5}),
        ("llama", "rope_scaling", LLAMA3 | {"original_max_position_embeddings": 0}),
        ("llama", "rope_scaling", LLAMA3 | {"original_max_position_embeddings": "4"}),
        ("llama", "rope_scaling", {"rope_type": "llama3"}),
        ("llama", "rope_scaling", {"rope_type": "llama3", "factor": 2}),
        ("llama", "rope_parameters", {"rope_theta": "much"}),
    ],
)
def test_a_config_with_values_that_fit_no_model(family, field, value, make):
    folder = make(family)
    change_config(folder, **{field: value})
    refusal(folder, "config.json")


@pytest.mark.parametrize(("field", "value"), [("rope_theta", "1e4"), ("rope_scaling", LLAMA3 | {"factor": "2"})])
def test_a_config_with_a_text_for_a_number(field, value, make):
    folder = make("llama")
    change_config(folder, **{field: value})
    refusal(folder, "config.json")


@pytest.mark.parametrize(
    ("family", "field", "value", "named"),
    [
        ("gpt2", "scale_attn_by_inverse_layer_idx", True, "scale_attn_by_inverse_layer_idx=True"),
        ("gpt2", "scale_attn_weights", False, "scale_attn_weights=False"),
        ("gpt2", "add_cross_attention", True, "add_cross_attention=True"),
        ("gpt2", "activation_function", "relu", "activation_function 'relu'"),
        ("qwen2", "use_sliding_window", True, "use_sliding_window=True"),
        ("qwen2", "hidden_act", "gelu", "hidden_act='gelu'"),
        ("llama", "hidden_act", "relu", "hidden_act='relu'"),
        ("llama", "head_dim", 8, "head_dim=8"),
        ("qwen2", "head_dim", 8, "head_dim=8"),
        ("llama", "mlp_bias", True, "mlp_bias=True"),
        ("llama", "rope_scaling", {"type": "linear", "factor": 2.0}, "rope_type 'linear'"),
        ("llama", "rope_scaling", {"rope_type": "dynamic", "factor": 2.0}, "rope_type 'dynamic'"),
        ("qwen2", "rope_scaling", {"type": "yarn", "factor": 4.0}, "rope_type 'yarn'"),
        ("qwen2", "rope_parameters", {"rope_type": "longrope", "rope_theta": 1e6}, "rope_type 'longrope'"),
        ("llama", "rope_scaling", LLAMA3 | {"low_freq_factor": 2.0}, "low_freq_factor=2.0"),
        ("llama", "rope_scaling", LLAMA3 | {"high_freq_factor": 8.0}, "high_freq_factor=8.0"),
    ],
)
def test_a_config_of_a_model_that_is_not_here(family, field, value, named, make):
    folder = make(family)
    change_config(folder, **{field: value})
    refusal(folder, "config.json", named)


@pytest.mark.parametrize("family", ["llama"])
@pytest.mark.parametrize("fields", [{"attention_bias": True}, {"attention_bias": True, "mlp_bias": True}])
def test_biases_that_the_file_does_not_have(family, fields, make):
    folder = make(family)
    change_config(folder, **fields)
    refusal(folder, "lacks the tensor model.layers.0.", "_proj.bias")


def test_the_config_is_named_once(make):
    folder = make("llama")
    change_config(folder, head_dim=8)
    assert refusal(folder).count("config.json") == 1


@pytest.mark.parametrize("kind", ["mistral", "t5", "GPT2", "", None, 3, ["gpt2"], {}], ids=repr)
def test_a_config_of_another_family(kind, make):
    folder = make()
    change_config(folder, model_type=kind)
    refusal(folder, f"config.json: model_type {kind!r} is none of gpt2, llama, qwen2")


@pytest.mark.parametrize(
    ("family", "field", "value"),
    [
        ("gpt2", "vocab_size", 10**18),
        ("gpt2", "n_layer", 10**30),
        ("gpt2", "n_embd", 10**30),
        ("gpt2", "n_positions", 10**30),
        ("gpt2", "n_inner", 10**30),
        ("gpt2", "layer_norm_epsilon", 10**400),
        ("llama", "rope_theta", 10**400),
        ("llama", "rms_norm_eps", 10**400),
        ("llama", "rope_scaling", LLAMA3 | {"factor": 10**400}),
        ("llama", "rope_scaling", LLAMA3 | {"original_max_position_embeddings": 10**400}),
        ("qwen2", "intermediate_size", 10**30),
    ],
    ids=lambda value: "" if isinstance(value, int | dict) else value,
)
def test_a_config_with_numbers_too_large_for_the_machine(family, field, value, make):
    folder = make(family)
    change_config(folder, **{field: value})
    refusal(folder)


# A billion names of tensors are made before the first is looked up, and a table of angles for a head of
# hidden_size / 2 while shapes are found would be gigabytes and minutes.
@pytest.mark.parametrize(("family", "field"), [("gpt2", "n_layer"), ("llama", "hidden_size"), ("gpt2", "n_embd")])
def test_a_config_of_a_model_far_larger_than_its_file(family, field, make):
    folder = make(family)
    change_config(folder, **{field: 10**9})
    child = subprocess.run(
        [sys.executable, "-c", IN_LITTLE_MEMORY, str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(__file__).parents[2],
    )
    assert str(folder) in child.stdout, child.stderr.strip().rpartition("\n")[2]


IN_LITTLE_MEMORY = """
import resource, sys
from pathlib import Path
from gptjax.errors import UserError
from gptjax.hub.weights import open_weights
resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
try:
    open_weights(Path(sys.argv[1]))
except UserError as error:
    print(error)
"""


# nanoGPT's ckpt.pt

ARGUMENTS = {"n_layer": 2, "n_head": 2, "n_embd": 4, "block_size": 8, "bias": True, "vocab_size": 20, "dropout": 0.0}


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="nanoGPT's ckpt.pt is PyTorch's")


@pytest.fixture
def checkpoint(torch):
    expected = expected_tensors(ModelConfig(activation="gelu_erf", **ARGUMENTS), "nanogpt")
    model = {name: torch.ones(shape) for name, (shape, _) in expected.items()}
    return {"model": model, "model_args": dict(ARGUMENTS), "iter_num": 1, "config": {"dataset": "x"}}


@pytest.fixture
def saved(torch, tmp_path):
    """Writes a ckpt.pt with a tokenizer beside it."""

    def save(content, **arguments):
        Tokenizer.characters(ALPHABET).save(tmp_path / "tokenizer.json")
        torch.save(content, tmp_path / "ckpt.pt", **arguments)
        return tmp_path / "ckpt.pt"

    return save


def test_the_checkpoint_itself_is_good(saved, checkpoint):
    path = saved(checkpoint)
    assert LanguageModel.load(str(path)).config.n_layer == 2
    assert open_pretrained(str(path)).config.bias


@pytest.mark.parametrize("place", ["pickle", "whole", "config", "model_args", "model", "tensor", "legacy"])
def test_a_checkpoint_with_a_trap(place, saved, checkpoint, sprung):
    trap = Trap(sprung)
    if place in ("config", "model_args", "model"):
        checkpoint[place] = trap
    elif place == "tensor":
        checkpoint["model"]["transformer.wte.weight"] = trap
    else:
        checkpoint["config"] = trap
    path = saved(trap if place == "whole" else checkpoint, _use_new_zipfile_serialization=place != "legacy")
    if place == "pickle":
        path.write_bytes(pickle.dumps(trap))
    for read in (open_weights, open_pretrained, LanguageModel.load):
        with pytest.raises(UserError) as caught:
            read(path if read is open_weights else str(path))
        assert f"{path} is no checkpoint of nanoGPT that can be read without running code" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_nobody_is_told_how_to_run_what_is_in_a_checkpoint(saved, checkpoint, sprung):
    checkpoint["config"] = Trap(sprung)
    message = refusal(saved(checkpoint))
    assert "weights_only" not in message and "can still be loaded" not in message


def test_files_that_are_no_checkpoint(saved, checkpoint):
    path = saved(checkpoint)
    content = path.read_bytes()
    for damaged in (b"", b"PK", b"text\n", content[: len(content) // 2], content[:-30]):
        path.write_bytes(damaged)
        refusal(path, "is no checkpoint of nanoGPT that can be read")


@pytest.mark.parametrize("content", [3, None, [], {}, {"model": {}}, {"model_args": {}}, "text"], ids=repr)
def test_a_checkpoint_of_something_else(content, saved):
    refusal(saved(content), "is no checkpoint of nanoGPT that can be read")


@pytest.mark.parametrize("field", ["model", "model_args"])
@pytest.mark.parametrize("value", [None, 3, [1], "text"], ids=repr)
def test_a_checkpoint_without_its_parts(field, value, saved, checkpoint):
    checkpoint[field] = value
    refusal(saved(checkpoint), "is no checkpoint of nanoGPT that can be read")


def test_the_tensors_of_a_checkpoint_are_those_of_its_config(torch, saved, checkpoint):
    name, model = "transformer.h.1.attn.c_attn.weight", dict(checkpoint["model"])
    checkpoint["model"] = {key: tensor for key, tensor in model.items() if key != name}
    refusal(saved(checkpoint), f"lacks the tensor {name} [12, 4] that its config asks for")
    checkpoint["model"] = model | {name: model[name].T}
    refusal(saved(checkpoint), f"{name} is [4, 12], and its config asks for [12, 4]")
    checkpoint["model"] = model | {"extra": torch.ones(2)}
    refusal(saved(checkpoint), "has a tensor extra [2] that its config has no place for")
    checkpoint["model"] = model
    checkpoint["model_args"]["bias"] = False
    refusal(saved(checkpoint), "has a tensor transformer.", "bias [", "that its config has no place for")


@pytest.mark.parametrize(
    ("field", "value"),
    [("n_layer", "2"), ("n_head", 3), ("n_head", 0), ("n_embd", -4), ("vocab_size", None), ("dropout", 2.0)],
)
def test_arguments_of_a_checkpoint_that_fit_no_model(field, value, saved, checkpoint):
    checkpoint["model_args"][field] = value
    refusal(saved(checkpoint), field if field != "n_head" else "n_")


@pytest.mark.parametrize("kind", ["number", "text", "int64", "complex64", "bool", "sparse"])
def test_what_is_no_tensor_of_floats_in_a_checkpoint(kind, torch, saved, checkpoint):
    name = "transformer.wte.weight"
    tensor = checkpoint["model"][name]
    checkpoint["model"][name] = {
        "number": lambda: 3,
        "text": lambda: "weights",
        "int64": lambda: tensor.long(),
        "complex64": lambda: tensor.to(torch.complex64),
        "bool": lambda: tensor.bool(),
        "sparse": lambda: tensor.to_sparse(),
    }[kind]()
    with pytest.raises(UserError) as caught:
        LanguageModel.load(str(saved(checkpoint)))
    assert "ckpt.pt" in str(caught.value) and name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [("n_kv_head", 1), ("position", "rope"), ("norm", "rmsnorm"), ("mlp_width", 4)],
)
def test_arguments_that_nanogpt_does_not_have(field, value, saved, checkpoint):
    checkpoint["model_args"][field] = value
    with pytest.raises(UserError) as caught:
        LanguageModel.load(str(saved(checkpoint)))
    assert "ckpt.pt" in str(caught.value)


def test_a_checkpoint_of_another_tokenizer(saved, checkpoint):
    path = saved(checkpoint)
    (path.parent / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="put its tokenizer.json beside it"):
        LanguageModel.load(str(path))


# What lies beside the weights


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000])
def test_broken_side_files(name, text, make):
    folder = make()
    (folder / name).write_text(text)
    with pytest.raises(UserError) as caught:
        LanguageModel.load(str(folder))
    assert str(folder / name) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("eos_token_id", [[1]]),
        ("eos_token_id", {"a": 1}),
        ("temperature", "hot"),
        ("top_k", 2.5),
        ("top_p", [0.9]),
        ("repetition_penalty", 0),
    ],
)
def test_odd_values_in_generation_config(field, value, make):
    """Refused, or left out."""
    folder = make()
    (folder / "generation_config.json").write_text(json.dumps({field: value}))
    try:
        model = LanguageModel.load(str(folder))
    except UserError as error:
        assert "generation_config.json" in str(error)
    else:
        assert field not in model.defaults


def test_a_tokenizer_with_more_ids_than_the_model(make):
    folder = make()
    Tokenizer.characters(ALPHABET + "uvw").save(folder / "tokenizer.json")
    with pytest.raises(UserError, match="tokenizer.json"):
        LanguageModel.load(str(folder))


# A run that starts from weights


@pytest.mark.parametrize("family", CONFIGS)
def test_fields_that_contradict_the_checkpoint(family, make):
    folder = make(family)
    origin = open_pretrained(str(folder))
    asked = ModelConfig(n_layer=3)
    with pytest.raises(UserError, match=r"model\.n_layer=3 is not what the checkpoint has \(2\); leave it out"):
        origin.adapt(Config(model=asked))
    with pytest.raises(
        UserError, match=r"block_size=9 is longer than this checkpoint's 8 positions; pass .* 8 or less"
    ):
        origin.adapt(Config(model=ModelConfig(block_size=9)))
    for name in ("norm_eps", "rope_theta", "vocab_size"):
        value = getattr(origin.config, name) * 2
        with pytest.raises(UserError, match=f"model.{name}={value} is not what the checkpoint has"):
            origin.adapt(Config(model=replace(ModelConfig(), **{name: value})))
    same = ModelConfig(n_layer=2, n_embd=4, n_head=2, block_size=5, dropout=0.1, lora_rank=2)
    adapted = origin.adapt(Config(model=same)).model
    assert adapted == replace(origin.config, block_size=5, dropout=0.1, lora_rank=2)
