"""What "auto" means on each kind of hardware."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from gptjax import resolve as resolving
from gptjax.config import ModelConfig
from gptjax.resolve import MOST_UNROLLED, resolve

SHORT = ModelConfig(vocab_size=65, block_size=256, n_layer=2, n_head=2, n_embd=64)
LONG = replace(SHORT, block_size=1024)
WIDE, WIDER = replace(LONG, n_head=2, n_embd=512), replace(LONG, n_head=1, n_embd=512)  # 256 and 512 features a head
CPU, TPU = SimpleNamespace(platform="cpu"), SimpleNamespace(platform="tpu", device_kind="TPU v5 lite")

TPU_V2, TPU_V3, TPU_V6E = [
    SimpleNamespace(platform="tpu", device_kind=kind) for kind in ("TPU v2", "TPU v3", "TPU v6 lite")
]


def gpu(kind, capability):
    return SimpleNamespace(platform="gpu", device_kind=kind, compute_capability=capability)


H100, A100, B200 = gpu("NVIDIA H100 80GB HBM3", "9.0"), gpu("NVIDIA A100-SXM4-80GB", "8.0"), gpu("NVIDIA B200", "10.0")
RTX_4090, T4, V100 = gpu("NVIDIA GeForce RTX 4090", "8.9"), gpu("Tesla T4", "7.5"), gpu("Tesla V100-SXM2-16GB", "7.0")
RTX_5090 = gpu("NVIDIA GeForce RTX 5090", "12.0")
P100, MI300 = gpu("Tesla P100-PCIE-16GB", "6.0"), gpu("AMD Instinct MI300X", "gfx942")
APPLE, UNKNOWN = SimpleNamespace(platform="METAL", device_kind="Metal"), SimpleNamespace(platform="new", device_kind="")


@pytest.mark.parametrize(
    ("model", "device", "attention", "layers", "dtype"),
    [
        (SHORT, CPU, "plain", "unrolled", "float32"),
        (LONG, CPU, "blockwise", "unrolled", "float32"),
        (SHORT, TPU, "splash", "looped", "bfloat16"),
        (replace(SHORT, block_size=100), TPU, "plain", "looped", "bfloat16"),  # not a multiple of 128
        (replace(LONG, separator=3), TPU, "splash", "looped", "bfloat16"),
        (replace(LONG, window=100), TPU, "splash", "looped", "bfloat16"),
        (LONG, TPU_V6E, "splash", "unrolled", "bfloat16"),  # bound by memory
        (replace(LONG, n_layer=MOST_UNROLLED["tpu"] + 1), TPU_V6E, "splash", "looped", "bfloat16"),
        (LONG, TPU_V3, "blockwise", "looped", "bfloat16"),
        (SHORT, TPU_V2, "plain", "looped", "bfloat16"),
        (replace(LONG, dropout=0.1), TPU, "plain", "looped", "bfloat16"),
        (replace(LONG, dropout=0.1, attention_dropout=0.0), TPU, "splash", "looped", "bfloat16"),
        (replace(LONG, attention="plain", layers="unrolled"), TPU, "plain", "unrolled", "bfloat16"),
        (SHORT, H100, "cudnn", "unrolled", "bfloat16"),
        (replace(LONG, n_layer=MOST_UNROLLED["gpu"] + 1), H100, "cudnn", "looped", "bfloat16"),
        (replace(LONG, separator=3), H100, "blockwise", "unrolled", "bfloat16"),
        (replace(LONG, n_head=16), H100, "blockwise", "unrolled", "bfloat16"),  # 4 features a head
        (replace(LONG, dtype="float32"), H100, "blockwise", "unrolled", "float32"),
        (WIDE, H100, "cudnn", "unrolled", "bfloat16"),
        (WIDE, B200, "cudnn", "unrolled", "bfloat16"),
        (WIDE, RTX_5090, "cudnn", "unrolled", "bfloat16"),
        (WIDER, H100, "blockwise", "unrolled", "bfloat16"),
        (WIDE, A100, "blockwise", "unrolled", "bfloat16"),
        (LONG, A100, "cudnn", "unrolled", "bfloat16"),
        (replace(WIDE, n_head=4), RTX_4090, "cudnn", "unrolled", "bfloat16"),  # 128 features a head
        (LONG, T4, "blockwise", "unrolled", "float16"),
        (SHORT, V100, "plain", "unrolled", "float16"),
        (replace(LONG, dtype="float16"), A100, "cudnn", "unrolled", "float16"),
        (replace(LONG, window=100), H100, "cudnn", "unrolled", "bfloat16"),
        (replace(LONG, dtype="bfloat16"), T4, "blockwise", "unrolled", "bfloat16"),
        (LONG, P100, "blockwise", "unrolled", "float32"),
        (LONG, MI300, "blockwise", "unrolled", "bfloat16"),
        (LONG, APPLE, "blockwise", "looped", "float32"),
        (SHORT, UNKNOWN, "plain", "looped", "float32"),
    ],
)
def test_training(monkeypatch, model, device, attention, layers, dtype):
    monkeypatch.setattr(resolving, "multiplies_bfloat16", lambda: False)
    found = resolve(model, device)
    assert (found.attention, found.layers, found.dtype) == (attention, layers, dtype)
    assert resolve(found, device) == found


def test_a_cpu_that_multiplies_bfloat16_faster_trains_in_it(monkeypatch):
    monkeypatch.setattr(resolving, "multiplies_bfloat16", lambda: True)
    assert resolve(SHORT, CPU).dtype == "bfloat16"
    assert resolve(SHORT, CPU, training=False).dtype == "float32"


def test_sampling():
    found = resolve(replace(SHORT, attention="splash", dtype="bfloat16"), CPU, training=False)
    assert (found.attention, found.layers, found.dtype) == ("plain", "looped", "float32")
    assert resolve(replace(SHORT, dtype="float32"), TPU, training=False).dtype == "float32"
    assert [resolve(SHORT, device, training=False).dtype for device in (H100, T4)] == ["bfloat16", "float32"]


@pytest.mark.parametrize(
    ("trained_in", "device", "dtype"),
    [
        ("float16", H100, "float16"),
        ("float16", T4, "float16"),
        ("float16", MI300, "float16"),
        ("float16", P100, "float32"),
        ("float16", TPU, "bfloat16"),
        ("float16", CPU, "float32"),
        ("bfloat16", H100, "bfloat16"),
        ("bfloat16", TPU_V2, "bfloat16"),
        ("bfloat16", T4, "float32"),  # it has no such units
        ("bfloat16", P100, "float32"),
        ("bfloat16", UNKNOWN, "float32"),
    ],
)
def test_a_run_samples_in_the_dtype_it_trained_in_where_the_hardware_has_it(trained_in, device, dtype):
    assert resolve(replace(SHORT, dtype=trained_in), device, training=False).dtype == dtype
