"""The model laid out for decoding: each layer's weights and KV cache in arrays of their own. Suffixes as in model.py.

On a CPU, decoding takes as long as reading the weights, on a GPU as long as launching its kernels. XLA copies a layer's
slice of stacked weights before it reads it. It reads an array of its own in place, and on a CPU fastest if the weights
are stored [outputs, inputs].
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gptjax.config import ModelConfig
from gptjax.inference.quantize import transpose
from gptjax.model import GPT, Block, KVCache, rotary_layers

Cache = KVCache | tuple[KVCache, ...]  # of all layers, or of each


def lay_out(params: Any) -> Any:
    """The parameters with "layers" as a tuple of copies: kernels transposed, and query, key and value in one matrix."""
    stacked, layers = params["layers"], []
    for i in range(len(jax.tree.leaves(stacked)[0])):
        layer = transpose(jax.tree.map(lambda leaf, i=i: leaf[i], stacked))
        attention = dict(layer["attention"])
        parts = [attention.pop(name) for name in ("query", "key", "value")]
        attention["query_key_value"] = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
        layers.append(layer | {"attention": attention})
    return params | {"layers": tuple(layers)}


def init_cache(config: ModelConfig, params: Any, batch_size: int, length: int) -> Cache:
    """An empty cache for `batch_size` sequences of up to `length` tokens, in the layout of the parameters."""

    def empty(*layers: int) -> KVCache:
        shapes = (*layers, J, length, H), (*layers, J, H, length)
        return KVCache(*(jnp.zeros(shape, config.dtype) for shape in shapes))

    J, H = batch_size * config.kv_heads, config.head_width
    return tuple(empty() for _ in params["layers"]) if isinstance(params["layers"], tuple) else empty(config.n_layer)


def length_of(cache: Cache) -> int:
    """How many tokens a cache has room for."""
    return int(jax.tree.leaves(cache)[-1].shape[-1])


def widen(cache: Cache, length: int) -> Cache:
    """The cache with room for at least `length` tokens."""
    more = (0, max(0, length - length_of(cache)))

    def pad(part: KVCache) -> KVCache:
        unchanged = [(0, 0)] * (part.keys.ndim - 2)
        return KVCache(jnp.pad(part.keys, [*unchanged, more, (0, 0)]), jnp.pad(part.values, [*unchanged, (0, 0), more]))

    return jax.tree.map(pad, cache, is_leaf=lambda part: isinstance(part, KVCache))


def hidden(
    config: ModelConfig,
    params: Any,
    tokens_BT: Int[Array, "B T"],
    cache: Cache | None = None,
    offset_B: Int[Array, " B"] | None = None,
) -> tuple[Float[Array, "B T D"], Any]:
    """`GPT.hidden` for parameters in either layout."""
    model: Any = GPT(config)  # Any: the declared result of `apply` is wider than the actual one
    if not isinstance(params["layers"], tuple):
        return model.apply({"params": params}, tokens_BT, cache, offset_B, method="hidden")
    packed = cache is None
    x_BTD, position_bT, document_BT = model.apply({"params": params}, tokens_BT, offset_B, packed, method="embed")
    block: Any = Block(config, fused_qkv=True)
    none, rotates_L, parts = [None] * config.n_layer, rotary_layers(config), []
    rows = zip(params["layers"], cache or none, none if rotates_L is None else rotates_L, strict=True)
    for layer, part, rotates in rows:
        x_BTD, part = block.apply({"params": layer}, x_BTD, part, rotates, position_bT, document_BT)
        parts.append(part)
    x_BTD = model.apply({"params": params}, x_BTD, method="normalize")
    return x_BTD, None if packed else tuple(parts)


def logits(config: ModelConfig, params: Any, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    """`GPT.logits` for parameters in either layout."""
    model: Any = GPT(config)
    return model.apply({"params": params}, x_BTD, method="logits")
