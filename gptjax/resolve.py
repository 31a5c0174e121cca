"""Decide every "auto" of a model's config for the hardware that it runs on."""

from dataclasses import replace
from typing import Any

from gptjax.config import ModelConfig
from gptjax.host import multiplies_bfloat16

LONG_CONTEXT = 512  # tokens from which blockwise attention is faster than plain (measured: docs/performance.md)
KERNELS: dict[str, Any] = {"tpu": "splash", "gpu": "cudnn"}


def resolve(model: ModelConfig, platform: str, *, training: bool = True) -> ModelConfig:
    """The config without "auto", for a platform as JAX names it: "cpu", "gpu" or "tpu".

    Sampling and scoring (`training=False`) run on the KV cache or on one short text, so attention is plain and layers
    are looped there; on a CPU activations are float32, since a single row is slower in bfloat16.
    """
    if not training:
        dtype: Any = "float32" if platform == "cpu" else "bfloat16" if model.dtype == "auto" else model.dtype
        return replace(model, dtype=dtype, attention="plain", layers="looped")
    if model.dtype == "auto":
        model = replace(model, dtype="bfloat16" if platform != "cpu" or multiplies_bfloat16() else "float32")
    if model.layers == "auto":
        model = replace(model, layers="unrolled" if platform == "cpu" else "looped")
    return replace(model, attention=_attention(model, platform)) if model.attention == "auto" else model


def _attention(model: ModelConfig, platform: str) -> Any:
    """The hardware's kernel if it supports this model, else blockwise for long contexts, else plain.

    Only plain attention has dropout. Splash attention takes blocks of 128 tokens; cuDNN's kernel takes bfloat16, head
    widths that are multiples of 8, and no segments.
    """
    if model.attention_rate:
        return "plain"
    cudnn = model.dtype == "bfloat16" and model.head_width % 8 == 0 and model.separator is None
    if {"tpu": model.block_size % 128 == 0, "gpu": cudnn}.get(platform):
        return KERNELS[platform]
    return "blockwise" if model.block_size >= LONG_CONTEXT else "plain"
