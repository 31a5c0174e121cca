"""What "auto" means on each platform."""

from dataclasses import replace

import pytest

from gptjax import resolve as resolving
from gptjax.config import ModelConfig
from gptjax.resolve import resolve

SHORT = ModelConfig(vocab_size=65, block_size=256, n_layer=2, n_head=2, n_embd=64)
LONG = replace(SHORT, block_size=1024)


@pytest.mark.parametrize(
    ("model", "platform", "attention", "layers", "dtype"),
    [
        (SHORT, "cpu", "plain", "unrolled", "float32"),
        (LONG, "cpu", "blockwise", "unrolled", "float32"),
        (SHORT, "tpu", "splash", "looped", "bfloat16"),
        (replace(SHORT, block_size=100), "tpu", "plain", "looped", "bfloat16"),  # not a multiple of 128
        (LONG, "gpu", "cudnn", "looped", "bfloat16"),
        (replace(LONG, separator=3), "gpu", "blockwise", "looped", "bfloat16"),
        (replace(LONG, separator=3), "tpu", "splash", "looped", "bfloat16"),
        (replace(LONG, n_head=16), "gpu", "blockwise", "looped", "bfloat16"),  # 4 features a head
        (replace(LONG, dtype="float32"), "gpu", "blockwise", "looped", "float32"),
        (replace(LONG, dropout=0.1), "tpu", "plain", "looped", "bfloat16"),
        (replace(LONG, dropout=0.1, attention_dropout=0.0), "tpu", "splash", "looped", "bfloat16"),
        (replace(LONG, attention="plain", layers="unrolled"), "tpu", "plain", "unrolled", "bfloat16"),
    ],
)
def test_training(monkeypatch, model, platform, attention, layers, dtype):
    monkeypatch.setattr(resolving, "multiplies_bfloat16", lambda: False)
    found = resolve(model, platform)
    assert (found.attention, found.layers, found.dtype) == (attention, layers, dtype)
    assert resolve(found, platform) == found


def test_a_cpu_that_multiplies_bfloat16_faster_trains_in_it(monkeypatch):
    monkeypatch.setattr(resolving, "multiplies_bfloat16", lambda: True)
    assert resolve(SHORT, "cpu").dtype == "bfloat16"
    assert resolve(SHORT, "cpu", training=False).dtype == "float32"


def test_sampling():
    found = resolve(replace(SHORT, attention="splash", dtype="bfloat16"), "cpu", training=False)
    assert (found.attention, found.layers, found.dtype) == ("plain", "looped", "float32")
    assert resolve(replace(SHORT, dtype="float32"), "tpu", training=False).dtype == "float32"
    assert resolve(SHORT, "gpu", training=False).dtype == "bfloat16"
