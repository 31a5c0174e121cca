"""Decide every "auto" of a model's config for the hardware that it runs on."""

import re
from dataclasses import replace
from typing import Any

from gptjax.config import ModelConfig
from gptjax.flops import device_peak
from gptjax.host import multiplies_bfloat16

LONG_CONTEXT = 512  # tokens from which blockwise attention is faster than plain (measured: docs/performance.md)
OLD_TPUS = ("TPU v2", "TPU v3")
MOST_UNROLLED = {"gpu": 24, "tpu": 12}  # layers whose compilation takes minutes at most


def resolve(model: ModelConfig, device: Any, *, training: bool = True, packed: bool = False) -> ModelConfig:
    """The config without "auto", for a JAX device: its platform, kind and compute capability decide.

    `packed`: windows hold several conversations, which attention has to keep apart.

    Sampling and scoring (`training=False`) run on the KV cache or on one short text, so attention is plain and layers
    are looped there; on a CPU activations are float32, since a single row is slower in bfloat16. Only runs that
    trained in float16 sample in it, and only on hardware that has it: activations of other models can overflow.
    """
    if not training:
        auto: Any = "bfloat16" if _dtype(device) == "bfloat16" and device.platform != "cpu" else "float32"
        kept = model.dtype == "float32" or (model.dtype == "float16" and _has_float16(device))
        return replace(model, dtype=model.dtype if kept else auto, attention="plain", layers="looped")
    if model.dtype == "auto":
        model = replace(model, dtype=_dtype(device))
    if model.layers == "auto":
        peak = device_peak(device.device_kind) if device.platform == "tpu" else None
        gains = device.platform == "gpu" or (peak is not None and peak.memory_bound)
        unrolled = device.platform == "cpu" or (gains and model.n_layer <= MOST_UNROLLED[device.platform])
        model = replace(model, layers="unrolled" if unrolled else "looped")
    return replace(model, attention=_attention(model, device, packed)) if model.attention == "auto" else model


def _dtype(device: Any) -> Any:
    """bfloat16 where its matmuls are faster than float32's, else float16 where its are (V100, T4), else float32."""
    nvidia = _compute_capability(device)
    faster = {"cpu": multiplies_bfloat16(), "gpu": nvidia is None or nvidia >= (8, 0), "tpu": True}
    if faster.get(device.platform):
        return "bfloat16"
    return "float16" if nvidia is not None and _has_float16(device) else "float32"


def _has_float16(device: Any) -> bool:
    """Whether the device multiplies float16 faster than float32: AMD's GPUs, and NVIDIA's from 7.0 on."""
    return device.platform == "gpu" and (_compute_capability(device) or (7, 0)) >= (7, 0)


def _attention(model: ModelConfig, device: Any, packed: bool) -> Any:
    """The hardware's kernel if it supports this model, else blockwise for long contexts, else plain.

    Only plain attention has dropout. Splash attention takes blocks of 128 tokens; for TPU v2 and v3 it does not compile
    in bfloat16 (libtpu 0.0.50: Mosaic has no such matmul there). cuDNN's kernel takes bfloat16 and
    float16, no segments, and head widths that are multiples of 8, up to 128 or, from compute capability 9.0 on, 256.
    """
    if model.attention_rate:
        return "plain"
    if device.platform == "tpu" and model.block_size % 128 == 0 and device.device_kind not in OLD_TPUS:
        return "splash"
    nvidia, narrow = _compute_capability(device) or (0, 0), model.dtype != "float32"
    narrow &= model.separator is None and not packed
    widest = 256 if nvidia >= (9, 0) else 128 if nvidia >= (8, 0) else 0
    if device.platform == "gpu" and narrow and model.head_width % 8 == 0 and model.head_width <= widest:
        return "cudnn"
    return "blockwise" if model.block_size >= LONG_CONTEXT else "plain"


def _compute_capability(device: Any) -> tuple[int, int] | None:
    """CUDA's; None on other hardware. An AMD GPU names its architecture, as "gfx90a", in the same place."""
    found = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(device, "compute_capability", "")))
    return (int(found[1]), int(found[2])) if found else None
