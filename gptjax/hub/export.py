"""Weights out: a model as a Hugging Face folder's config.json and safetensors."""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.hub.families import Tensor, config_values, exchange_halves, expected_tensors, family_of
from gptjax.hub.weights import INDEX, WEIGHTS, merge_lora
from gptjax.sharding import by_path


def export(folder: Path, config: ModelConfig, params: Any, dtype: str, shard_bytes: int = 5_000_000_000) -> None:
    """Write config.json and the weights as the Hugging Face family that has this architecture.

    The vocabulary's padding is left out, LoRA's updates are merged, and files are split at `shard_bytes`. Raises
    `UserError` if no family has it, or if a weight is too large for `dtype`.
    """
    family, n_bytes = family_of(config), jnp.dtype(dtype).itemsize
    config, params = merge_lora(config, params)
    no_marks = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))  # else the defaults of the family
    values = {"torch_dtype": dtype} | no_marks | config_values(family, config)
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    leaves = by_path(params)
    biased = replace(config, bias=True) if family == "gpt2" else config
    shards, sizes = [dict[str, Tensor]()], [0]
    for name, tensor in expected_tensors(biased, family).items():
        size = n_bytes * math.prod(tensor.shape)
        if shards[-1] and sizes[-1] + size > shard_bytes:
            shards, sizes = [*shards, {}], [*sizes, 0]
        shards[-1][name] = tensor
        sizes[-1] += size
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        file_name = WEIGHTS if len(shards) == 1 else f"model-{i:05}-of-{len(shards):05}.safetensors"
        arrays = {
            name: rounded(name, exchange_halves(name, gather(tensor, leaves), config, family), dtype)
            for name, tensor in shard.items()
        }
        safetensors.numpy.save_file(arrays, folder / file_name, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file_name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def rounded(name: str, tensor: np.ndarray, dtype: str) -> np.ndarray:
    """The tensor in the dtype of the file. Raises `UserError` where a weight is not a finite number there."""
    with np.errstate(over="ignore"):
        rounded = tensor.astype(jnp.dtype(dtype))
    if not np.isfinite(rounded).all():
        worst = tensor[~np.isfinite(rounded)][0]
        fix = (
            f"which {dtype} cannot hold: pass another --dtype (or --type)"
            if np.isfinite(worst)
            else "so the model is damaged"
        )
        raise UserError(f"{name} has a weight of {worst:g}, {fix}")
    return rounded


def gather(tensor: Tensor, leaves: Mapping[str, jax.Array]) -> np.ndarray:
    """A checkpoint's tensor from the parameters that it holds; those that the model does not have are zeros."""
    pieces = []
    for path, layer, shape, transposed in tensor.places:
        piece = np.zeros(shape, np.float32)
        if path in leaves:
            piece = np.asarray(leaves[path] if layer is None else leaves[path][layer])
            piece = piece.reshape(-1, *shape[1:])[: shape[0]]  # without the rows that pad a vocabulary
        pieces.append(piece.T if transposed else piece)
    return np.ascontiguousarray(np.concatenate(pieces, tensor.axis))
