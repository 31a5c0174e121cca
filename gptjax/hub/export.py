"""Write a model as a Hugging Face folder."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from gptjax.config import ModelConfig
from gptjax.hub.families import Family, Place, config_values, expected_tensors, family_of, out_axis, path_of
from gptjax.hub.weights import INDEX, WEIGHTS, merge_lora

_SHARD_BYTES = 5_000_000_000  # of an exported file, as transformers has it


def export(
    folder: Path,
    config: ModelConfig,
    params: Any,
    dtype: str,
    shard_bytes: int = _SHARD_BYTES,
) -> None:
    """Write config.json and the weights as the Hugging Face family that has this architecture.

    The padding of the vocabulary is left out, LoRA's updates are added to the kernels.

    Raises:
        UserError: no family has it.
    """
    family = family_of(config)
    config, params = merge_lora(config, params)
    values = {"model_type": family, "torch_dtype": dtype, "bos_token_id": None, "eos_token_id": None}
    values |= config_values(family, config)
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    leaves = {path_of(key): leaf for key, leaf in jax.tree_util.tree_leaves_with_path(params)}
    files: list[dict[str, list[Place]]] = [{}]
    room, sizes = shard_bytes, dict[str, int]()
    whole = replace(config, bias=True) if family == "gpt2" else config
    for name, (shape, places) in expected_tensors(whole, family).items():
        sizes[name] = int(np.prod(shape)) * jnp.dtype(dtype).itemsize
        if files[-1] and room < sizes[name]:
            files, room = [*files, {}], shard_bytes
        files[-1][name], room = places, room - sizes[name]
    names = [WEIGHTS] if len(files) == 1 else [f"model-{i:05}-of-{len(files):05}.safetensors" for i in _from_1(files)]
    for file_name, places_of in zip(names, files, strict=True):
        tensors = {name: _tensor(places, leaves, config, family, dtype) for name, places in places_of.items()}
        safetensors.numpy.save_file(tensors, folder / file_name, {"format": "pt"})
    if len(files) > 1:
        weight_map = {name: file_name for file_name, some in zip(names, files, strict=True) for name in some}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _from_1(files: list[Any]) -> range:
    return range(1, len(files) + 1)


def _tensor(
    places: list[Place], leaves: Mapping[str, jax.Array], config: ModelConfig, family: Family, dtype: str
) -> np.ndarray:
    """One tensor of a file, from the parameters that it holds; GPT-2 has biases even where the model has none."""
    pieces = []
    for path, layer in places:
        if path not in leaves:
            width = {"mlp/up/bias": config.mlp_features}.get(path.removeprefix("layers/"), config.n_embd)
            pieces.append(np.zeros(width, np.float32))
            continue
        piece = np.asarray(leaves[path] if layer is None else leaves[path][layer])
        if path in ("token_embedding", "head"):
            piece = piece[: config.vocab_size]
        elif path.endswith("kernel"):
            n_in = config.mlp_features if path.endswith("down/kernel") else config.n_embd
            piece = piece.reshape(n_in, -1) if family == "gpt2" else piece.reshape(n_in, -1).T
        elif path.endswith("bias"):
            piece = piece.reshape(-1)
        pieces.append(piece)
    tensor = np.concatenate(pieces, axis=out_axis(family, pieces[0].shape)) if len(pieces) > 1 else pieces[0]
    return np.ascontiguousarray(tensor.astype(jnp.dtype(dtype)))
