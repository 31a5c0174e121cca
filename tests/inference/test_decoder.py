"""Parameters laid out for sampling, and in int8, are the same model."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import ModelConfig
from gptjax.inference.decoder import hidden, lay_out, logits
from gptjax.inference.generate import PrefixCache, generate
from gptjax.inference.quantize import quantize
from gptjax.inference.sampling import Sampling
from gptjax.matmul import Int8, linear_transposed
from gptjax.model import GPT

GPT2 = ModelConfig(vocab_size=61, block_size=40, n_layer=3, n_head=2, n_embd=16, bias=True, dtype="float32")
LLAMA = replace(
    GPT2, norm="rmsnorm", position="rope", activation="swiglu", n_kv_head=1, bias=False, tied_head=False, separator=7
)
TOKENS = np.random.default_rng(0).integers(0, 61, (3, 20), np.int32)


def logits_of(config, params):
    return logits(config, params, hidden(config, params, jnp.asarray(TOKENS))[0])[:, :, :61]


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_laid_out_parameters_give_the_same_logits_and_text(scramble, config):
    params = scramble(config)
    expected = GPT(config).apply({"params": params}, jnp.asarray(TOKENS))[:, :, :61]
    np.testing.assert_allclose(logits_of(config, lay_out(params)), expected, rtol=0, atol=2e-5)
    prompts, greedy = list(TOKENS[:, :5]), Sampling(temperature=0.0, repetition_penalty=1.2)
    texts = [
        np.concatenate([chunk.tokens_BC for chunk in generate(config, tree, prompts, 60, greedy, [0, 1, 2])], axis=1)
        for tree in (params, lay_out(params))
    ]
    np.testing.assert_array_equal(*texts)


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_a_memory_serves_laid_out_parameters_too(scramble, config):
    params, memory, greedy = lay_out(scramble(config)), PrefixCache(), Sampling(temperature=0.0)
    for length in (4, 9, 20):
        texts = [
            np.concatenate(
                [c.tokens_BC for c in generate(config, params, [TOKENS[0, :length]], 6, greedy, [0], own)], 1
            )
            for own in (memory, None)
        ]
        np.testing.assert_array_equal(*texts)


@pytest.mark.parametrize("laid_out", [False, True], ids=["stacked", "laid out"])
@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_int8_is_each_weight_to_a_127th_of_its_outputs_largest(scramble, config, laid_out):
    params = scramble(config)
    tree = lay_out(quantize(params)) if laid_out else quantize(params)
    rounded = jax.tree.map(_float, tree, is_leaf=lambda leaf: isinstance(leaf, Int8))
    kernel = params["layers"]["attention"]["out"]["kernel"][1]  # [heads, width, D]
    kernel = np.asarray(kernel).reshape(-1, config.n_embd).T
    own = (rounded["layers"][1]["attention"] if laid_out else rounded["layers"]["attention"])["out"]["kernel"]
    own = np.asarray(own if laid_out else own[1])
    step = np.abs(kernel).max(axis=1, keepdims=True) / 127
    assert (np.abs(own - kernel) <= 0.5001 * step).all() and not np.array_equal(own, kernel)
    for matrix, original in ((rounded["token_embedding"], params["token_embedding"]),):
        assert np.abs(np.asarray(matrix) - original).max() <= 0.51 * np.abs(original).max() / 127
    exact, found = [np.asarray(jax.nn.log_softmax(logits_of(config, p))) for p in (params, tree)]
    error = np.sqrt(np.mean((exact - found) ** 2))
    assert 0 < error < 0.05 * exact.std()


def _float(leaf):
    return leaf.weights * np.asarray(leaf.scale)[..., None] if isinstance(leaf, Int8) else leaf


@pytest.mark.parametrize(
    ("part", "small", "n_parts"), [(384, 384, 1), (64, 0, 6), (16, 0, 24), (384, 64, 6), (384, 8, 24)]
)
def test_a_product_in_parts_is_the_product(monkeypatch, part, small, n_parts):
    jax.clear_caches()  # which do not depend on these constants
    monkeypatch.setattr("gptjax.matmul.INT8_PART", part)
    monkeypatch.setattr("gptjax.matmul.SMALL_INT8_PART", small)
    rng = np.random.default_rng(0)
    matrix = Int8(jnp.asarray(rng.integers(-127, 128, (24, 16), np.int8)), jnp.asarray(rng.random(24, np.float32)))
    x = rng.normal(size=(2, 3, 16)).astype(np.float32)
    expected = x @ (np.asarray(matrix.weights, np.float32) * np.asarray(matrix.scale)[:, None]).T
    np.testing.assert_allclose(linear_transposed(jnp.asarray(x), matrix), expected, rtol=1e-5, atol=1e-5)
    program = jax.jit(lambda x: linear_transposed(x, matrix)).lower(jnp.asarray(x)).as_text()
    assert max(map(int, re.findall(r"<(\d+)x\d+x16xi8>", program)), default=1) == n_parts


def test_an_output_of_zeros_stays_zero():
    params = {"layers": (), "head": jnp.zeros((2, 3)).at[1, 2].set(5.0)}
    np.testing.assert_array_equal(_float(quantize(params)["head"]), params["head"])
