"""The Hugging Face families that the model covers: names and shapes of their tensors, and their config.json."""

import math
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.files import read_json
from gptjax.model import ROPE_HIGH, ROPE_LOW, n_input_axes, param_shapes
from gptjax.sharding import by_path

Family = Literal["gpt2", "nanogpt", "llama", "mistral", "qwen2", "qwen3", "smollm3", "nanochat"]

# A module's path -> its name in GPT-2's files and in Llama's, where {} is the layer; a kernel or a scale is NAME.weight
# there, a bias NAME.bias. Modules of one name share a tensor, side by side in this order.
_NAMES = {
    "token_embedding": ("transformer.wte", "model.embed_tokens"),
    "position_embedding": ("transformer.wpe", ""),
    "layers/attention_norm": ("transformer.h.{}.ln_1", "model.layers.{}.input_layernorm"),
    "layers/attention/query": ("transformer.h.{}.attn.c_attn", "model.layers.{}.self_attn.q_proj"),
    "layers/attention/key": ("transformer.h.{}.attn.c_attn", "model.layers.{}.self_attn.k_proj"),
    "layers/attention/value": ("transformer.h.{}.attn.c_attn", "model.layers.{}.self_attn.v_proj"),
    "layers/attention/query_norm": ("", "model.layers.{}.self_attn.q_norm"),
    "layers/attention/key_norm": ("", "model.layers.{}.self_attn.k_norm"),
    "layers/attention/out": ("transformer.h.{}.attn.c_proj", "model.layers.{}.self_attn.o_proj"),
    "layers/mlp_norm": ("transformer.h.{}.ln_2", "model.layers.{}.post_attention_layernorm"),
    "layers/mlp/up": ("transformer.h.{}.mlp.c_fc", "model.layers.{}.mlp.up_proj"),
    "layers/mlp/gate": ("", "model.layers.{}.mlp.gate_proj"),
    "layers/mlp/down": ("transformer.h.{}.mlp.c_proj", "model.layers.{}.mlp.down_proj"),
    "final_norm": ("transformer.ln_f", "model.norm"),
    "head": ("lm_head", "lm_head"),
}
_NANOCHAT_NAMES = {"layers/mlp/up": "model.layers.{}.mlp.fc1", "layers/mlp/down": "model.layers.{}.mlp.fc2"}

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
# Families like Llama -> their class in transformers, and its values for fields that a config.json leaves out.
_LLAMAS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {"max_position_embeddings": 2048}),
    "mistral": (
        "MistralForCausalLM",
        {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    ),
    "qwen2": ("Qwen2ForCausalLM", {"max_position_embeddings": 32768, "num_key_value_heads": 32}),
    "qwen3": ("Qwen3ForCausalLM", {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128}),
    "smollm3": (
        "SmolLM3ForCausalLM",
        {
            "max_position_embeddings": 32768,
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
            "rope_theta": 2e6,
            "no_rope_layer_interval": 4,
            "sliding_window": None,
        },
    ),
    "nanochat": ("NanoChatForCausalLM", {"max_position_embeddings": 2048, "final_logit_softcapping": 15.0}),
}
_USUAL = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "rope_theta": 10_000.0, "sliding_window": 4096}
_WITH_MLP_BIAS = ("llama", "smollm3")
_WITH_LAYER_TYPES = ("qwen2", "qwen3", "smollm3")
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
        """Its axes in the checkpoint's order."""
        shape = list(self.places[0].shape[::-1] if self.places[0].transposed else self.places[0].shape)
        shape[self.axis] *= len(self.places)
        return tuple(shape)


def expected_tensors(config: ModelConfig, family: Family) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by its name."""
    leaves = by_path(param_shapes(replace(config, lora_rank=0)))
    order, tensors = list(_NAMES), dict[str, Tensor]()
    modules = {path: re.sub("/(kernel|scale|bias)$", "", path) for path in leaves}
    for path in sorted(leaves, key=lambda path: order.index(modules[path])):
        stacked, is_kernel = path.startswith("layers/"), path.endswith("/kernel")
        layers: list[int | None] = [*range(config.n_layer)] if stacked else [None]
        shape = leaves[path].shape[1:] if stacked else leaves[path].shape
        if is_kernel:
            n_axes = n_input_axes(path)
            shape = (math.prod(shape[:n_axes]), math.prod(shape[n_axes:]))
        elif path.endswith("/bias"):
            shape = (math.prod(shape),)
        elif path in ("token_embedding", "head"):
            shape = (config.vocab_size, config.n_embd)
        for layer in layers:
            module = _module_name(modules[path], family).format(layer)
            name = module + (".bias" if path.endswith("/bias") else ".weight")
            place = Place(path, layer, shape, transposed=is_kernel and family != "gpt2")
            tensors.setdefault(name, Tensor(-1 if family == "gpt2" else 0, [])).places.append(place)
    return tensors


def _module_name(path: str, family: Family) -> str:
    """A module's name in a family's files, where {} is the layer."""
    if family == "nanochat" and path in _NANOCHAT_NAMES:
        return _NANOCHAT_NAMES[path]
    return _NAMES[path][0 if family in ("gpt2", "nanogpt") else 1]


def exchange_halves(name: str, tensor: np.ndarray, config: ModelConfig, family: Family) -> np.ndarray:
    """A tensor of ours as nanochat's, or of nanochat's as ours; of other families, the tensor itself.

    nanochat's RoPE turns a head's pairs of features the other way. With the halves of each head's queries and keys
    exchanged that is the same rotation.
    """
    if family != "nanochat" or not re.search(r"\.[qk]_proj\.", name):
        return tensor
    return tensor.reshape(-1, 2, config.head_width // 2, *tensor.shape[1:])[:, ::-1].reshape(tensor.shape)


def is_redundant(name: str) -> bool:
    """Whether a checkpoint's tensor holds no parameter, but a mask or rotary frequencies."""
    return bool(re.search(r"\.attn\.(masked_)?bias$|rotary_emb\.inv_freq$", name))


def read_config(path: Path) -> tuple[Family, ModelConfig]:
    """Family and ModelConfig of a config.json of transformers 4 or 5. Raises `UserError` for what is not supported."""
    return parse_config(read_json(path), path)


def parse_config(values: dict[str, Any], path: Path) -> tuple[Family, ModelConfig]:
    """As `read_config`, of the values of a config.json; `path` names the file in errors."""
    family = values.get("model_type")
    try:
        if family in ("gpt2", *_LLAMAS):
            return family, with_vocabulary(_gpt2_config(values) if family == "gpt2" else _llama_config(values))
    except KeyError as error:
        raise UserError(f"{path} has no {error.args[0]}") from error
    except (UserError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"{path}: {error}") from error
    raise UserError(f"{path}: model_type {family!r} is none of gpt2, {', '.join(_LLAMAS)}")


def with_vocabulary(config: ModelConfig) -> ModelConfig:
    """The config itself. Raises `UserError` where vocab_size is 0, which stands for the tokenizer's in a run's own."""
    config.require(config.vocab_size > 0, "vocab_size", "is not positive")
    return config


def family_of(config: ModelConfig) -> Family:
    """The Hugging Face family that has this architecture: its config.json, read back, gives every field again.

    Raises `UserError` if no family has a field's value.
    """
    family = _nearest_family(config)
    values = config_values(family, config)
    # Where the model has no biases, those of GPT-2 are zeros.
    back = replace(_gpt2_config(values), bias=config.bias) if family == "gpt2" else _llama_config(values)
    theirs = _architecture(back)
    for name, value in _architecture(config).items():
        complaint = f"is in no Hugging Face family: {family}, the nearest one, has {theirs[name]}"
        config.require(value == theirs[name], name, complaint)
    return family


def _nearest_family(config: ModelConfig) -> Family:
    if config.position == "learned":
        return "gpt2"
    if config.norm == "nonparametric_rmsnorm":
        return "nanochat"
    if config.nope_interval:
        return "smollm3"
    if config.qk_norm_scale:
        return "qwen3"
    if config.qkv_bias and not config.out_bias:
        return "qwen2"
    # Llama's config takes no head width that is not n_embd / n_head unless n_head divides n_embd; Mistral's does.
    return "mistral" if config.window or config.n_embd % config.n_head else "llama"


def _architecture(config: ModelConfig) -> dict[str, Any]:
    """The fields that a checkpoint determines and that this model uses, each with the value that takes effect."""
    values = {field.name: getattr(config, field.name) for field in fields(config) if field.metadata["architecture"]}
    values |= {"n_kv_head": config.kv_heads, "mlp_width": config.mlp_features, "head_dim": config.head_width}
    learned = config.position == "learned"
    unused = ("rope_", "nope_") if learned else ("rope_original",) if config.rope_factor == 1 else ()
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
    family, is_nanochat = values["model_type"], values["model_type"] == "nanochat"
    values = _USUAL | _LLAMAS[family][1] | values
    n_head, n_embd = values["num_attention_heads"], values["hidden_size"]
    n_kv_head, head_dim = values.get("num_key_value_heads"), values.get("head_dim")
    _require_values(values, {"hidden_act": "relu2" if is_nanochat else "silu"})
    cap = values.get("final_logit_softcapping") if is_nanochat else None
    return ModelConfig(
        **_renamed(values, 1),
        **_rope(values),
        **_biases(values),
        n_kv_head=0 if n_kv_head in (None, n_head) else n_kv_head,
        head_dim=0 if head_dim is None or head_dim * n_head == n_embd else head_dim,
        mlp_width=values["intermediate_size"],
        activation="relu2" if is_nanochat else "swiglu",
        norm="nonparametric_rmsnorm" if is_nanochat else "rmsnorm",
        position="rope",
        window=_window(values),
        nope_interval=_nope_interval(values) if family == "smollm3" else 0,
        qk_norm=is_nanochat or family == "qwen3",
        qk_norm_scale=family == "qwen3",
        embedding_norm=is_nanochat,
        logit_cap=0.0 if cap is None else _number(cap),
    )


def _biases(values: dict[str, Any]) -> dict[str, Any]:
    """The fields of ModelConfig for a family's biases. Raises `UserError` for biases of the MLP alone."""
    family = values["model_type"]
    if family == "qwen2":
        return {"qkv_bias": True}
    if family == "mistral" or not values.get("attention_bias"):
        _require_values(values, {"mlp_bias": False} if family in _WITH_MLP_BIAS else {})
        return {}
    if family in _WITH_MLP_BIAS and values.get("mlp_bias"):
        return {"bias": True}
    return {"qkv_bias": True, "out_bias": True}


def _window(values: dict[str, Any]) -> Any:
    """The sliding window of the layers, 0 for none. Raises `UserError` where some layers have it and others do not."""
    family, window = values["model_type"], values.get("sliding_window")
    switched_on = family == "mistral" or (family in _WITH_LAYER_TYPES and values.get("use_sliding_window"))
    if not switched_on or window is None:
        return 0
    if kinds := values.get("layer_types"):
        local, mixed = "sliding_attention" in kinds, len(set(kinds)) > 1
    elif family == "smollm3":  # by default the layers without rotary positions
        local, mixed = 0 < _nope_interval(values) <= values["num_hidden_layers"], _nope_interval(values) != 1
    else:
        first = 0 if family == "mistral" else values.get("max_window_layers", 28)
        local, mixed = first < values["num_hidden_layers"], first > 0
    if local and mixed and window < values["max_position_embeddings"]:
        raise UserError(f"use_sliding_window=True is not supported where only some layers attend to {window} tokens")
    if window < 1:
        raise UserError(f"sliding_window={window} is not positive")
    return window if local and not mixed else 0


def _nope_interval(values: dict[str, Any]) -> Any:
    """ModelConfig.nope_interval of SmolLM3's fields. Raises `UserError` for layers at other than equal intervals."""
    interval, layers = values["no_rope_layer_interval"], values.get("no_rope_layers")
    if layers is None:
        return interval
    layers = layers[: values["num_hidden_layers"]]
    found = layers.index(0) + 1 if 0 in layers else 0
    for each in (interval, found):
        if layers == _rotary_layers(each, len(layers)) and len(layers) == values["num_hidden_layers"]:
            return each
    raise UserError(f"no_rope_layers={str(layers)[:80]} is not supported: it is no 0 at every n-th of the layers")


def _rotary_layers(interval: int, n_layer: int) -> list[int]:
    """SmolLM3's no_rope_layers: 1 for each layer with rotary positions, 0 for each without."""
    return [int(interval == 0 or number % interval != 0) for number in range(1, n_layer + 1)]


def _rope(values: dict[str, Any]) -> dict[str, Any]:
    """The rotary fields of ModelConfig. Raises `UserError` if rope_scaling and rope_parameters are not the same."""
    usual = {"rope_theta": values["rope_theta"], "rope_type": "default"}
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
    theirs |= {"head_dim": config.head_width} if config.head_dim or family == "qwen3" else {}
    return theirs | {
        "model_type": family,
        "architectures": [_LLAMAS[family][0]],
        "num_key_value_heads": config.kv_heads,
        "intermediate_size": config.mlp_features,
        "hidden_act": "relu2" if family == "nanochat" else "silu",
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling if config.rope_factor != 1 else None,
        **_own_values(family, config),
    }


def _own_values(family: Family, config: ModelConfig) -> dict[str, Any]:
    """The fields of a config.json that only some of the families like Llama have."""
    own: dict[str, Any] = {}
    if family not in ("qwen2", "mistral"):
        own |= {"attention_bias": config.bias or config.out_bias}
    if family in _WITH_MLP_BIAS:
        own |= {"mlp_bias": config.bias}
    if family == "mistral":
        own |= {"sliding_window": config.window or None}
    if family in _WITH_LAYER_TYPES and config.window:
        kinds = ["sliding_attention"] * config.n_layer
        own |= {"use_sliding_window": True, "sliding_window": config.window, "layer_types": kinds}
        own |= {"max_window_layers": 0} if family != "smollm3" else {}
    if family == "smollm3":
        interval = config.nope_interval
        own |= {"no_rope_layer_interval": interval, "no_rope_layers": _rotary_layers(interval, config.n_layer)}
    if family == "nanochat":
        own |= {"final_logit_softcapping": config.logit_cap or None}
    return own
