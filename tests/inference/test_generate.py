"""Generation: the KV cache changes nothing, a full block is refilled, tokens follow the exact distribution."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from gptjax.config import ModelConfig
from gptjax.inference.decoder import init_cache
from gptjax.inference.generate import CHUNK, PrefixCache, decode, generate, prefill, read
from gptjax.inference.sampling import Sampling, apply_rules, largest_by_digits, sample_token
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
MODERN = replace(SPEEDRUN, norm="rmsnorm", qk_norm_scale=True, head_dim=12, window=7, nope_interval=2)
# With one set of rules, whose temperature is no constant of the program, most tests run the same few programs.
GREEDY = Sampling(temperature=0.0, repetition_penalty=1.3)
HOT = replace(GREEDY, temperature=1.5)


@pytest.fixture(scope="module")
def params(scramble):
    """Weights that attend far back and favour no token, so that greedy text differs between contexts."""
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


def text(length, batch=1, seed=0, vocab_size=61):
    return np.random.default_rng(seed).integers(0, vocab_size, (batch, length), np.int32)


def new_tokens(params, prompts, n, sampling=GREEDY, seeds=None, config=TINY, prefix=None):
    """The new tokens and their log-probabilities."""
    seeds = range(len(prompts)) if seeds is None else seeds
    chunks = list(generate(config, params, list(prompts), n, sampling, seeds, prefix))
    tokens, log_probs = [np.hstack(column) for column in zip(*chunks, strict=True)]
    assert tokens.shape == log_probs.shape == (len(prompts), n)
    return tokens, log_probs


@pytest.mark.parametrize("config", [TINY, SPEEDRUN, MODERN], ids=["gpt2", "speedrun", "modern"])
def test_cached_logits_are_those_of_a_full_pass(params, scramble, config):
    """Two prefills, the second of rows of unequal length that padding follows, and decoding."""
    params = params if config is TINY else scramble(config)
    length_B, rows, n = np.array([9, 13, 20, 24]), np.arange(4), 8
    tokens_BT = text(32, batch=4)
    padded_BT = jnp.asarray(np.where(np.arange(32) < length_B[:, None], tokens_BT, text(32, batch=4, seed=9)))
    cache, _ = read(config, params, init_cache(config, params, 4, TINY.block_size), list(tokens_BT[:, :n]))
    offset_B = jnp.full(4, n)
    cache, logits_BV = prefill(config, params, cache, padded_BT[:, n:], offset_B, jnp.asarray(length_B - n))
    keys_B = jax.vmap(jax.random.key)(jnp.arange(4, dtype=jnp.uint32))
    first_BV = np.asarray(jax.nn.log_softmax(logits_BV))
    cache, logits_BV, _, new_BC, log_probs_BC = decode(
        config, params, cache, logits_BV, None, jnp.asarray(length_B), keys_B, jnp.int32(0), Sampling()
    )
    whole_BT = np.zeros((4, TINY.block_size), np.int32)
    for row, length in enumerate(length_B):
        whole_BT[row, : length + CHUNK] = np.append(tokens_BT[row, :length], new_BC[row])
    full_BTV = np.asarray(jax.nn.log_softmax(logits_of(config, params, whole_BT)))
    assert full_BTV.std() > 0.5
    # The same sums in another order, for logits of order 1: 2e-6 as measured.
    close = partial(np.testing.assert_allclose, rtol=0, atol=1e-5)
    close(first_BV, full_BTV[rows, length_B - 1])
    close(jax.nn.log_softmax(logits_BV), full_BTV[rows, length_B + CHUNK - 1])
    for row, length in enumerate(length_B):
        close(log_probs_BC[row], full_BTV[row, np.arange(length - 1, length - 1 + CHUNK), np.asarray(new_BC)[row]])


def naive(params, prompt, n, config=TINY):
    """Every token by a full pass. Once a token has been drawn after a full block, only half a block stays."""
    window, tokens = list(prompt)[-config.block_size :], list(prompt)
    for _ in range(n):
        if len(window) > config.block_size:
            window = window[-max(config.block_size // 2, 1) :]
        padded_BT = np.zeros((1, config.block_size), np.int32)  # causal: what follows a token does not matter
        padded_BT[0, : len(window)] = window
        logits_V = np.array(logits_of(config, params, padded_BT)[0, len(window) - 1])
        seen = np.unique(tokens)
        logits_V[seen] *= np.where(logits_V[seen] > 0, 1 / 1.3, 1.3)
        assert np.diff(np.sort(logits_V)[-2:]) > 2e-5, "a tie up to rounding, which cannot be compared"
        window.append(int(np.argmax(logits_V)))
        tokens.append(window[-1])
    return tokens[len(prompt) :]


@pytest.mark.parametrize("length", [1, 33, 40, 97])  # around the lengths that prompts are padded to, 32 and 40
def test_greedy_text_is_its_definition_past_the_block(params, length):
    prompts = text(length, seed=1000 + length)
    assert new_tokens(params, prompts, 93)[0][0].tolist() == naive(params, prompts[0], 93)


def test_a_block_of_one_token(scramble):
    config, prompts = replace(TINY, block_size=1, n_layer=1), text(1)
    params = scramble(config)
    assert new_tokens(params, prompts, 5, config=config)[0][0].tolist() == naive(params, prompts[0], 5, config)


def test_a_row_depends_on_its_prompt_and_seed_alone(params):
    """Not on other rows, which fill up at other times, nor on how many tokens follow."""
    prompts, seeds = [text(length, seed=length)[0] for length in (7, 1, 28, 7, 13)], [5, 6, 7, 8, 5]
    tokens, log_probs = new_tokens(params, prompts, 60, HOT, seeds)
    np.testing.assert_array_equal(new_tokens(params, prompts, 12, HOT, seeds)[0], tokens[:, :12])
    for prompt, seed, row, row_log_probs in zip(prompts, seeds, tokens, log_probs, strict=True):
        alone, alone_log_probs = new_tokens(params, [prompt], 60, HOT, [seed])
        np.testing.assert_array_equal(alone[0], row)
        np.testing.assert_allclose(alone_log_probs[0], row_log_probs, rtol=0, atol=1e-5)
    for n in (1, CHUNK, CHUNK + 1, 25, 34, 35):
        np.testing.assert_array_equal(new_tokens(params, prompts[:1], n, HOT, seeds[:1])[0][0], tokens[0, :n])
    assert (tokens[0] != tokens[3]).mean() > 0.5, "the seed is ignored"
    assert not list(generate(TINY, params, prompts, 0, HOT, seeds))


def test_a_prefix_cache_changes_nothing_but_what_is_read(params, monkeypatch):
    prefix, prompt, read_lengths, firsts = PrefixCache(), text(5)[0], [], []
    monkeypatch.setattr(
        "gptjax.inference.generate.prefill", lambda *a: read_lengths.append(int(a[-1][0])) or prefill(*a)
    )
    # Answers that end in a cache's last place (32), or run over the block (40), are followed as they are or changed.
    for turn, (n, n_changed) in enumerate(((6, 1), (1, 1), (20, 0), (6, 1), (30, 1))):
        again, again_log_probs = new_tokens(params, [prompt], n)
        read_lengths.clear()
        answer, log_probs = new_tokens(params, [prompt], n, prefix=prefix)
        firsts.append(read_lengths[0])
        assert answer.tolist() == again.tolist()
        np.testing.assert_allclose(log_probs, again_log_probs, rtol=0, atol=1e-5)
        prompt = np.concatenate([prompt, answer[0, : n - n_changed], text(1, seed=turn)[0]])
    assert firsts == [5, 1, 1, 2, 1]


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
    assert scipy.stats.chisquare(observed[some], expected[some]).pvalue > 1e-3


@pytest.mark.parametrize("n_bits", [1, 8])  # on a CPU, and elsewhere
def test_a_search_by_digits_keeps_the_fewest_largest_that_weigh_enough(n_bits):
    logits_BV = np.random.default_rng(0).normal(0, 3, (4, 50)).astype(np.float32)
    weights_BV = np.array(jax.nn.softmax(logits_BV))
    kept_BV = np.asarray(largest_by_digits(n_bits, jnp.asarray(logits_BV), jnp.asarray(weights_BV), 0.7)) > -np.inf
    for logits_V, weights_V, kept_V in zip(logits_BV, weights_BV, kept_BV, strict=True):
        order = np.argsort(-logits_V)
        fewest = 1 + int(np.argmax(np.cumsum(weights_V[order]) >= 0.7))
        assert set(np.flatnonzero(kept_V)) == set(order[:fewest])


ROWS = [
    Sampling(),
    Sampling(temperature=0.0),
    Sampling(top_k=3, temperature=0.7),
    Sampling(top_k=50, top_p=0.6),
    Sampling(min_p=0.2, repetition_penalty=1.5),
    Sampling(temperature=2.0, top_k=7, top_p=0.8, min_p=0.1, repetition_penalty=0.8),
    Sampling(top_p=0.0),
]


def test_rules_as_arrays_are_those_of_each_row_alone():
    """Also where a rule is on for some rows only, or for none."""
    rng = np.random.default_rng(0)
    logits_BV = jnp.asarray(rng.normal(0, 2, (len(ROWS), 50)), jnp.float32)
    seen_BV = jnp.asarray(rng.random((len(ROWS), 50)) < 0.3)
    for rows in (ROWS, [Sampling()] * len(ROWS)):
        together = jax.jit(apply_rules)(logits_BV, seen_BV, Sampling.of_rows(rows))
        for i, row in enumerate(rows):
            alone = apply_rules(logits_BV[i : i + 1], seen_BV[i : i + 1], row)[0]
            np.testing.assert_array_equal(together[i] == -jnp.inf, alone == -jnp.inf)
            np.testing.assert_allclose(together[i], alone, rtol=1e-6)


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 0), (0.5, 2), (3.0, 5)])
def test_drawn_tokens_have_the_exact_distribution(temperature, top_k):
    logits_V = np.float32([0, 2, 1, 1, 1, -1, 0.3, -0.2])  # of top_k=2 the three that tie all stay
    keys_B = jax.random.split(jax.random.key(3), 20_000)
    rules = Sampling(temperature=temperature, top_k=top_k)
    tokens = jax.jit(sample_token)(jnp.tile(logits_V, (20_000, 1)), None, keys_B, rules)
    assert_drawn_from(np.asarray(tokens), probabilities(logits_V, temperature, top_k))


def test_generated_tokens_have_the_exact_distribution(params):
    prompts_BP, sampling = np.repeat(text(6), 1024, axis=0), Sampling(temperature=2.0, top_k=7)
    tokens = next(generate(TINY, params, list(prompts_BP), 2, sampling, range(1024))).tokens_BC
    padded_BT = np.zeros((1, TINY.block_size), np.int32)
    padded_BT[:, :6] = prompts_BP[:1]
    assert_drawn_from(tokens[:, 0], probabilities(logits_of(TINY, params, padded_BT)[0, 5], 2.0, 7))
    padded_BT[:, 6] = common = np.bincount(tokens[:, 0]).argmax()
    second = tokens[tokens[:, 0] == common, 1]
    assert_drawn_from(second, probabilities(logits_of(TINY, params, padded_BT)[0, 6], 2.0, 7))


def test_padded_ids_are_never_drawn(scramble):
    config = replace(TINY, vocab_size=1030, n_layer=1, block_size=16)
    params = scramble(config)
    # If padded ids were drawn, they would be every tenth token, and with these rows the likeliest.
    params["token_embedding"] = params["token_embedding"].at[1030:].multiply(50)
    prompts_BP = text(3, batch=128, vocab_size=1030)
    for temperature in (0.0, 50.0):
        tokens, _ = new_tokens(params, prompts_BP, 10, Sampling(temperature=temperature, top_k=1100), config=config)
        assert tokens.max() < 1030
    assert len(np.unique(tokens)) > 600


def test_draws_are_independent_of_each_other(params):
    """So hot that all ids are alike: any two draws agree once in 61 times, in whatever chunk, block or row they are."""
    tokens, _ = new_tokens(params, text(5, batch=64), 110, replace(GREEDY, temperature=1e5))
    pairs = [(tokens[:, :-lag], tokens[:, lag:]) for lag in range(1, 81)]
    pairs += [(tokens[:-lag], tokens[lag:]) for lag in range(1, 32)]
    for first, second in pairs:
        assert abs((first == second).mean() - 1 / 61) < 5 * np.sqrt(1 / 61 / first.size)


def test_one_compilation_serves_many_prompts(params, compilations):
    for length in (3, 40):
        new_tokens(params, text(length), 90)
    with compilations() as again:
        for length, n, temperature, seed in [(1, 60, 0.5, 1), (17, 30, 0.0, 2), (32, 99, 2.0, 3), (39, 40, 1.0, 4)]:
            new_tokens(params, text(length), n, replace(GREEDY, temperature=temperature), [seed])
    assert again == []
    with compilations() as more:
        new_tokens(params, text(3), 5, Sampling(top_k=4))
    assert more, "this test does not see compilations"
