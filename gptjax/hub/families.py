"""The Hugging Face families that the model covers: their tensors' names and shapes, and their config.json."""

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.files import read_json
from gptjax.model import GPT, ROPE_HIGH, ROPE_LOW

# Path of a parameter -> name of its tensor, with the layer's number for {}. Heads lie one after another along the
# output of query, key and value; GPT-2 keeps these three in one tensor, side by side.
_GPT2_LAYER = {
    "attention_norm/scale": "ln_1.weight",
    "attention_norm/bias": "ln_1.bias",
    "attention/query/kernel": "attn.c_attn.weight",
    "attention/query/bias": "attn.c_attn.bias",
    "attention/key/kernel": "attn.c_attn.weight",
    "attention/key/bias": "attn.c_attn.bias",
    "attention/value/kernel": "attn.c_attn.weight",
    "attention/value/bias": "attn.c_attn.bias",
    "attention/out/kernel": "attn.c_proj.weight",
    "attention/out/bias": "attn.c_proj.bias",
    "mlp_norm/scale": "ln_2.weight",
    "mlp_norm/bias": "ln_2.bias",
    "mlp/up/kernel": "mlp.c_fc.weight",
    "mlp/up/bias": "mlp.c_fc.bias",
    "mlp/down/kernel": "mlp.c_proj.weight",
    "mlp/down/bias": "mlp.c_proj.bias",
}
_GPT2 = {
    "token_embedding": "transformer.wte.weight",
    "position_embedding": "transformer.wpe.weight",
    "final_norm/scale": "transformer.ln_f.weight",
    "final_norm/bias": "transformer.ln_f.bias",
    "head": "lm_head.weight",
} | {f"layers/{path}": f"transformer.h.{{}}.{name}" for path, name in _GPT2_LAYER.items()}

_LLAMA_LAYER = {
    "attention_norm/scale": "input_layernorm.weight",
    "attention/query/kernel": "self_attn.q_proj.weight",
    "attention/query/bias": "self_attn.q_proj.bias",
    "attention/key/kernel": "self_attn.k_proj.weight",
    "attention/key/bias": "self_attn.k_proj.bias",
    "attention/value/kernel": "self_attn.v_proj.weight",
    "attention/value/bias": "self_attn.v_proj.bias",
    "attention/out/kernel": "self_attn.o_proj.weight",
    "attention/out/bias": "self_attn.o_proj.bias",
    "mlp_norm/scale": "post_attention_layernorm.weight",
    "mlp/up/kernel": "mlp.up_proj.weight",
    "mlp/up/bias": "mlp.up_proj.bias",
    "mlp/gate/kernel": "mlp.gate_proj.weight",
    "mlp/gate/bias": "mlp.gate_proj.bias",
    "mlp/down/kernel": "mlp.down_proj.weight",
    "mlp/down/bias": "mlp.down_proj.bias",
}
_LLAMA = {
    "token_embedding": "model.embed_tokens.weight",
    "final_norm/scale": "model.norm.weight",
    "head": "lm_head.weight",
} | {f"layers/{path}": f"model.layers.{{}}.{name}" for path, name in _LLAMA_LAYER.items()}

Family = Literal["gpt2", "nanogpt", "llama", "qwen2"]
_TABLES: dict[Family, dict[str, str]] = {"gpt2": _GPT2, "nanogpt": _GPT2, "llama": _LLAMA, "qwen2": _LLAMA}
# Tensors that some files hold and no model needs: masks, tables of angles, the head again where it is the embedding.
SPARE = re.compile(r"\.attn\.(masked_)?bias$|rotary_emb\.inv_freq$")


class Place(NamedTuple):
    """Where a tensor belongs: a parameter, and its layer or None."""

    path: str
    layer: int | None


def expected_tensors(config: ModelConfig, family: Family) -> dict[str, tuple[tuple[int, ...], list[Place]]]:
    """Name of every tensor of a checkpoint -> its shape, and the places that it fills (query, key and value in order).

    A Linear of PyTorch keeps [out, in]; GPT-2's files at Hugging Face keep [in, out], as kernels do here.
    """
    table, expected = _TABLES[family], dict[str, tuple[tuple[int, ...], list[Place]]]()
    plain = replace(config, lora_rank=0)
    for key, leaf in jax.tree_util.tree_leaves_with_path(jax.eval_shape(lambda: draw_params(plain, 0))):
        path = path_of(key)
        layers: list[int | None] = list(range(config.n_layer)) if path.startswith("layers/") else [None]
        shape = leaf.shape[1:] if path.startswith("layers/") else leaf.shape
        if path in ("token_embedding", "head"):
            shape = (config.vocab_size, config.n_embd)
        if path.endswith("kernel"):
            n_in = config.n_embd if not path.endswith("down/kernel") else config.mlp_features
            shape = (n_in, int(np.prod(shape)) // n_in)
            shape = shape if family == "gpt2" else shape[::-1]
        elif path.endswith("bias"):
            shape = (int(np.prod(shape)),)
        for layer in layers:
            name = table[path].format(layer)
            if "c_attn" in name:
                fused = [Place(path.replace("query", part), layer) for part in ("query", "key", "value")]
                if "/query/" in path:
                    axis = out_axis(family, shape)
                    whole = tuple(3 * n if i == axis else n for i, n in enumerate(shape))
                    expected[name] = (whole, fused)
            else:
                expected[name] = (shape, [Place(path, layer)])
    return expected


def out_axis(family: Family, shape: tuple[int, ...]) -> int:
    return 1 if family == "gpt2" and len(shape) == 2 else 0


def path_of(key: Any) -> str:
    return jax.tree_util.keystr(key, simple=True, separator="/")


def draw_params(config: ModelConfig, seed: int) -> Any:
    """Parameters as a run draws them; for their shapes alone call it in `jax.eval_shape`."""
    return GPT(replace(config, dtype="float32")).init(jax.random.key(seed), jnp.zeros((1, 1), jnp.int32))["params"]


def read_config(path: Path) -> tuple[Family, ModelConfig]:
    """Family and ModelConfig of a config.json, in the form of transformers 4 or 5."""
    values = read_json(path)
    family = values.get("model_type")
    try:
        if family == "gpt2":
            return "gpt2", within_reason(_gpt2_config(values))
        if family in ("llama", "qwen2"):
            return family, within_reason(_llama_config(values))
    except KeyError as error:
        raise UserError(f"{path} has no {error.args[0]}") from error
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"{path} is not a config of {family}: {error}") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    raise UserError(f"{path}: model_type {family!r} is none of gpt2, llama, qwen2")


def within_reason(config: ModelConfig) -> ModelConfig:
    """Raise `UserError` for sizes that no model has: what follows would take memory in proportion to them."""
    for name in ("vocab_size", "block_size", "n_layer", "n_embd", "mlp_width", "rope_original_block_size"):
        most = 10_000 if name == "n_layer" else 1 << 24
        config.require(getattr(config, name) <= most, name, f"is more than {most:,}")
    config.require(config.vocab_size > 0, "vocab_size", "is not positive")
    for name in ("norm_eps", "rope_theta", "rope_factor"):
        config.require(math.isfinite(getattr(config, name)), name, "is not a finite number")
    return config


def _refuse(values: dict[str, Any], harmless: dict[str, Any]) -> None:
    """Raise `UserError` where a feature is on that changes the model and is not here."""
    for name, off in harmless.items():
        if values.get(name, off) not in (off, None):
            raise UserError(f"{name}={values[name]!r} is not supported; only {off!r} is")


def _number(value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{value!r} is not a number")
    return float(value)


def _gpt2_config(values: dict[str, Any]) -> ModelConfig:
    harmless = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
    _refuse(values, harmless)
    forms: dict[str, Any] = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
    forms |= {"gelu": "gelu_erf", "relu2": "relu2"}
    activation = values.get("activation_function", "gelu_new")
    if activation not in forms:
        raise UserError(f"activation_function {activation!r} is none of {', '.join(forms)}")
    return ModelConfig(
        vocab_size=values["vocab_size"],
        block_size=values.get("n_positions", values.get("n_ctx", 1024)),
        n_layer=values["n_layer"],
        n_head=values["n_head"],
        n_embd=values["n_embd"],
        mlp_width=values.get("n_inner") or 0,
        activation=forms[activation],
        norm_eps=_number(values.get("layer_norm_epsilon", 1e-5)),
        bias=True,
        tied_head=values.get("tie_word_embeddings", True),
    )


def _llama_config(values: dict[str, Any]) -> ModelConfig:
    qwen = values["model_type"] == "qwen2"
    harmless = {"hidden_act": "silu", "use_sliding_window": False}
    n_head, n_embd = values["num_attention_heads"], values["hidden_size"]
    _refuse(values, harmless | {"head_dim": n_embd // max(n_head, 1)})
    if not qwen:
        _refuse(values, {"mlp_bias": values.get("attention_bias", False)})
    rope = (values.get("rope_scaling") or {}) | (values.get("rope_parameters") or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise UserError(f"rope_type {kind!r} is not supported; only 'default' and 'llama3' are")
    _refuse(rope, {"low_freq_factor": ROPE_LOW, "high_freq_factor": ROPE_HIGH})
    scaled = (
        {}
        if kind == "default"
        else {
            "rope_factor": _number(rope["factor"]),
            "rope_original_block_size": rope["original_max_position_embeddings"],
        }
    )
    return ModelConfig(
        vocab_size=values["vocab_size"],
        block_size=values.get("max_position_embeddings", 32768 if qwen else 2048),
        n_layer=values["num_hidden_layers"],
        n_head=n_head,
        n_embd=n_embd,
        n_kv_head=_none_if_same(values.get("num_key_value_heads"), n_head),
        mlp_width=values["intermediate_size"],
        activation="swiglu",
        norm="rmsnorm",
        norm_eps=_number(values.get("rms_norm_eps", 1e-6)),
        position="rope",
        rope_theta=_number(rope.get("rope_theta", values.get("rope_theta", 10_000.0))),
        bias=bool(values.get("attention_bias", False)) and not qwen,
        qkv_bias=qwen,
        tied_head=values.get("tie_word_embeddings", False),
        **scaled,
    )


def _none_if_same(n_kv_head: int | None, n_head: int) -> int:
    return 0 if n_kv_head in (None, n_head) else n_kv_head


def family_of(config: ModelConfig) -> Family:
    """The Hugging Face family that a model can be written as.

    Raises:
        UserError: none has this combination of fields.
    """
    elsewhere = "is in no Hugging Face family here: not gpt2, llama or qwen2"
    for name in ("qk_norm", "embedding_norm", "logit_cap"):
        config.require(not getattr(config, name), name, elsewhere)
    kind = (config.norm, config.position, config.activation == "swiglu")
    if kind == ("layernorm", "learned", False) and config.kv_heads == config.n_head and not config.qkv_bias:
        return "gpt2"
    if kind == ("rmsnorm", "rope", True) and not (config.bias and config.qkv_bias):
        return "qwen2" if config.qkv_bias else "llama"
    raise UserError(
        "no Hugging Face family here has this model: gpt2 has layernorm, learned positions, GELU and n_kv_head=n_head; "
        f"llama and qwen2 have rmsnorm, rope and swiglu; this one has model.norm={config.norm}, position="
        f"{config.position}, activation={config.activation}, n_kv_head={config.kv_heads}, bias={config.bias}, "
        f"qkv_bias={config.qkv_bias}"
    )


def config_values(family: Family, config: ModelConfig) -> dict[str, Any]:
    """What `read_config` reads."""
    if family == "gpt2":
        return {
            "architectures": ["GPT2LMHeadModel"],
            "vocab_size": config.vocab_size,
            "n_positions": config.block_size,
            "n_layer": config.n_layer,
            "n_head": config.n_head,
            "n_embd": config.n_embd,
            "n_inner": config.mlp_width or None,
            "activation_function": {"gelu_tanh": "gelu_new", "gelu_erf": "gelu", "relu2": "relu2"}[config.activation],
            "layer_norm_epsilon": config.norm_eps,
            "tie_word_embeddings": config.tied_head,
        }
    scaling = None
    if config.rope_factor != 1:
        scaling = {
            "rope_type": "llama3",
            "factor": config.rope_factor,
            "low_freq_factor": ROPE_LOW,
            "high_freq_factor": ROPE_HIGH,
            "original_max_position_embeddings": config.rope_original_block_size,
        }
    return {
        "architectures": ["LlamaForCausalLM" if family == "llama" else "Qwen2ForCausalLM"],
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.block_size,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.kv_heads,
        "hidden_size": config.n_embd,
        "intermediate_size": config.mlp_features,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": config.tied_head,
    } | ({"attention_bias": config.bias, "mlp_bias": config.bias} if family == "llama" else {})
