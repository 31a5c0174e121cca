"""Speculative decoding: the large model's distribution whatever the small one guesses, and where greedy its text."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from gptjax.config import ModelConfig
from gptjax.inference.generate import Sampling, apply_rules, generate
from gptjax.inference.speculative import Decoder, _read, _round, speculate
from gptjax.model import GPT

LARGE = ModelConfig(vocab_size=13, block_size=24, n_layer=2, n_head=2, n_embd=16, dtype="float32")
SMALL = replace(LARGE, n_layer=1)
PROMPT = np.array([3, 1, 4, 1, 5], np.int32)


@pytest.fixture(scope="module")
def decoders(scramble):
    """Two models that agree about much, but not all: the small one is the large one's first layer."""
    large = scramble(LARGE, seed=1)
    small = large | {"layers": jax.tree.map(lambda x: x[:1], large["layers"])}
    return Decoder(LARGE, large), Decoder(SMALL, small)


def tokens_of(chunks):
    return np.concatenate([chunk.tokens_BC[0] for chunk in chunks])


def probabilities(decoder, tokens, sampling):
    logits_V = GPT(decoder.config).apply({"params": decoder.params}, jnp.asarray(tokens)[None])[0, -1]
    seen = jnp.zeros((1, decoder.config.padded_vocab_size), bool).at[0, jnp.asarray(tokens)].set(True)
    return np.asarray(jax.nn.softmax(apply_rules(logits_V[None], seen, sampling.temperature, sampling)))[0, :13]


@pytest.mark.parametrize(
    "sampling",
    [
        pytest.param(Sampling(), marks=pytest.mark.slow),
        pytest.param(Sampling(temperature=0.6, top_k=5), marks=pytest.mark.slow),
        Sampling(top_p=0.8, repetition_penalty=1.7),
    ],
    ids=["plain", "top_k", "penalty"],
)
def test_what_is_drawn_has_the_large_models_distribution(decoders, sampling):
    large, small = decoders
    rules, n, proposals = replace(sampling, temperature=1.0), 40_000, 3
    caches = tuple(_read(decoder, PROMPT[:-1], 16) for decoder in decoders)
    seen_V = jnp.zeros(LARGE.padded_vocab_size, bool).at[PROMPT].set(True)

    def drawn(key):
        return _round.__wrapped__(
            (LARGE, SMALL), (large.params, small.params), caches, jnp.asarray(PROMPT[-1:]), jnp.int32(len(PROMPT) - 1),
            seen_V, key, jnp.float32(sampling.temperature), rules, proposals,
        )[2:]  # fmt: skip

    tokens, _, n_drawn = map(np.asarray, jax.jit(jax.vmap(drawn))(jax.random.split(jax.random.key(0), n)))
    assert 0.1 < (n_drawn > 1).mean() < 0.9 and (n_drawn == proposals + 1).any()
    rows, text = np.ones(n, bool), PROMPT
    for place in range(3):  # each token given the commonest ones before it
        rows &= n_drawn > place
        expected = probabilities(large, text, sampling)
        counts = np.bincount(tokens[rows, place], minlength=13)
        assert not counts[expected < 1e-9].any()
        common = expected * rows.sum() >= 5
        observed = counts[common].astype(np.float64)
        expected = expected[common].astype(np.float64)
        expected *= observed.sum() / expected.sum()
        assert scipy.stats.chisquare(observed, expected).pvalue > 1e-3
        text = np.append(text, counts.argmax()).astype(np.int32)
        rows &= tokens[:, place] == text[-1]


@pytest.mark.parametrize("guesser", [0, 1], ids=["itself", "another"])
def test_greedy_text_is_that_of_the_large_model_alone(decoders, guesser):
    """Past block_size too, where the last half is read again."""
    greedy = Sampling(temperature=0.0, repetition_penalty=1.3)
    chunks = list(speculate(decoders[0], decoders[guesser], PROMPT, 70, greedy, seed=0))
    alone = list(generate(*decoders[0], [PROMPT], 70, greedy, seeds=[0]))
    np.testing.assert_array_equal(tokens_of(chunks), tokens_of(alone))
    together = [np.concatenate([chunk.log_probs_BC[0] for chunk in part]) for part in (chunks, alone)]
    np.testing.assert_allclose(*together, rtol=0, atol=1e-5)
    lengths = {chunk.tokens_BC.shape[1] for chunk in chunks}
    assert max(lengths) == 5 and (guesser == 0 or min(lengths) == 1)


def test_a_seed_is_a_text(decoders):
    texts = [tokens_of(speculate(*decoders, PROMPT, 40, Sampling(), seed)).tolist() for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2] and len(texts[0]) == 40


def test_vocabularies_may_be_padded_to_other_sizes(scramble, decoders):
    wide = replace(LARGE, vocab_size=200)  # padded to 256 where the other has 64 or 128
    assert wide.padded_vocab_size > SMALL.padded_vocab_size
    params = scramble(wide)
    greedy = Sampling(temperature=0.0, repetition_penalty=1.3)
    for one, other in ((Decoder(wide, params), decoders[1]), (decoders[1], Decoder(wide, params))):
        alone = tokens_of(generate(*one, [PROMPT], 20, greedy, seeds=[0]))
        np.testing.assert_array_equal(tokens_of(speculate(one, other, PROMPT, 20, greedy, seed=0)), alone)


def test_one_token_is_prompt_enough(decoders):
    greedy = Sampling(temperature=0.0)
    alone = tokens_of(generate(*decoders[0], [PROMPT[:1]], 12, greedy, seeds=[0]))
    np.testing.assert_array_equal(tokens_of(speculate(*decoders, PROMPT[:1], 12, greedy, seed=0)), alone)
