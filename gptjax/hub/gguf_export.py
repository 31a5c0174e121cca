"""GGUF out: a model as one file for llama.cpp, by the `gguf` package."""

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.cli import GgufType
from gptjax.config import ModelConfig
from gptjax.files import replacing
from gptjax.hub.export import gather, rounded
from gptjax.hub.families import Family, Tensor, config_values, expected_tensors, family_of
from gptjax.hub.gguf import (
    FIELDS,
    ROPE_FACTORS,
    architecture_of,
    library,
    rope_factors,
    rotated_heads,
    tensor_names,
)
from gptjax.hub.weights import merge_lora
from gptjax.sharding import by_path


def export_gguf(path: Path, config: ModelConfig, params: Any, kind: GgufType, fields: Mapping[str, Any]) -> None:
    """Write a GGUF file with the weights, whose matrices are of type `kind`, and with the tokenizer's fields.

    LoRA's updates are merged. Raises `UserError` if llama.cpp has no such architecture.
    """
    gguf, family = library(), family_of(config)
    _require_architecture(config, family)
    config, params = merge_lora(config, params)
    tensors = _tensors(config, family, params)
    types = {name: _type_of(name, shape, kind) for name, (shape, _) in tensors.items()}
    with (
        replacing(path) as temporary,
        contextlib.closing(gguf.GGUFWriter(temporary, architecture_of(family))) as writer,
    ):
        for name, value in (_config_fields(config, family, kind) | dict(fields)).items():
            if isinstance(value, list):
                writer.add_array(name, value)
            else:
                of = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING"}[type(value)]
                writer.add_key_value(name, value, gguf.GGUFValueType[of])
        for name, (shape, _) in tensors.items():
            block, n_bytes = gguf.GGML_QUANT_SIZES[types[name]]
            writer.add_tensor_info(name, shape, np.dtype(np.float32), math.prod(shape) // block * n_bytes, types[name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, (_, make) in tensors.items():
            array = rounded(name, make(), "float16" if types[name].name == "F16" else "float32")
            writer.write_tensor_data(gguf.quantize(array, types[name]))


def _require_architecture(config: ModelConfig, family: Family) -> None:
    """Raise `UserError` unless llama.cpp computes this model."""
    biased = config.bias or config.out_bias
    for supported, name, complaint in (
        (family != "gpt2" or config.activation == "gelu_tanh", "activation", ": its GPT-2 has gelu_tanh"),
        (family != "nanochat", "norm", " together with RoPE"),
        (not config.local_window, "window", f": layers of its {architecture_of(family)} attend to all tokens"),
        (config.nope_interval in (0, 4), "nope_interval", ": in its smollm3 every fourth layer has no positions"),
        (
            family not in ("qwen3", "smollm3") or not biased,
            "bias" if config.bias else "out_bias",
            f": its {family} has no biases",
        ),
    ):
        fix = "export a folder for transformers instead"
        config.require(supported, name, f"is in no architecture of llama.cpp{complaint}; {fix}")


def _tensors(
    config: ModelConfig, family: Family, params: Any
) -> dict[str, tuple[tuple[int, ...], Callable[[], np.ndarray]]]:
    """The tensors of the file, each with its shape and how to make it."""
    layout: Family = family
    if family == "gpt2":  # the file has kernels [out, in], as nanoGPT, and all biases: zeros where the model has none
        layout, config = "nanogpt", replace(config, bias=True)
    names, leaves = tensor_names(config, layout), by_path(params)
    tensors: dict[str, tuple[tuple[int, ...], Callable[[], np.ndarray]]] = {
        names[name]: (tensor.shape, partial(_make, tensor, leaves, rotated_heads(name, config, family)))
        for name, tensor in expected_tensors(config, layout).items()
    }
    if config.position == "rope" and config.rope_factor != 1:
        tensors[ROPE_FACTORS] = (config.head_width // 2,), partial(rope_factors, config)
    return tensors


def _make(tensor: Tensor, leaves: Mapping[str, Any], heads: int) -> np.ndarray:
    array = gather(tensor, leaves).astype(np.float32)
    if heads:  # halves of the head -> pairs of neighbours that RoPE turns
        array = array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
    return array


def _type_of(name: str, shape: tuple[int, ...], kind: GgufType) -> Any:
    """A tensor's type: vectors and positions stay float32, and rows that a type's blocks do not fill become float16."""
    types = library().GGMLQuantizationType
    if len(shape) == 1 or name.startswith("position"):
        return types.F32
    if kind in ("q8_0", "q4_0") and shape[-1] % 32:
        return types.F16
    return types.Q8_0 if kind == "q4_0" and not name.startswith("blk.") else types[kind.upper()]


def _config_fields(config: ModelConfig, family: Family, kind: GgufType) -> dict[str, Any]:
    values = config_values(family, config) | {"n_inner": config.mlp_features}
    arch = architecture_of(family)
    own = {name: values[theirs] for name, theirs in FIELDS[arch].items() if theirs in values}
    own |= {"vocab_size": config.vocab_size}
    if config.position == "rope":
        own["rope.dimension_count"] = config.head_width
    if "attention.key_length" in own:
        own["attention.value_length"] = config.head_width
    file_type = library().LlamaFileType["ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"]
    general = {"general.file_type": int(file_type), "general.quantization_version": library().GGML_QUANT_VERSION}
    return general | {f"{arch}.{name}": value for name, value in own.items()}
