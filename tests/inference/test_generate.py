"""Generation: the cache changes nothing, both contexts are what they say, tokens follow the exact distribution."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from gptjax.config import ModelConfig
from gptjax.inference.decoder import init_cache
from gptjax.inference.generate import CHUNK, PrefixCache, decode, generate, prefill
from gptjax.inference.sampling import Sampling, sample_token
from gptjax.model import GPT

TINY = ModelConfig(vocab_size=61, block_size=40, n_layer=2, n_head=2, n_embd=16, bias=True, dtype="float32")
SPEEDRUN = replace(
    TINY,
    activation="relu2",
    norm="nonparametric_rmsnorm",
    position="rope",
    qk_norm=True,
    embedding_norm=True,
    logit_cap=2.0,
    tied_head=False,
    n_kv_head=1,
)
GREEDY = Sampling(temperature=0.0)
# Below, at and above the lengths to which prompts are padded (32, and 40 = block_size), up to several blocks.
PROMPT_LENGTHS = [1, 31, 32, 33, 40, 41, 97]


@pytest.fixture(scope="module")
def params(scramble):
    """Weights that look far and favour no token, or greedy text would soon repeat itself and contexts look alike."""
    params = scramble(TINY)
    attention, mlp = params["layers"]["attention"], params["layers"]["mlp"]
    for name, factor in (("query", 4), ("key", 4), ("out", 3)):
        attention[name]["kernel"] *= factor
    for constant in (attention["out"], mlp["down"], params["final_norm"]):
        constant["bias"] *= 0
    params["token_embedding"] /= jnp.linalg.norm(params["token_embedding"], axis=1, keepdims=True)
    return params


@partial(jax.jit, static_argnums=0)
def logits_of(config, params, tokens_BT):
    return GPT(config).apply({"params": params}, tokens_BT)


@partial(jax.jit, static_argnums=0)
def read(config, params, tokens_BT, cache, offset_B):
    model, weights = GPT(config), {"params": params}
    x_BTD, cache = model.apply(weights, tokens_BT, cache, offset_B, method="hidden")
    return model.apply(weights, x_BTD, method="logits"), cache


def text(length, batch=1, seed=0, vocab_size=61):
    return np.random.default_rng(seed).integers(0, vocab_size, (batch, length), np.int32)


def new_tokens(params, prompt_BP, n, sampling=GREEDY, seed=0, config=TINY):
    seeds = [1000 * seed + i for i in range(len(prompt_BP))]
    chunks = [chunk.tokens_BC for chunk in generate(config, params, list(prompt_BP), n, sampling, seeds)]
    tokens = np.hstack(chunks) if chunks else np.zeros((len(prompt_BP), 0), np.int32)
    assert tokens.shape == (len(prompt_BP), n)
    return tokens


def likeliest(params, window):
    """The greedy token after up to block_size tokens, by one full forward pass."""
    padded_BT = np.zeros((1, TINY.block_size), np.int32)  # causal: what stands behind a token does not matter
    padded_BT[0, : len(window)] = window
    logits_V = np.asarray(logits_of(TINY, params, padded_BT)[0, len(window) - 1])
    assert np.diff(np.sort(logits_V)[-2:]) > 2e-5, "a tie up to rounding, which cannot be compared"
    return int(np.argmax(logits_V))


def naive_exact(params, prompt, n):
    """nanoGPT's loop: the last block_size tokens, at positions from 0, for every token."""
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(likeliest(params, tokens[-TINY.block_size :]))
    return tokens[len(prompt) :]


def naive_refill(params, prompt, n):
    """The definition of "refill": once a token has been drawn after a full block, only half a block stays."""
    window, new = list(prompt)[-TINY.block_size :], []
    for _ in range(n):
        if len(window) > TINY.block_size:
            window = window[-(TINY.block_size // 2) :]
        new.append(likeliest(params, window))
        window.append(new[-1])
    return new


@pytest.mark.parametrize("config", [TINY, SPEEDRUN], ids=["gpt2", "speedrun"])
def test_decoding_with_the_cache_gives_the_logits_of_a_full_pass(params, scramble, config):
    params = params if config is TINY else scramble(config)
    tokens_BT = text(config.block_size, batch=3)
    full_BTV = np.asarray(logits_of(config, params, tokens_BT))
    cache = init_cache(config, params, 3, config.block_size + CHUNK)
    assert full_BTV.std() > 0.5
    for position in range(config.block_size):
        token_B1 = tokens_BT[:, position : position + 1]
        logits_B1V, cache = read(config, params, token_B1, cache, jnp.full(3, position))
        # The same sums in another order, for logits of order 1: 2e-6 as measured.
        np.testing.assert_allclose(logits_B1V[:, 0], full_BTV[:, position], rtol=0, atol=1e-5)


@pytest.mark.parametrize("config", [TINY, SPEEDRUN], ids=["gpt2", "speedrun"])
def test_reading_piece_by_piece_gives_the_logits_of_a_full_pass(params, scramble, config):
    params = params if config is TINY else scramble(config)
    tokens_BT, start = text(TINY.block_size, batch=2), 0
    full_BTV, cache = np.asarray(logits_of(config, params, tokens_BT)), init_cache(config, params, 2, TINY.block_size)
    for n in (27, 13):
        logits_BTV, cache = read(config, params, tokens_BT[:, start : start + n], cache, jnp.full(2, start))
        np.testing.assert_allclose(logits_BTV, full_BTV[:, start : start + n], rtol=0, atol=1e-5)  # as above
        start += n
    assert start == TINY.block_size


@pytest.mark.parametrize("config", [TINY, SPEEDRUN], ids=["gpt2", "speedrun"])
def test_prefill_and_decode_give_the_logits_of_a_full_pass(params, scramble, config):
    params = params if config is TINY else scramble(config)
    length_B = np.array([1, 5, 20, 24])
    padded_BT, junk_BT = text(32, batch=4), text(32, batch=4, seed=9)
    behind = np.arange(32) >= length_B[:, None]
    cache, offset_B, rows = init_cache(config, params, 4, TINY.block_size), jnp.zeros(4, jnp.int32), np.arange(4)
    tokens_BT = jnp.asarray(np.where(behind, junk_BT, padded_BT))
    cache, logits_BV = prefill(config, params, cache, tokens_BT, offset_B, jnp.asarray(length_B))
    full_BTV = np.asarray(logits_of(config, params, padded_BT))
    np.testing.assert_allclose(logits_BV, full_BTV[rows, length_B - 1], rtol=0, atol=1e-5)  # as above
    keys_B = jax.vmap(jax.random.key)(jnp.arange(4, dtype=jnp.uint32))
    cache, logits_BV, _, new_BC, log_probs_BC = decode(
        config, params, cache, logits_BV, None, jnp.asarray(length_B), keys_B, jnp.int32(0), Sampling()
    )
    whole_BT = np.zeros((4, TINY.block_size), np.int32)
    for row, length in enumerate(length_B):
        whole_BT[row, : length + CHUNK] = np.append(padded_BT[row, :length], new_BC[row])
    full_BTV = np.asarray(jax.nn.log_softmax(logits_of(config, params, whole_BT)))
    last_BV = jax.nn.log_softmax(logits_BV)
    np.testing.assert_allclose(last_BV, full_BTV[rows, length_B + CHUNK - 1], rtol=0, atol=1e-5)
    for row, length in enumerate(length_B):
        own_C = full_BTV[row, length - 1 : length - 1 + CHUNK][np.arange(CHUNK), np.asarray(new_BC)[row]]
        np.testing.assert_allclose(log_probs_BC[row], own_C, rtol=0, atol=1e-5)


@pytest.mark.parametrize("length", PROMPT_LENGTHS)
def test_refilled_context_is_its_definition(params, length):
    prompt_BP, n = text(length, seed=1000 + length), 3 * TINY.block_size + 13
    tokens = new_tokens(params, prompt_BP, n)[0].tolist()
    assert tokens == naive_refill(params, prompt_BP[0], n)
    n_exact = max(TINY.block_size - length, 0) + 1  # up to and including the first token after a full block
    exact = naive_exact(params, prompt_BP[0], n)
    assert tokens[:n_exact] == exact[:n_exact]
    assert tokens != exact, "the two contexts are told apart by nothing"


def test_a_block_of_one_token(scramble):
    config = replace(TINY, block_size=1)
    params = scramble(config)
    expected, prompt_BP = [], text(1)
    for _ in range(5):
        expected.append(int(np.argmax(logits_of(config, params, np.array([[(*prompt_BP[0], *expected)[-1]]])))))
    assert new_tokens(params, prompt_BP, 5, GREEDY, config=config)[0].tolist() == expected


def test_how_many_tokens_follow_changes_none(params):
    sampling, prompt_BP = Sampling(temperature=1.5, top_k=30), text(7, batch=2)
    longest = new_tokens(params, prompt_BP, 100, sampling)
    for n in (0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 33, 34, 35, 50, 99):
        np.testing.assert_array_equal(new_tokens(params, prompt_BP, n, sampling), longest[:, :n])
    assert (longest[0] != longest[1]).mean() > 0.5, "rows draw their own tokens"
    assert (longest != new_tokens(params, prompt_BP, 100, sampling, seed=1)).mean() > 0.5, "the seed is ignored"
    same_prompts = new_tokens(params, np.vstack([prompt_BP[:1]] * 2), 100, sampling)
    assert (same_prompts[0] != same_prompts[1]).any()


@pytest.mark.parametrize("n", [12, 60])
def test_prompts_of_unequal_length_are_as_one_by_one(params, n):
    """With 12 new tokens all fits into a block and is one batch; with 60 the rows fill up one after another."""
    prompts = [text(length, seed=length)[0] for length in (7, 1, 28, 7, 13)]
    sampling, seeds = Sampling(temperature=1.5, top_k=30, repetition_penalty=1.3), [5, 6, 7, 8, 5]
    chunks = list(generate(TINY, params, prompts, n, sampling, seeds))
    for row, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        alone = list(generate(TINY, params, [prompt], n, sampling, [seed]))
        tokens = np.hstack([chunk.tokens_BC for chunk in chunks])[row]
        assert tokens.tolist() == np.hstack([chunk.tokens_BC for chunk in alone])[0].tolist()
        log_probs = np.hstack([chunk.log_probs_BC for chunk in chunks])[row]
        np.testing.assert_allclose(log_probs, np.hstack([c.log_probs_BC for c in alone])[0], rtol=0, atol=1e-5)


def test_a_memory_changes_nothing_but_what_is_read(params):
    memory, prompt, seen = PrefixCache(), text(5)[0], []
    for turn, n in enumerate((6, 1, 17, 30)):  # the last one runs over the block
        answer = np.hstack([c.tokens_BC for c in generate(TINY, params, [prompt], n, GREEDY, [turn], memory)])[0]
        assert answer.tolist() == new_tokens(params, [prompt], n)[0].tolist()
        seen.append(len(memory.tokens))
        assert memory.tokens.tolist() == np.append(prompt, answer)[: len(memory.tokens)].tolist() or turn == 3
        prompt = np.append(np.append(prompt, answer[:-1]), text(1, seed=turn)[0])  # goes on otherwise than it answered
    assert seen[:3] == [11, 12, 29]


def test_a_batch_is_its_rows_one_by_one(params):
    prompts_BP, n = text(11, batch=3), 60
    rows = np.vstack([new_tokens(params, prompts_BP[i : i + 1], n) for i in range(3)])
    np.testing.assert_array_equal(new_tokens(params, prompts_BP, n), rows)


def test_dropout_is_off(params):
    prompt_BP = text(5)
    tokens = new_tokens(params, prompt_BP, 20, config=replace(TINY, dropout=0.5))
    np.testing.assert_array_equal(tokens, new_tokens(params, prompt_BP, 20))


def probabilities(logits_V, temperature, top_k):
    """softmax(logits / temperature) over the top_k likeliest, and over all that tie with the last of them."""
    logits_V = np.asarray(logits_V, np.float64)
    if 0 < top_k < len(logits_V):
        logits_V = np.where(logits_V >= np.sort(logits_V)[-top_k], logits_V, -np.inf)
    weights_V = np.exp((logits_V - logits_V.max()) / temperature)
    return weights_V / weights_V.sum()


def assert_drawn_from(tokens, probabilities_V):
    """A chi-square test at a fixed seed: a right sampler has p < 0.001 for one seed in a thousand."""
    counts_V = np.bincount(tokens, minlength=len(probabilities_V))
    assert not counts_V[probabilities_V == 0].any()
    # The test's approximation needs some five expected draws in a bin: rarer tokens are put together.
    expected_V = probabilities_V * len(tokens)
    common = expected_V >= 5
    observed, expected = [
        np.append(values[common], values[~common].sum()) for values in (counts_V.astype(np.float64), expected_V)
    ]
    some = expected > 0
    if some.sum() > 1:
        assert scipy.stats.chisquare(observed[some], expected[some]).pvalue > 1e-3


DISTRIBUTIONS = [(1.0, 0), (0.5, 0), (3.0, 0), (1.0, 1), (1.0, 5), (0.7, 5), (1.0, 12), (2.0, 500)]


@pytest.mark.parametrize(("temperature", "top_k"), DISTRIBUTIONS)
def test_drawn_tokens_have_the_exact_distribution(temperature, top_k):
    logits_V = np.random.default_rng(0).normal(size=12).astype(np.float32)
    draw = jax.jit(sample_token)
    keys_B = jax.random.split(jax.random.key(3), 20_000)
    tokens = draw(jnp.tile(logits_V, (20_000, 1)), None, keys_B, Sampling(temperature=temperature, top_k=top_k))
    assert_drawn_from(np.asarray(tokens), probabilities(logits_V, temperature, top_k))


def test_ties_at_the_last_of_top_k_all_stay():
    logits_V = np.float32([0, 2, 1, 1, 1, -1])
    keys_B = jax.random.split(jax.random.key(0), 20_000)
    tokens = sample_token(jnp.tile(logits_V, (20_000, 1)), None, keys_B, Sampling(top_k=2))
    assert_drawn_from(np.asarray(tokens), probabilities(logits_V, 1.0, 2))
    assert set(np.asarray(tokens).tolist()) == {1, 2, 3, 4}


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 0), (0.5, 0), (2.0, 7)])
def test_generated_tokens_have_the_exact_distribution(params, temperature, top_k):
    prompts_BP = np.repeat(text(6), 4096, axis=0)
    sampling = Sampling(temperature=temperature, top_k=top_k)
    tokens = next(generate(TINY, params, list(prompts_BP), 2, sampling, range(4096))).tokens_BC
    first_V = logits_of(TINY, params, prompts_BP[:1])[0, -1]
    assert_drawn_from(tokens[:, 0], probabilities(first_V, temperature, top_k))
    common = np.bincount(tokens[:, 0]).argmax()
    second = tokens[tokens[:, 0] == common, 1]
    second_V = logits_of(TINY, params, np.append(prompts_BP[:1], [[common]], axis=1))[0, -1]
    assert_drawn_from(second, probabilities(second_V, temperature, top_k))


@pytest.mark.parametrize("top_k", [0, 1100])
def test_padded_ids_are_never_drawn(scramble, top_k):
    config = replace(TINY, vocab_size=1030, n_layer=1, block_size=16)
    params = scramble(config)
    # Were padded ids in it, they would be every seventh token, and with these rows the likeliest.
    params["token_embedding"] = params["token_embedding"].at[1030:].multiply(50)
    prompts_BP = text(3, batch=64, vocab_size=1030)
    hot = Sampling(temperature=50.0, top_k=top_k)
    tokens = new_tokens(params, prompts_BP, 48, hot, config=config)
    assert tokens.max() < 1030 and len(np.unique(tokens)) > 900
    assert new_tokens(params, prompts_BP, 48, replace(hot, temperature=0.0), config=config).max() < 1030


def test_draws_are_independent_of_each_other(params):
    """So hot that all ids are alike: any two draws agree once in 61 times, in whatever chunk, block or row they are."""
    tokens = new_tokens(params, text(5, batch=64), 110, Sampling(temperature=1e5))
    pairs = [(tokens[:, :-lag], tokens[:, lag:]) for lag in range(1, 81)]
    pairs += [(tokens[:-lag], tokens[lag:]) for lag in range(1, 32)]
    for first, second in pairs:
        assert abs((first == second).mean() - 1 / 61) < 5 * np.sqrt(1 / 61 / first.size)


def test_one_compilation_serves_many_prompts(params, compilations):
    def run(length, n, temperature, seed):
        new_tokens(params, text(length), n, Sampling(temperature=temperature, top_k=3), seed)

    run(3, 90, 1.0, 0)
    run(40, 90, 1.0, 0)
    with compilations() as again:
        for length, n, temperature, seed in [(1, 60, 0.5, 1), (17, 30, 0.0, 2), (32, 99, 2.0, 3), (39, 40, 1.0, 4)]:
            run(length, n, temperature, seed)
    assert again == []
    with compilations() as more:
        list(generate(TINY, params, list(text(3)), 5, Sampling(top_k=4), [0]))
    assert more, "this test does not see compilations"
