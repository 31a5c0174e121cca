"""The Hugging Face families that the model covers: names and shapes of their tensors, and their config.json."""

import math
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.files import read_json
from gptjax.model import GPT, ROPE_HIGH, ROPE_LOW
from gptjax.sharding import path_name

Family = Literal["gpt2", "nanogpt", "llama", "qwen2"]

# A module's path -> its name in GPT-2's files and in Llama's, where {} is the layer; a kernel or a scale is NAME.weight
# there, a bias NAME.bias. Modules of one name share a tensor, side by side in this order.
_NAMES = {
    "token_embedding": ("transformer.wte", "model.embed_tokens"),
    "position_embedding": ("transformer.wpe", ""),
    "layers/attention_norm": ("transformer.h.{}.ln_1", "model.layers.{}.input_layernorm"),
    "layers/attention/query": ("transformer.h.{}.attn.c_attn", "model.layers.{}.self_attn.q_proj"),
    "layers/attention/key": ("transformer.h.{}.attn.c_attn", "model.layers.{}.self_attn.k_proj"),
    "layers/attention/value": ("transformer.h.{}.attn.c_attn", "model.layers.{}.self_attn.v_proj"),
    "layers/attention/out": ("transformer.h.{}.attn.c_proj", "model.layers.{}.self_attn.o_proj"),
    "layers/mlp_norm": ("transformer.h.{}.ln_2", "model.layers.{}.post_attention_layernorm"),
    "layers/mlp/up": ("transformer.h.{}.mlp.c_fc", "model.layers.{}.mlp.up_proj"),
    "layers/mlp/gate": ("", "model.layers.{}.mlp.gate_proj"),
    "layers/mlp/down": ("transformer.h.{}.mlp.c_proj", "model.layers.{}.mlp.down_proj"),
    "final_norm": ("transformer.ln_f", "model.norm"),
    "head": ("lm_head", "lm_head"),
}

# A field of ModelConfig -> its name in GPT-2's config.json and in Llama's.
_FIELDS = {
    "vocab_size": ("vocab_size", "vocab_size"),
    "block_size": ("n_positions", "max_position_embeddings"),
    "n_layer": ("n_layer", "num_hidden_layers"),
    "n_head": ("n_head", "num_attention_heads"),
    "n_embd": ("n_embd", "hidden_size"),
    "norm_eps": ("layer_norm_epsilon", "rms_norm_eps"),
    "tied_head": ("tie_word_embeddings", "tie_word_embeddings"),
}

# GPT-2's activation_function -> ours; of two names of one function the first is written.
_ACTIVATIONS: dict[str, Any] = dict(gelu_new="gelu_tanh", gelu_pytorch_tanh="gelu_tanh", gelu="gelu_erf", relu2="relu2")
_ROPE_SCALING = {"low_freq_factor": ROPE_LOW, "high_freq_factor": ROPE_HIGH}  # the only ones that the model has


class Place(NamedTuple):
    """A parameter that a tensor of a checkpoint holds."""

    path: str
    layer: int | None  # of a parameter that is stacked over the layers
    shape: tuple[int, ...]  # of one layer: [in, out] of a kernel, [out] of a bias, [V, D] without padding of a table
    transposed: bool  # whether the checkpoint has [out, in], as PyTorch's Linear


class Tensor(NamedTuple):
    """A tensor of a checkpoint: one parameter, or several of one shape side by side along `axis`, that of outputs."""

    axis: int
    places: list[Place]

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.places[0].shape[::-1] if self.places[0].transposed else self.places[0].shape)
        shape[self.axis] *= len(self.places)
        return tuple(shape)


def expected_tensors(config: ModelConfig, family: Family) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by its name."""
    leaves = by_path(jax.eval_shape(lambda: draw_params(replace(config, lora_rank=0), 0)))
    order, column, tensors = list(_NAMES), 0 if family in ("gpt2", "nanogpt") else 1, dict[str, Tensor]()
    modules = {path: re.sub("/(kernel|scale|bias)$", "", path) for path in leaves}
    for path in sorted(leaves, key=lambda path: order.index(modules[path])):
        stacked, is_kernel = path.startswith("layers/"), path.endswith("/kernel")
        layers: list[int | None] = [*range(config.n_layer)] if stacked else [None]
        shape = leaves[path].shape[1:] if stacked else leaves[path].shape
        if is_kernel:
            n_in = config.mlp_features if path.endswith("down/kernel") else config.n_embd
            shape = (n_in, math.prod(shape) // n_in)
        elif path.endswith("/bias"):
            shape = (math.prod(shape),)
        elif path in ("token_embedding", "head"):
            shape = (config.vocab_size, config.n_embd)
        for layer in layers:
            name = _NAMES[modules[path]][column].format(layer) + (".bias" if path.endswith("/bias") else ".weight")
            place = Place(path, layer, shape, transposed=is_kernel and family != "gpt2")
            tensors.setdefault(name, Tensor(-1 if family == "gpt2" else 0, [])).places.append(place)
    return tensors


def is_redundant(name: str) -> bool:
    """Whether a checkpoint's tensor holds no parameter, but a mask or rotary frequencies."""
    return bool(re.search(r"\.attn\.(masked_)?bias$|rotary_emb\.inv_freq$", name))


def by_path(tree: Any) -> dict[str, Any]:
    """The leaves of a tree of parameters, each by its path as in "layers/mlp/up/kernel"."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def draw_params(config: ModelConfig, seed: int) -> Any:
    """Parameters as a run draws them; for their shapes alone call it in `jax.eval_shape`."""
    return GPT(replace(config, dtype="float32")).init(jax.random.key(seed), jnp.zeros((1, 1), jnp.int32))["params"]


def read_config(path: Path) -> tuple[Family, ModelConfig]:
    """Family and ModelConfig of a config.json of transformers 4 or 5. Raises `UserError` for what is not supported."""
    return parse_config(read_json(path), path)


def parse_config(values: dict[str, Any], path: Path) -> tuple[Family, ModelConfig]:
    """As `read_config`, of the values of a config.json; `path` names the file in errors."""
    family = values.get("model_type")
    try:
        if family in ("gpt2", "llama", "qwen2"):
            return family, within_limits(_gpt2_config(values) if family == "gpt2" else _llama_config(values))
    except KeyError as error:
        raise UserError(f"{path} has no {error.args[0]}") from error
    except (UserError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"{path}: {error}") from error
    raise UserError(f"{path}: model_type {family!r} is none of gpt2, llama, qwen2")


def within_limits(config: ModelConfig) -> ModelConfig:
    """The config itself. Raises `UserError` for numbers that no model has, before memory is taken in proportion."""
    for name, value in vars(config).items():
        most = 10_000 if name == "n_layer" else 1 << 24
        config.require(not isinstance(value, int) or value <= most, name, f"is more than {most:,}")
        config.require(not isinstance(value, float) or math.isfinite(value), name, "is not a finite number")
    config.require(config.vocab_size > 0, "vocab_size", "is not positive")
    return config


def family_of(config: ModelConfig) -> Family:
    """The Hugging Face family that has this architecture: its config.json, read back, gives every field again.

    Raises `UserError` if no family has a field's value.
    """
    is_qwen = config.qkv_bias and not config.out_bias
    family: Family = "gpt2" if config.position == "learned" else "qwen2" if is_qwen else "llama"
    values = config_values(family, config)
    # Where the model has no biases, those of GPT-2 are zeros.
    back = replace(_gpt2_config(values), bias=config.bias) if family == "gpt2" else _llama_config(values)
    theirs = _architecture(back)
    for name, value in _architecture(config).items():
        complaint = f"is in no Hugging Face family: {family}, the nearest one, has {theirs[name]}"
        config.require(value == theirs[name], name, complaint)
    return family


def _architecture(config: ModelConfig) -> dict[str, Any]:
    """The fields that a checkpoint determines and that this model uses, each with the value that takes effect."""
    values = {field.name: getattr(config, field.name) for field in fields(config) if field.metadata["architecture"]}
    values |= {"n_kv_head": config.kv_heads, "mlp_width": config.mlp_features}
    unused = "rope_" if config.position == "learned" else "rope_original" if config.rope_factor == 1 else ()
    return {name: value for name, value in values.items() if not name.startswith(unused)}


def _require_values(values: dict[str, Any], supported: dict[str, Any]) -> None:
    """Raise `UserError` where a field that changes the model has another value than the one that is supported."""
    for name, value in supported.items():
        if values.get(name, value) not in (value, None):
            raise UserError(f"{name}={values[name]!r} is not supported; only {value!r} is")


def _number(value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{value!r} is not a number")
    return float(value)


def _renamed(values: dict[str, Any], column: int) -> dict[str, Any]:
    """The fields of `_FIELDS` with the values that a config.json gives them."""
    ours = {field: values[names[column]] for field, names in _FIELDS.items()}
    return ours | {"norm_eps": _number(ours["norm_eps"])}


def _gpt2_config(values: dict[str, Any]) -> ModelConfig:
    off = {"scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
    _require_values(values, {"scale_attn_weights": True} | off)
    activation = values.get("activation_function", "gelu_new")
    if activation not in _ACTIVATIONS:
        raise UserError(f"activation_function {activation!r} is none of {', '.join(_ACTIVATIONS)}")
    usual = {"n_positions": values.get("n_ctx", 1024), "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True}
    ours, mlp_width = _renamed(usual | values, 0), values.get("n_inner") or 0
    return ModelConfig(**ours, mlp_width=mlp_width, activation=_ACTIVATIONS[activation], bias=True)


def _llama_config(values: dict[str, Any]) -> ModelConfig:
    is_qwen = values["model_type"] == "qwen2"
    n_head, n_embd = values["num_attention_heads"], values["hidden_size"]
    n_kv_head, bias = values.get("num_key_value_heads"), not is_qwen and bool(values.get("attention_bias"))
    _require_values(values, {"hidden_act": "silu", "head_dim": n_embd // max(n_head, 1)})
    if not bias and not is_qwen:
        _require_values(values, {"mlp_bias": False})
    attention_only = bias and not values.get("mlp_bias")
    longest = 32768 if is_qwen else 2048
    usual = {"max_position_embeddings": longest, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
    config = ModelConfig(
        **_renamed(usual | values, 1),
        **_rope(values),
        n_kv_head=0 if n_kv_head in (None, n_head) else n_kv_head,
        mlp_width=values["intermediate_size"],
        activation="swiglu",
        norm="rmsnorm",
        position="rope",
        bias=bias and not attention_only,
        qkv_bias=is_qwen or attention_only,
        out_bias=attention_only,
    )
    if is_qwen and values.get("use_sliding_window"):
        _require_full_attention(values, config)
    return config


def _rope(values: dict[str, Any]) -> dict[str, Any]:
    """The rotary fields of ModelConfig. Raises `UserError` if rope_scaling and rope_parameters are not the same."""
    usual = {"rope_theta": values.get("rope_theta", 10_000.0), "rope_type": "default"}
    given = [values[name] for name in ("rope_scaling", "rope_parameters") if values.get(name)]
    found = [usual | {"rope_type": rope.pop("type", "default")} | rope for rope in map(dict, given)]
    rope = (found or [usual])[0]
    if any(other != rope for other in found):
        raise UserError("rope_scaling and rope_parameters contradict each other: remove the one that does not hold")
    if rope["rope_type"] not in ("default", "llama3"):
        raise UserError(f"rope_type {rope['rope_type']!r} is not supported; only 'default' and 'llama3' are")
    _require_values(rope, _ROPE_SCALING | {"partial_rotary_factor": 1.0})
    fields = {"rope_theta": _number(rope["rope_theta"])}
    if rope["rope_type"] == "default":
        return fields
    original = rope["original_max_position_embeddings"]
    return fields | {"rope_factor": _number(rope["factor"]), "rope_original_block_size": original}


def _require_full_attention(values: dict[str, Any], config: ModelConfig) -> None:
    """Raise `UserError` unless the sliding window is as long as the context or no layer has it."""
    window, first = values.get("sliding_window", 4096), values.get("max_window_layers", 28)
    windowed = "sliding_attention" in types if (types := values.get("layer_types")) else first < config.n_layer
    if windowed and window is not None and window < config.block_size:
        raise UserError(f"use_sliding_window=True is not supported: layers attend to {window} tokens")


def config_values(family: Family, config: ModelConfig) -> dict[str, Any]:
    """The fields of a config.json that `read_config` reads, and the class that transformers makes of it."""
    theirs = {names[0 if family == "gpt2" else 1]: getattr(config, field) for field, names in _FIELDS.items()}
    if family == "gpt2":
        return theirs | {
            "model_type": family,
            "architectures": ["GPT2LMHeadModel"],
            "n_ctx": config.block_size,  # llama.cpp reads this one
            "n_inner": config.mlp_width or None,
            "activation_function": next((k for k, v in _ACTIVATIONS.items() if v == config.activation), "gelu_new"),
        }
    original = {"original_max_position_embeddings": config.rope_original_block_size}
    scaling = {"rope_type": "llama3", "factor": config.rope_factor} | original | _ROPE_SCALING
    biases = {"attention_bias": config.bias or config.out_bias, "mlp_bias": config.bias} if family == "llama" else {}
    return theirs | {
        "model_type": family,
        "architectures": ["LlamaForCausalLM" if family == "llama" else "Qwen2ForCausalLM"],
        "num_key_value_heads": config.kv_heads,
        "intermediate_size": config.mlp_features,
        "hidden_act": "silu",
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling if config.rope_factor != 1 else None,
        **biases,
    }
