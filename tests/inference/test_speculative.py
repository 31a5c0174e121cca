"""Speculative decoding draws from the large model's distribution, whatever the draft proposes."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from gptjax.config import ModelConfig
from gptjax.inference.decoder import init_cache
from gptjax.inference.generate import generate, read
from gptjax.inference.sampling import Sampling, apply_rules
from gptjax.inference.speculative import PROPOSALS, speculate, speculate_once
from gptjax.model import GPT

LARGE = ModelConfig(vocab_size=13, block_size=24, n_layer=2, n_head=2, n_embd=16, dtype="float32")
DRAFT = replace(LARGE, n_layer=1, vocab_size=17)  # its last four ids are none of the large model's
PROMPT = np.array([3, 1, 4, 1, 5], np.int32)
GREEDY = Sampling(temperature=0.0, repetition_penalty=1.3)


@pytest.fixture(scope="module")
def models(scramble):
    """Two models that agree about much, but not all: the draft is the large one's first layer."""
    large = scramble(LARGE, seed=1)
    draft = large | {"layers": jax.tree.map(lambda x: x[:1], large["layers"])}
    draft["token_embedding"] = jnp.concatenate([large["token_embedding"], 2 * large["token_embedding"][:4]])
    return (LARGE, large), (DRAFT, draft)


def joined(chunks):
    """The tokens and log-probabilities of all chunks."""
    return [np.concatenate([values[0] for values in column]) for column in zip(*chunks, strict=True)]


def test_tokens_have_the_large_models_distribution(models):
    sampling, n = Sampling(top_p=0.8, repetition_penalty=1.7, temperature=0.9), 4_000
    (_, params), (_, draft_params) = models
    caches = tuple(read(*model, init_cache(*model, 1, 16), [PROMPT[:-1]])[0] for model in models)
    seen_1V = jnp.zeros((1, 13), bool).at[0, PROMPT].set(True)

    def drawn(key):
        last_1, position_1 = jnp.asarray(PROMPT[-1:]), jnp.array([len(PROMPT) - 1])
        return speculate_once(
            (LARGE, DRAFT), (params, draft_params), caches, last_1, position_1, seen_1V, key, sampling
        )[1::2]

    tokens, n_new = map(np.asarray, jax.jit(jax.vmap(drawn))(jax.random.split(jax.random.key(0), n)))
    assert 0.1 < (n_new > 1).mean() < 0.9 and (n_new == PROPOSALS + 1).any()
    rows, text, forward = np.ones(n, bool), PROMPT, jax.jit(GPT(LARGE).apply)
    for place in range(3):  # each token given the commonest ones before it
        rows &= n_new > place
        padded_1T = np.pad(text, (0, 8 - len(text)))[None]  # causal: what follows a token does not matter
        logits_1V = forward({"params": params}, padded_1T)[:, len(text) - 1]
        seen_1V = jnp.zeros((1, 13), bool).at[0, text].set(True)
        expected = np.asarray(jax.nn.softmax(apply_rules(logits_1V, seen_1V, sampling))[0], np.float64)
        counts = np.bincount(tokens[rows, place], minlength=13)
        assert not counts[expected < 1e-9].any()
        common = expected * rows.sum() >= 5
        observed, expected = counts[common].astype(np.float64), expected[common]
        assert scipy.stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > 1e-3
        text = np.append(text, counts.argmax()).astype(np.int32)
        rows &= tokens[:, place] == text[-1]


def test_greedy_text_is_that_of_the_large_model_alone(models):
    """Also past block_size, where the last half is read again."""
    chunks = list(speculate(*models[0], *models[1], PROMPT, 70, GREEDY, seed=0))
    tokens, log_probs = joined(chunks)
    alone, alone_log_probs = joined(generate(*models[0], [PROMPT], 70, GREEDY, seeds=[0]))
    np.testing.assert_array_equal(tokens, alone)
    np.testing.assert_allclose(log_probs, alone_log_probs, rtol=0, atol=1e-5)
    lengths = {chunk.tokens_BC.shape[1] for chunk in chunks}
    assert max(lengths) == PROPOSALS + 1 and min(lengths) == 1


def test_windows_and_layers_without_positions(scramble):
    """Of the large model alone: the draft has neither."""
    config = replace(LARGE, position="rope", window=5, nope_interval=2, head_dim=12)
    draft = replace(LARGE, position="rope")
    large = config, scramble(config, seed=1)
    tokens, log_probs = joined(speculate(*large, draft, scramble(draft, seed=2), PROMPT, 40, GREEDY, seed=0))
    alone, alone_log_probs = joined(generate(*large, [PROMPT], 40, GREEDY, seeds=[0]))
    np.testing.assert_array_equal(tokens, alone)
    np.testing.assert_allclose(log_probs, alone_log_probs, rtol=0, atol=1e-5)


def test_a_draft_may_lack_tokens_and_a_prompt_may_be_one_token(models):
    tokens, _ = joined(speculate(*models[1], *models[0], PROMPT[:1], 20, GREEDY, seed=0))
    np.testing.assert_array_equal(tokens, joined(generate(*models[1], [PROMPT[:1]], 20, GREEDY, seeds=[0]))[0])


def test_a_seed_is_a_text(models):
    sampling = replace(GREEDY, temperature=1.0)
    texts = [joined(speculate(*models[0], *models[1], PROMPT, 40, sampling, seed))[0].tolist() for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2] and len(texts[0]) == 40
