"""Peaks are found under the names of devices, and FLOPs are those that the compiler counts."""

import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from gptjax.config import Config, ModelConfig, TrainConfig
from gptjax.flops import PEAKS, device_peak, measured_matmul_peak, step_flops


def test_peaks_have_the_names_of_devices():
    known = {
        "TPU v5 lite": (197, 16),
        "TPU v5": (459, 95),
        "TPU7x": (1153.5, 96),
        "Tesla T4": (65, 16),
        "NVIDIA A100 80GB PCIe": (312, 80),
        "NVIDIA A10G": (70, 24),
        "NVIDIA H100 80GB HBM3": (989.5, 80),
        "NVIDIA B200": (2250, 180),
        "NVIDIA GeForce RTX 4090": (165.2, 24),
    }
    found = [device_peak(kind) for kind in known]
    assert [(peak.flops, peak.memory) for peak in found] == [(n * 1e12, size * 2**30) for n, size in known.values()]
    similar = ("cpu", "", "TPU v4 lite", "NVIDIA GeForce RTX 3090 Ti", "NVIDIA H200 MIG 1g.18gb")
    assert not any(map(device_peak, similar))


def test_peaks_have_the_units_they_claim():
    # FLOPs per byte of all chips since 2017: a factor of 1000, or a figure with sparsity beside half a chip's
    # bandwidth, is outside of this range.
    assert all(60 < peak.flops / peak.bandwidth < 600 and 2**33 <= peak.memory <= 2**38 for peak in PEAKS.values())


def attention_and_mlp(weights, x_TD):
    """The matmuls of one layer and the head."""
    q_TD, k_TD, v_TD = (x_TD @ w for w in weights["qkv"])
    x_TD = x_TD + (q_TD @ k_TD.T) @ v_TD @ weights["out"]
    return (x_TD + (x_TD @ weights["up"]) @ weights["down"]) @ weights["head"]


def flops_of(n_matmul_params: int, **model) -> int:
    """Of a step of one window."""
    params = {"head": jax.ShapeDtypeStruct((n_matmul_params,), jnp.float32), "layers": {}}
    return step_flops(Config(model=ModelConfig(**model), train=TrainConfig(batch_size=1)), params)


def test_flops_are_those_the_compiler_counts():
    T, D, V = 64, 128, 512
    shapes = {"qkv": [(D, D)] * 3, "out": (D, D), "up": (D, 4 * D), "down": (4 * D, D), "head": (D, V)}
    weights = jax.tree.map(jnp.zeros, shapes, is_leaf=lambda shape: isinstance(shape, tuple))
    counted = jax.jit(attention_and_mlp).lower(weights, jnp.zeros((T, D))).compile().cost_analysis()["flops"]
    estimate = flops_of(sum(w.size for w in jax.tree.leaves(weights)), n_layer=1, n_head=1, n_embd=D, block_size=T)
    # A backward pass has two matmuls for each of the forward pass. The two residual additions are the difference.
    assert estimate == pytest.approx(3 * counted, rel=2e-3)


def test_mfu_of_palm_540b():
    # PaLM, section 4.1 and table 3: 46.2% at 238.3k tokens/s on 6144 TPU v4, 118 layers, 48 heads of 256, 2048 tokens.
    flops = flops_of(540_350_000_000, n_layer=118, n_head=48, n_embd=48 * 256, block_size=2048)
    assert 238_300 * flops / 2048 / (6144 * device_peak("TPU v4").flops) == pytest.approx(0.462, abs=5e-4)


def test_attention_counts_the_width_of_its_heads_and_the_window():
    model = {"n_layer": 3, "n_head": 4, "n_embd": 64, "block_size": 128}
    attention = {
        name: flops_of(0, **model | fields)
        for name, fields in {
            "usual": {},
            "wide": {"head_dim": 32},
            "window": {"window": 32},
            "long window": {"window": 128},
        }.items()
    }
    assert attention["usual"] == 12 * 3 * 64 * 128 * 128
    assert attention["wide"] == 2 * attention["usual"] == 8 * attention["window"]
    assert attention["long window"] == attention["usual"]


def test_measured_peak_counts_all_devices(monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr("gptjax.flops.time", SimpleNamespace(perf_counter=lambda: next(ticks) / 100))
    devices = jax.local_devices(backend="cpu")
    assert measured_matmul_peak(devices, size=8, seconds=0.1) == pytest.approx(len(devices) * 2 * 8**3 / 0.01)
