"""The model as sampling reads it: a layer's weights and its cache in arrays of their own.

On a CPU decoding takes as long as reading the weights does. Of stacked layers XLA copies each layer's part before it
reads it; of arrays of their own it copies none, and it reads them fastest where an output's weights are in a row.
Shape suffixes as in model.py.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gptjax.config import ModelConfig
from gptjax.inference.quantize import transpose
from gptjax.model import GPT, Block, KVCache

Cache = KVCache | tuple[KVCache, ...]  # of all layers in one, or of each


def lay_out(params: Any) -> Any:
    """The same parameters, "layers" a tuple of each layer's, which are copies: matrices `Transposed`, and those of
    queries, keys and values one below the other in one."""
    layers, n_layer = params["layers"], len(jax.tree.leaves(params["layers"])[0])
    each = (jax.tree.map(lambda leaf, i=i: leaf[i], layers) for i in range(n_layer))  # one at a time in memory
    return params | {"layers": tuple(_join(transpose(layer)) for layer in each)}


def _join(layer: Any) -> Any:
    attention = dict(layer["attention"])
    parts = [attention.pop(name) for name in ("query", "key", "value")]
    joined = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
    return layer | {"attention": attention | {"query_key_value": joined}}


def init_cache(config: ModelConfig, params: Any, batch_size: int, length: int) -> Cache:
    """An empty cache for `batch_size` sequences of up to `length` tokens, as these parameters want it."""

    def empty(*layers: int) -> KVCache:
        J, H = batch_size * config.kv_heads, config.head_width
        return KVCache(
            jnp.zeros((*layers, J, length, H), config.dtype), jnp.zeros((*layers, J, H, length), config.dtype)
        )

    apart = isinstance(params["layers"], tuple)
    return tuple(empty() for _ in params["layers"]) if apart else empty(config.n_layer)


def length_of(cache: Cache) -> int:
    """How many tokens a cache has room for."""
    return int(jax.tree.leaves(cache)[-1].shape[-1])


def widen(cache: Cache, length: int) -> Cache:
    """The same with room for so many."""

    def pad(x: jax.Array, axis: int) -> jax.Array:
        return jnp.pad(x, [(0, length - n if i == x.ndim + axis else 0) for i, n in enumerate(x.shape)])

    def wider(layers: Any) -> KVCache:
        return KVCache(pad(layers.keys, -2), pad(layers.values, -1))

    return jax.tree.map(wider, cache, is_leaf=lambda layer: isinstance(layer, KVCache))


def hidden(
    config: ModelConfig,
    params: Any,
    tokens_BT: Int[Array, "B T"],
    cache: Cache | None = None,
    offset_B: Int[Array, " B"] | None = None,
) -> tuple[Float[Array, "B T D"], Any]:
    """`GPT.hidden`, of parameters as they are or laid out."""
    model: Any = GPT(config)  # of which `apply` promises more than it gives
    if not isinstance(params["layers"], tuple):
        return model.apply({"params": params}, tokens_BT, cache, offset_B, method="hidden")
    x_BTD, position_bT, document_BT = model.apply(
        {"params": params}, tokens_BT, offset_B, cache is None, method="embed"
    )
    caches: list[Any] = []
    for layer, own in zip(params["layers"], cache if cache else [None] * config.n_layer, strict=True):
        block: Any = Block(config, fused_qkv=True)
        x_BTD, own = block.apply({"params": layer}, x_BTD, own, position_bT, document_BT)
        caches.append(own)
    x_BTD = model.apply({"params": params}, x_BTD, method="normalize")
    return x_BTD, None if cache is None else tuple(caches)


def logits(config: ModelConfig, params: Any, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    """`GPT.logits`."""
    model: Any = GPT(config)
    return model.apply({"params": params}, x_BTD, method="logits")
