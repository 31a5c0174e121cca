"""Peaks are found under the names devices have, and FLOPs are counted as the compiler counts them."""

import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from gptjax.flops import PEAKS, device_peak, measured_matmul_peak, train_flops_per_token


@pytest.mark.parametrize(
    ("device_kind", "teraflops", "gibibytes"),
    [
        ("TPU v2", 23, 8),
        ("TPU v4", 275, 32),
        ("TPU v5 lite", 197, 16),
        ("TPU v5e", 197, 16),
        ("TPU v5", 459, 95),
        ("TPU v6 lite", 918, 32),
        ("TPU7x", 1153.5, 96),
        ("Tesla T4", 65, 16),
        ("Tesla V100-SXM2-16GB", 125, 16),
        ("NVIDIA A100-SXM4-40GB", 312, 40),
        ("NVIDIA A100 80GB PCIe", 312, 80),
        ("NVIDIA A10", 125, 24),
        ("NVIDIA A10G", 70, 24),
        ("NVIDIA H100 80GB HBM3", 989.5, 80),
        ("NVIDIA H100 PCIe", 756.5, 80),
        ("NVIDIA H200", 989.5, 141),
        ("NVIDIA GH200 480GB", 990, 96),
        ("NVIDIA B200", 2250, 180),
        ("NVIDIA GB200", 2500, 186),
        ("NVIDIA GeForce RTX 4090", 165.2, 24),
    ],
)
def test_peak_of_a_known_device(device_kind, teraflops, gibibytes):
    peak = device_peak(device_kind)
    assert peak is not None
    assert (peak.flops / 1e12, peak.memory / 2**30) == pytest.approx((teraflops, gibibytes))


@pytest.mark.parametrize(
    "device_kind",
    [
        "cpu",
        "",
        "TPU v4 lite",  # another chip than the v4
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA H200 MIG 1g.18gb",  # a seventh of an H200
        "NVIDIA A100-SXM4-40GB MIG 3g.20gb",
    ],
)
def test_no_peak_rather_than_that_of_a_similar_name(device_kind):
    assert device_peak(device_kind) is None


@pytest.mark.parametrize("name", PEAKS)
def test_peaks_have_the_units_they_claim(name):
    peak = PEAKS[name]
    # FLOPs per byte at which a kernel stops being bound by memory: a slip of 1000, or a figure with sparsity put
    # beside half a chip's bandwidth, leaves the range of all chips since 2017.
    assert 60 < peak.flops / peak.bandwidth < 600
    assert 2**33 <= peak.memory <= 2**38


def attention_and_mlp(weights, x_TD):
    """The matrix products of one layer and the head, without what the estimate leaves out (softmax, norms)."""
    q_TD, k_TD, v_TD = (x_TD @ w for w in weights["qkv"])
    x_TD = x_TD + (q_TD @ k_TD.T) @ v_TD @ weights["out"]
    return (x_TD + (x_TD @ weights["up"]) @ weights["down"]) @ weights["head"]


def test_flops_are_those_the_compiler_counts():
    T, D, V = 64, 128, 512
    shapes = {"qkv": [(D, D)] * 3, "out": (D, D), "up": (D, 4 * D), "down": (4 * D, D), "head": (D, V)}
    weights = jax.tree.map(jnp.zeros, shapes, is_leaf=lambda shape: isinstance(shape, tuple))
    counted = jax.jit(attention_and_mlp).lower(weights, jnp.zeros((T, D))).compile().cost_analysis()["flops"]
    n_params = sum(w.size for w in jax.tree.leaves(weights))
    estimate = train_flops_per_token(n_matmul_params=n_params, n_layer=1, n_embd=D, block_size=T)
    # A backward pass has two products for each of the forward's. The two residual additions are the difference.
    assert estimate * T == pytest.approx(3 * counted, rel=2e-3)


def test_mfu_of_palm_540b():
    # PaLM, section 4.1 and table 3: 46.2% at 238.3k tokens/s on 6144 TPU v4, 118 layers, 48 heads of 256, 2048 tokens.
    flops = train_flops_per_token(n_matmul_params=540_350_000_000, n_layer=118, n_embd=48 * 256, block_size=2048)
    peak = device_peak("TPU v4")
    assert peak is not None
    assert 238_300 * flops / (6144 * peak.flops) == pytest.approx(0.462, abs=5e-4)


def test_measured_peak_counts_the_products_of_all_devices(monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr("gptjax.flops.time", SimpleNamespace(perf_counter=lambda: next(ticks) / 100))
    devices = jax.local_devices(backend="cpu")
    measured = measured_matmul_peak(devices, size=8, seconds=0.1)
    assert measured == pytest.approx(len(devices) * 2 * 8**3 / 0.01)


def test_measured_peak_is_plausible():
    measured = measured_matmul_peak(jax.local_devices(backend="cpu"), size=256, seconds=0.01)
    assert 1e8 < measured < 1e14
