"""Weights in and out: Hugging Face folders of GPT-2, Llama and Qwen2.5, and nanoGPT's ckpt.pt.

    python -m gptjax.export out/shakespeare my-model     # a folder that transformers loads

A file is read with no code run: safetensors alone, or torch's weights-only loader.
"""

import dataclasses
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jax.sharding import NamedSharding, PartitionSpec

from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.files import read_json
from gptjax.host import peak_host_memory
from gptjax.hub.families import (
    SPARE,
    Family,
    Place,
    draw_params,
    expected_tensors,
    out_axis,
    path_of,
    read_config,
    within_reason,
)

# What a Hugging Face folder has beside its weights and tokenizer.json; a run that starts from one keeps them.
SIDE_FILES = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json")
_HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "config.json", "tokenizer.json", "vocab.json", "merges.txt"]
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # safetensors' names and numpy's


class TensorInfo(NamedTuple):
    """A tensor in a file, before it is read."""

    dtype: np.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Weights:
    """A checkpoint that has been looked at and not yet read; `read` yields its tensors, one file after another."""

    source: Path
    family: Family
    config: ModelConfig  # dtype "auto", block_size as the checkpoint has it
    tensors: Mapping[str, TensorInfo]
    read: Callable[[], Iterator[tuple[str, np.ndarray]]]


def locate(name: str) -> Path:
    """The path itself if it exists, else the folder of the model of that name, downloaded from the hub.

    Raises:
        UserError: there is no such path, and no such model or no network.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name):
        raise UserError(f"{name!r} does not exist: pass a run's folder, a Hugging Face folder or a model's name there")
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, allow_patterns=[*_HUB_FILES, *SIDE_FILES]))
    except Exception as error:  # the hub's client has a class of its own for each way of failing
        reason = str(error).split("\n")[0][:200]
        raise UserError(f"{name!r} is no folder here, and the Hugging Face hub did not give it: {reason}") from error


def open_weights(path: Path) -> Weights:
    """Look at a Hugging Face folder or at nanoGPT's ckpt.pt: its config, and every tensor's name and shape.

    Raises:
        UserError: it is neither; its family or a feature is unknown here; a file is missing or damaged; a tensor is
            missing, extra or of another shape than the config says.
    """
    weights = _open_folder(path) if path.is_dir() else _open_nanogpt(path)
    wanted = {name: shape for name, (shape, _) in expected_tensors(weights.config, weights.family).items()}
    found = {name: info.shape for name, info in weights.tensors.items()}
    for name in [*wanted, *found]:
        if name not in found:
            raise UserError(f"{path} lacks the tensor {name} {list(wanted[name])} that its config asks for")
        if name not in wanted:
            raise UserError(f"{path} has a tensor {_shown(name)} {list(found[name])} that its config has no place for")
        if found[name] != wanted[name]:
            raise UserError(f"{path}: {name} is {list(found[name])}, and its config asks for {list(wanted[name])}")
    return weights


def load_params(weights: Weights, config: ModelConfig, abstract: Any, seed: int = 0) -> Any:
    """The parameters of `config` with the shapes, dtypes and shardings of `abstract`, tensor by tensor put in place.

    There may be fewer positions than in the checkpoint (its first ones are kept), a padded vocabulary (with zeros),
    and LoRA's updates, drawn from `seed`. The host holds little more than one tensor beside the parameters themselves.
    """
    start, places = time.perf_counter(), expected_tensors(weights.config, weights.family)
    leaves = {path_of(key): leaf for key, leaf in jax.tree_util.tree_leaves_with_path(abstract)}
    filled: dict[str, jax.Array] = {}
    for name, tensor in weights.read():
        for place, value in _parts(name, tensor, places[name][1], weights, leaves):
            leaf = leaves[place.path]
            if place.layer is None:
                filled[place.path] = _padded(value, leaf)
                continue
            if place.path not in filled:
                filled[place.path] = jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
            split = NamedSharding(leaf.sharding.mesh, PartitionSpec(None, *leaf.sharding.spec[1:]))
            layer = jax.make_array_from_callback((1, *leaf.shape[1:]), split, value[None].__getitem__)
            filled[place.path] = _put(filled[place.path], layer, np.int32(place.layer))
            filled[place.path].block_until_ready()  # or the tensors read next would pile up
    filled |= _draw_lora(config, {path: leaf.sharding for path, leaf in leaves.items() if "lora_" in path}, seed)
    n_bytes = sum(info.dtype.itemsize * int(np.prod(info.shape)) for info in weights.tensors.values())
    print(
        f"loaded {weights.source}: {n_bytes / 2**30:.2f} GiB in {time.perf_counter() - start:.1f} s, "
        f"peak host memory {peak_host_memory() / 2**30:.2f} GiB",
        file=sys.stderr,
    )
    return jax.tree_util.tree_map_with_path(lambda key, _: filled[path_of(key)], abstract)


def reuse_params(params: Any, config: ModelConfig, abstract: Any, seed: int = 0) -> Any:
    """As `load_params`, from parameters of a run without LoRA."""
    leaves = {path_of(key): leaf for key, leaf in jax.tree_util.tree_leaves_with_path(abstract)}
    drawn = _draw_lora(config, {path: leaf.sharding for path, leaf in leaves.items() if "lora_" in path}, seed)
    known = {path_of(key): leaf for key, leaf in jax.tree_util.tree_leaves_with_path(params)}
    known["position_embedding"] = known.get("position_embedding", np.zeros(0))[: config.block_size]
    filled = {path: drawn[path] if path in drawn else _padded(np.asarray(known[path]), leaves[path]) for path in leaves}
    return jax.tree_util.tree_map_with_path(lambda key, _: filled[path_of(key)], abstract)


def tokenizer_of(path: Path, config: ModelConfig) -> str:
    """The folder's tokenizer as data.tokenizer names it; a ckpt.pt's is beside it, or GPT-2's if the vocabulary is.

    Raises:
        UserError: it is neither.
    """
    if path.is_dir():
        return str(path)
    if (path.parent / "tokenizer.json").exists():
        return str(path.parent / "tokenizer.json")
    if config.vocab_size in (50257, 50304):  # nanoGPT pads to the latter
        return "gpt2"
    raise UserError(
        f"{path} was trained with a tokenizer of its own: put its tokenizer.json beside it; for a nanoGPT meta.pkl "
        "`python -m gptjax.data convert-meta PATH/meta.pkl` makes one"
    )


def adopt(config: ModelConfig, checkpoint: ModelConfig) -> ModelConfig:
    """The checkpoint's architecture with the config's block_size, dropout, dtype and LoRA.

    Raises:
        UserError: the config sets another field to something else, or asks for more positions than there are.
    """
    if config.block_size == ModelConfig().block_size:
        config = replace(config, block_size=min(config.block_size, checkpoint.block_size))
    if config.block_size > checkpoint.block_size:
        raise UserError(
            f"model.block_size={config.block_size} is longer than this checkpoint's {checkpoint.block_size} "
            f"positions; pass --model.block_size {checkpoint.block_size} or less"
        )
    own = {field.name for field in dataclasses.fields(ModelConfig) if not field.metadata["architecture"]}
    for name, default in vars(ModelConfig()).items():
        value, there = getattr(config, name), getattr(checkpoint, name)
        if name not in own and value not in (default, there):
            raise UserError(f"model.{name}={value} is not what the checkpoint has ({there}); leave it out")
    return replace(checkpoint, **{name: getattr(config, name) for name in own})


def merge_lora(config: ModelConfig, params: Any) -> tuple[ModelConfig, Any]:
    """The same model with its low-rank updates added to the kernels, and so none of its own."""
    if not config.lora_rank:
        return config, params

    def merge(tree: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        if "lora_a" not in tree:
            return {name: merge(subtree) for name, subtree in tree.items()}
        a_LDR, b_LRF, kernel = tree["lora_a"], tree["lora_b"], tree["kernel"]
        update = jnp.einsum("ldr,lrf->ldf", a_LDR, b_LRF.reshape(*b_LRF.shape[:2], -1))
        merged = kernel + (update * (config.lora_alpha / config.lora_rank)).reshape(kernel.shape)
        return {"kernel": merged} | ({"bias": tree["bias"]} if "bias" in tree else {})

    return replace(config, lora_rank=0), jax.jit(merge)(params)


def _draw_lora(config: ModelConfig, shardings: dict[str, Any], seed: int) -> dict[str, jax.Array]:
    """LoRA's parameters alone: of the rest of the initialization the compiler keeps nothing."""

    def draw() -> dict[str, jax.Array]:
        leaves = {path_of(key): leaf for key, leaf in jax.tree_util.tree_leaves_with_path(draw_params(config, seed))}
        return {path: leaves[path] for path in shardings}

    return jax.jit(draw, out_shardings=shardings)() if shardings else {}


def _parts(
    name: str, tensor: np.ndarray, places: list[Place], weights: Weights, leaves: Mapping[str, Any]
) -> Iterator[tuple[Place, np.ndarray]]:
    """The parameters that a tensor holds, one layer's each, as views."""
    pieces = np.split(tensor, len(places), axis=out_axis(weights.family, tensor.shape))
    for place, piece in zip(places, pieces, strict=True):
        if place.path == "position_embedding":
            piece = piece[: leaves[place.path].shape[0]]
        if place.path.endswith("kernel") and weights.family != "gpt2":
            piece = piece.T
        yield place, piece if place.layer is None else piece.reshape(leaves[place.path].shape[1:])


def _padded(value: np.ndarray, leaf: Any) -> jax.Array:
    """The array as a sharded one of `leaf`'s shape and dtype, with zeros where it is shorter."""

    def shard(index: Any) -> np.ndarray:
        some = value[index].astype(leaf.dtype, copy=False)
        wanted = tuple(len(range(*part.indices(n))) for part, n in zip(index, leaf.shape, strict=True))
        if some.shape == wanted:
            return some
        padded = np.zeros(wanted, leaf.dtype)
        padded[tuple(map(slice, some.shape))] = some
        return padded

    return jax.make_array_from_callback(leaf.shape, leaf.sharding, shard)


@jax.jit(donate_argnums=0)
def _put(stacked: jax.Array, layer: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(stacked, layer.astype(stacked.dtype), index, axis=0)


def _open_folder(folder: Path) -> Weights:
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} has no config.json: pass a run's folder or a Hugging Face folder")
    family, config = read_config(folder / "config.json")
    headers = {path: _read_header(path) for path in _files(folder)}
    spare = SPARE if not config.tied_head else re.compile(SPARE.pattern + r"|^lm_head\.weight$")
    owners: dict[str, tuple[Path, TensorInfo, int]] = {}
    for path, header in headers.items():
        for name, (info, start) in header.items():
            # The hub's own GPT-2 files leave out the prefix that transformers writes.
            full = f"transformer.{name}" if family == "gpt2" and re.match(r"(h\.\d+|wte|wpe|ln_f)\.", name) else name
            if full in owners:
                raise UserError(f"{folder} has {_shown(full)} twice, in {owners[full][0].name} and in {path.name}")
            if not spare.search(full):
                owners[full] = (path, info, start)

    def read() -> Iterator[tuple[str, np.ndarray]]:
        for name, (path, info, start) in owners.items():
            with path.open("rb") as file:
                file.seek(start)
                flat = np.fromfile(file, info.dtype, int(np.prod(info.shape)))
            yield name, flat.reshape(info.shape)

    return Weights(folder, family, config, {name: info for name, (_, info, _) in owners.items()}, read)


def _files(folder: Path) -> list[Path]:
    """The safetensors files of a folder."""
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    if not (folder / INDEX).exists():
        pickles = sorted(path.name for path in [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
        hint = f"; {pickles[0]} could run code when it is read: convert it to safetensors" if pickles else ""
        raise UserError(f"{folder} has no {WEIGHTS} and no {INDEX}{hint}")
    names = read_json(folder / INDEX).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise UserError(f"{folder / INDEX} has no weight_map of tensors to files")
    files = sorted(set(names.values()))
    for name in files:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(f"{folder / INDEX} names {name!r}, which is not a file of its own folder")
        if not (folder / name).exists():
            raise UserError(f"{folder} lacks {name}, which {INDEX} names: copy it there, or download it again")
    return [folder / name for name in files]


def _read_header(path: Path) -> dict[str, tuple[TensorInfo, int]]:
    """Name -> (dtype and shape, place in the file), once the library has found the header true to the file.

    Tensors are then read by their place: numpy's side of the library has no bfloat16, and its mapped pages count as
    memory of this process.
    """
    try:
        with safetensors.safe_open(path, framework="numpy"):
            pass
        with path.open("rb") as file:
            n_header = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(n_header))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # the library's errors have no narrower class
        raise UserError(f"{path} is not a safetensors file, or is damaged ({error}): download it again") from error
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if entry["dtype"] not in _DTYPES:
            raise UserError(f"{path}: {_shown(name)} is {entry['dtype']}; only {', '.join(_DTYPES)} are read")
    return {
        name: (TensorInfo(jnp.dtype(_DTYPES[e["dtype"]]), tuple(e["shape"])), 8 + n_header + e["data_offsets"][0])
        for name, e in header.items()
    }


def _shown(name: str) -> str:
    """A name out of a file, as it may go to a terminal."""
    return name if name.isprintable() else repr(name)


def _open_nanogpt(path: Path) -> Weights:
    try:
        import torch
    except ImportError as error:
        raise UserError(f"reading {path} takes PyTorch: pip install torch") from error
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        arguments = {name: checkpoint["model_args"][name] for name in checkpoint["model_args"]}
        state = {name.removeprefix("_orig_mod."): tensor for name, tensor in checkpoint["model"].items()}
    except Exception as error:  # torch's own words tell how to run what is in the file
        raise UserError(f"{path} is no checkpoint of nanoGPT that can be read without running code") from error
    unknown = arguments.keys() - {"n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout"}
    if unknown:
        raise UserError(f"{path}: nanoGPT's model has no {', '.join(map(str, unknown))}")
    try:
        config = within_reason(ModelConfig(activation="gelu_erf", **arguments))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    state = {n: t for n, t in state.items() if not SPARE.search(n) and n != "lm_head.weight"}
    floats = (torch.float32, torch.bfloat16, torch.float16)
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.dtype not in floats:
            raise UserError(f"{path}: {_shown(name)} is no tensor of float32, bfloat16 or float16")
    tensors = {
        name: TensorInfo(jnp.dtype(str(tensor.dtype).removeprefix("torch.")), tuple(tensor.shape))
        for name, tensor in state.items()
    }

    def read() -> Iterator[tuple[str, np.ndarray]]:
        for name, tensor in state.items():
            yield name, tensor.float().numpy()

    return Weights(path, "nanogpt", replace(config, dropout=0.0), tensors, read)
