"""Parameters laid out for decoding, and in int8, are the same model."""

from dataclasses import replace
from functools import partial

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

GPT2 = ModelConfig(vocab_size=61, block_size=40, n_layer=2, n_head=2, n_embd=16, bias=True, dtype="float32")
LLAMA = replace(
    GPT2, norm="rmsnorm", position="rope", activation="swiglu", n_kv_head=1, bias=False, tied_head=False, separator=7
)
MODERN = replace(
    LLAMA,
    n_layer=4,
    head_dim=12,
    window=7,
    nope_interval=2,
    qk_norm=True,
    qk_norm_scale=True,
    separator=None,
)
CONFIGS = pytest.mark.parametrize("config", [GPT2, LLAMA, MODERN], ids=["gpt2", "llama", "modern"])
TOKENS = np.random.default_rng(0).integers(0, 61, (1, 20), np.int32)
GREEDY = Sampling(temperature=0.0)


@partial(jax.jit, static_argnums=0)
def logits_of(config, params):
    return logits(config, params, hidden(config, params, jnp.asarray(TOKENS))[0])


def new_tokens(config, params, length, n, prefix=None):
    chunks = generate(config, params, [TOKENS[0, :length]], n, GREEDY, [0], prefix)
    return np.concatenate([chunk.tokens_BC[0] for chunk in chunks])


@CONFIGS
def test_parameters_laid_out_give_the_same_logits(scramble, config):
    params = scramble(config)
    expected = jax.jit(GPT(config).apply)({"params": params}, TOKENS)
    np.testing.assert_allclose(logits_of(config, lay_out(params)), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("config", [LLAMA, MODERN], ids=["llama", "modern"])
def test_parameters_laid_out_generate_the_same_text(scramble, config):
    """Also with a prefix cache, which grows."""
    params, prefix = scramble(config), PrefixCache()
    for length, n in ((4, 6), (20, 25)):
        text = new_tokens(config, lay_out(params), length, n, prefix)
        np.testing.assert_array_equal(text, new_tokens(config, params, length, n))


def test_int8_rounds_each_weight_to_a_127th_of_its_outputs_largest(scramble):
    params = scramble(LLAMA)
    tree = quantize(params)
    kernel = np.asarray(params["layers"]["attention"]["out"]["kernel"][1]).reshape(-1, LLAMA.n_embd).T  # [D, N H]
    rounded = jax.tree.map(lambda leaf: leaf[1], tree["layers"])["attention"]["out"]["kernel"]
    for matrix, original in ((rounded, kernel), (tree["token_embedding"], np.asarray(params["token_embedding"]))):
        step = np.abs(original).max(axis=1, keepdims=True) / 127
        error = np.abs(matrix.weights * np.asarray(matrix.scale)[:, None] - original)
        assert isinstance(matrix, Int8) and (error <= 0.5001 * step).all() and error.any()


@CONFIGS
def test_int8_logits_are_close(scramble, config):
    params = scramble(config)
    exact, stacked, laid_out = [
        np.asarray(jax.nn.log_softmax(logits_of(config, tree)))
        for tree in (params, quantize(params), lay_out(quantize(params)))
    ]
    assert 0 < np.sqrt(np.mean((exact - stacked) ** 2)) < 0.05 * exact.std()
    np.testing.assert_allclose(laid_out, stacked, rtol=0, atol=2e-5)


def test_int8_text_from_a_cache_is_that_of_full_passes(scramble):
    """Of each token the weights are those of a full pass over what is before it."""
    params = lay_out(quantize(scramble(MODERN)))
    text = np.append(TOKENS[0, :5], new_tokens(MODERN, params, 5, 20))
    padded = np.pad(text, (0, MODERN.block_size - len(text)))[None]
    logits_TV = np.asarray(logits(MODERN, params, hidden(MODERN, params, jnp.asarray(padded))[0]))[0, 4:24]
    assert np.diff(np.sort(logits_TV)[:, -2:]).min() > 1e-4, "a tie up to rounding, which cannot be compared"
    assert len(set(text[5:].tolist())) > 4
    np.testing.assert_array_equal(text[5:], logits_TV.argmax(-1))


def test_an_output_of_zeros_stays_zero():
    head = quantize({"layers": (), "head": jnp.zeros((2, 3)).at[1, 2].set(5.0)})["head"]
    np.testing.assert_array_equal(head.weights * head.scale[:, None], [[0, 0, 0], [0, 0, 5]])


@pytest.mark.parametrize(("part", "small_part"), [(384, 384), (64, 0), (384, 8)])  # 1, 6 and 24 parts
def test_an_int8_matmul_in_parts_is_the_matmul(monkeypatch, part, small_part):
    monkeypatch.setattr("gptjax.matmul.INT8_PART", part)
    monkeypatch.setattr("gptjax.matmul.SMALL_INT8_PART", small_part)
    rng = np.random.default_rng(0)
    matrix = Int8(jnp.asarray(rng.integers(-127, 128, (24, 16), np.int8)), jnp.asarray(rng.random(24, np.float32)))
    x = rng.normal(size=(2, 3, 16)).astype(np.float32)
    expected = x @ (np.asarray(matrix.weights, np.float32) * np.asarray(matrix.scale)[:, None]).T
    np.testing.assert_allclose(linear_transposed(jnp.asarray(x), matrix), expected, rtol=1e-5, atol=1e-5)
