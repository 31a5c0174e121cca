"""Weights are exported and read bit for bit: in files of any dtype and number, onto any mesh, with fewer positions."""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gptjax.checkpoint import Checkpoints
from gptjax.config import Config, MeshConfig, ModelConfig
from gptjax.errors import UserError
from gptjax.export import main
from gptjax.hub.export import export
from gptjax.hub.init_from import open_pretrained
from gptjax.hub.weights import open_weights
from gptjax.inference.language_model import LanguageModel
from gptjax.model import init_params, param_shapes
from gptjax.sharding import by_path, make_mesh, one_device, with_shardings
from gptjax.tokenizer import Tokenizer

ALPHABET = "".join(map(chr, range(0x100, 0x100 + 1030)))  # 1030 ids, padded to 1152 rows
SIZE = {"vocab_size": 1030, "block_size": 12, "n_layer": 2, "n_head": 4, "n_embd": 16, "dtype": "float32"}
CONFIGS = {
    "gpt2": ModelConfig(**SIZE, bias=True),
    "qwen2": ModelConfig(
        **SIZE,
        norm="rmsnorm",
        position="rope",
        activation="swiglu",
        mlp_width=20,
        n_kv_head=2,
        qkv_bias=True,
        tied_head=False,
    ),
}


@pytest.fixture(scope="module")
def models(scramble, tmp_path_factory):
    """Family -> a folder of it, and the parameters, whose padding is zero as a checkpoint has none."""
    made = {}
    for family, config in CONFIGS.items():
        folder, params = tmp_path_factory.mktemp(family), scramble(config)
        for name in ("token_embedding", "head"):
            if name in params:
                params[name] = params[name].at[1030:].set(0)
        export(folder, config, params, "float32")
        Tokenizer.characters(ALPHABET).save(folder / "tokenizer.json")
        made[family] = folder, params
    return made


def start(folder, mesh=None, **model):
    """Config and parameters of a run that begins with a folder's weights."""
    weights = open_pretrained(str(folder))
    config = weights.adapt(Config(model=ModelConfig(dtype="float32", **model))).model
    abstract = with_shardings(mesh or one_device(), param_shapes(config))
    return config, jax.block_until_ready(weights.load(config, abstract, 7))


def assert_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize(("family", "dtype"), [("gpt2", "bfloat16"), ("qwen2", "float16")])
def test_what_is_exported_is_read_again(family, dtype, models, tmp_path):
    """In one file or in many, of which none is larger than was asked for unless one tensor is."""
    folder, params = models[family]
    main([str(folder), str(tmp_path / "out"), "--dtype", dtype])
    config, loaded = start(tmp_path / "out")
    assert config == CONFIGS[family]
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert family != "gpt2" or values["n_ctx"] == values["n_positions"] == 12, "llama.cpp reads n_ctx"
    rounded = jax.tree.map(lambda leaf: leaf.astype(dtype).astype(jnp.float32), params)
    assert_equal(loaded, rounded)
    export(tmp_path, config, params, dtype, shard_bytes=10_000)
    sizes = [[tensor.nbytes for tensor in load_file(path).values()] for path in tmp_path.glob("model-*.safetensors")]
    assert len(sizes) > 2 and all(sum(some) <= 10_000 or len(some) == 1 for some in sizes)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(map(sum, sizes))
    Tokenizer.characters(ALPHABET).save(tmp_path / "tokenizer.json")
    assert_equal(LanguageModel.load(str(tmp_path), dtype="float32").params, rounded)
    halved = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    assert_equal(LanguageModel.load(str(folder), dtype="bfloat16").params, halved)
    with pytest.raises(UserError, match="out is there already"):
        main([str(folder), str(tmp_path / "out")])


@pytest.mark.parametrize(
    ("value", "dtype", "words"),
    [
        (70000.0, "float16", "a weight of 70000, which float16 cannot hold: pass another --dtype"),
        (-3.4e38, "bfloat16", "a weight of -3.4e+38, which bfloat16 cannot hold"),
        (np.nan, "float32", "a weight of nan, so the model is damaged"),
    ],
)
def test_a_weight_that_the_files_cannot_hold_is_refused(value, dtype, words, models, tmp_path):
    folder, _ = models["qwen2"]
    shutil.copytree(folder, tmp_path / "in")
    tensors, name = load_file(folder / "model.safetensors"), "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 2] = value
    save_file(tensors, tmp_path / "in" / "model.safetensors")
    with pytest.raises(UserError, match=re.escape(f"{name} has {words}")):
        main([str(tmp_path / "in"), str(tmp_path / "out"), "--dtype", dtype])
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("family", CONFIGS)
def test_sharded_weights_are_the_same(family, models):
    folder, params = models[family]
    _, loaded = start(folder, make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), 8))
    for leaf in (loaded["token_embedding"], loaded["layers"]["attention"]["query"]["kernel"]):
        assert leaf.addressable_shards[0].data.size * 4 == leaf.size and len(leaf.sharding.device_set) == 8
    assert_equal(loaded, params)


@pytest.fixture(scope="module")
def run(models, tmp_path_factory):
    """A run with one checkpoint, of the same parameters."""
    folder, (_, params) = tmp_path_factory.mktemp("run"), models["gpt2"]
    (folder / "config.json").write_text(Config(model=CONFIGS["gpt2"]).to_json())
    Tokenizer.characters(ALPHABET).save(folder / "tokenizer.json")
    checkpoints = Checkpoints(folder / "checkpoints" / "best")
    checkpoints.save(7, {}, params=params)
    checkpoints.close()
    return folder


drawn = jax.jit(init_params, static_argnums=(0, 1))


@pytest.mark.parametrize("source", ["folder", "run"])
def test_the_first_positions_are_taken_lora_is_drawn_and_all_else_is_as_it_was(source, models, run):
    folder, params = models["gpt2"]
    config, loaded = start(run if source == "run" else folder, block_size=5, lora_rank=2)
    expected = {path: leaf for path, leaf in by_path(drawn(config, 7)).items() if "lora_" in path}
    assert config.block_size == 5 and len(expected) == 2 * 6
    expected |= by_path(params) | {"position_embedding": params["position_embedding"][:5]}
    assert_equal(by_path(loaded), expected)


def test_the_hubs_gpt2_files_have_no_prefix_and_hold_masks(models, tmp_path):
    """openai-community/gpt2: names without "transformer.", a mask in each layer, in some files the head as well."""
    folder, params = models["gpt2"]
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(folder / "model.safetensors").items()}
    tensors |= {f"h.{i}.attn.bias": np.ones((1, 1, 12, 12), bool) for i in range(2)}
    save_file(tensors | {"lm_head.weight": tensors["wte.weight"]}, tmp_path / "model.safetensors")
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_text((folder / name).read_text())
    assert "wte.weight" in tensors and open_weights(tmp_path).family == "gpt2"
    assert_equal(start(tmp_path)[1], params)
