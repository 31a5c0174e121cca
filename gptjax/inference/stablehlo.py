"""A model as programs that run without gptjax: prefill and decode in StableHLO by jax.export, and the weights beside.

Shape suffixes as in model.py; there is one row.
"""

import importlib.util
import json
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jaxtyping import Array, Float, Int

from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.inference.decoder import hidden, init_cache, logits
from gptjax.model import KVCache
from gptjax.sharding import by_path

PLATFORMS = ("cpu", "cuda", "tpu")
EXAMPLE = Path(__file__).with_name("stablehlo_example.py")


def export_programs(folder: Path, config: ModelConfig, params: Any) -> None:
    """Write prefill.jax_export, decode.jax_export, weights.safetensors, programs.json and run.py, which runs them.

    prefill(weights, tokens [1, T]) returns (cache, logits [1, V]); decode(weights, cache, token [1], position [1])
    reads one token more and returns the same, with the cache in the place of the one that it was given. T is any length
    up to the block; positions are below it. Weights and cache are dictionaries. Raises `UserError` without the package
    flatbuffers, in which jax.export writes.
    """
    if importlib.util.find_spec("flatbuffers") is None:
        raise UserError("jax.export needs the package flatbuffers: pip install flatbuffers")
    V = config.vocab_size
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)

    def prefill(weights: Any, tokens_1T: Int[Array, "1 T"]) -> tuple[dict[str, Any], Float[Array, "1 V"]]:
        cache = init_cache(config, weights, 1, config.block_size)
        x_1TD, cache = hidden(config, weights, tokens_1T, cache, jnp.zeros(1, jnp.int32))
        return _plain(cache), logits(config, weights, x_1TD[:, -1:])[:, 0, :V]

    def decode(weights: Any, cache: Any, token_1: Any, position_1: Any) -> tuple[dict[str, Any], Float[Array, "1 V"]]:
        x_11D, new = hidden(config, weights, token_1[:, None], KVCache(**cache), position_1)
        return _plain(new), logits(config, weights, x_11D)[:, 0, :V]

    one = jax.ShapeDtypeStruct((1,), jnp.int32)
    [length] = jax.export.symbolic_shape("T", constraints=[f"T <= {config.block_size}"])
    prompt = jax.ShapeDtypeStruct((1, length), jnp.int32)
    cache = _plain(jax.eval_shape(lambda: init_cache(config, abstract, 1, config.block_size)))
    for name, function, arguments in (("prefill", prefill, (prompt,)), ("decode", decode, (cache, one, one))):
        donated = (1,) if name == "decode" else ()
        program = jax.export.export(jax.jit(function, donate_argnums=donated), platforms=PLATFORMS)
        (folder / f"{name}.jax_export").write_bytes(program(abstract, *arguments).serialize())
    arrays = {path: np.asarray(leaf) for path, leaf in by_path(params).items()}
    safetensors.numpy.save_file(arrays, folder / "weights.safetensors")
    facts = {"block_size": config.block_size, "vocab_size": V, "platforms": PLATFORMS, "jax": jax.__version__}
    (folder / "programs.json").write_text(json.dumps(facts, indent=2) + "\n")
    (folder / "run.py").write_text(EXAMPLE.read_text(encoding="utf-8"), encoding="utf-8")


def _plain(cache: Any) -> dict[str, Any]:
    """The cache of all layers as a dictionary, which jax.export stores without help."""
    return {"keys": cache.keys, "values": cache.values}
