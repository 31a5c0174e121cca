"""The decoder's properties: causality, counts, initialization, padding, dropout, dtypes, LayerNorm's epsilon."""

from collections import defaultdict
from dataclasses import replace
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import Config, ModelConfig, TrainConfig
from gptjax.model import GPT, Dropout, param_shapes, rope_angles, rotate
from gptjax.optimizer import make_optimizer
from gptjax.sharding import path_name
from gptjax.training import TrainState, loss_sum, train_step

TINY = ModelConfig(vocab_size=61, block_size=16, n_layer=2, n_head=2, n_embd=16, bias=True, dtype="float32")
SPEEDRUN = {"activation": "relu2", "norm": "nonparametric_rmsnorm", "position": "rope", "qk_norm": True}
SPEEDRUN |= {"embedding_norm": True, "logit_cap": 2.0, "tied_head": False, "bias": False}


def tokens_of(config, batch=2, seed=0, length=None):
    shape = (batch, length or config.block_size)
    return jnp.asarray(np.random.default_rng(seed).integers(0, config.vocab_size, shape), jnp.int32)


@partial(jax.jit, static_argnums=0)
def logits_of(config, params, tokens_BT, key=None):
    return GPT(config).apply({"params": params}, tokens_BT, rngs=None if key is None else {"dropout": key})


@pytest.mark.parametrize("fields", [{}, SPEEDRUN | {"position": "learned"}], ids=["gpt2", "speedrun"])
def test_a_logit_depends_on_its_own_and_earlier_tokens_only(scramble, fields):
    config = replace(TINY, **fields)
    params, tokens_BT = scramble(config), tokens_of(config, batch=1)

    def one_number_per_place(position_embedding):
        # Its row s is added to token s and goes nowhere else: a gradient by it is one by token s's embedding.
        return logits_of(config, params | {"position_embedding": position_embedding}, tokens_BT)[0] @ direction

    direction = jnp.asarray(np.random.default_rng(1).standard_normal(TINY.vocab_size), jnp.float32)
    jacobian_TSD = np.asarray(jax.jit(jax.jacrev(one_number_per_place))(params["position_embedding"]))
    seen_TS = np.tril(np.ones((TINY.block_size, TINY.block_size), bool))
    assert (jacobian_TSD[~seen_TS] == 0).all()
    assert (np.abs(jacobian_TSD[seen_TS]).max(axis=-1) > 1e-4).all()


@pytest.mark.parametrize("fields", [{"attention": "plain"}, {"attention": "blockwise"}])
def test_a_document_does_not_see_the_one_before_it(scramble, fields):
    config = replace(TINY, separator=7, **fields)
    params, tokens_BT = scramble(config), tokens_of(config).at[:].set(3).at[:, 5].set(7)
    for changed, same in ((2, slice(5, None)), (7, slice(0, 7))):
        logits = logits_of(config, params, tokens_BT.at[:, changed].set(11))
        np.testing.assert_array_equal(logits[:, same], logits_of(config, params, tokens_BT)[:, same])
        assert (logits[:, changed] != logits_of(config, params, tokens_BT)[:, changed]).any()
    without = logits_of(replace(config, separator=None), params, tokens_BT)
    assert (without[:, 6:] != logits_of(config, params, tokens_BT)[:, 6:]).any()


def test_gpt2_124m_has_its_published_number_of_parameters():
    gpt2 = replace(TINY, vocab_size=50257, block_size=1024, n_layer=12, n_head=12, n_embd=768)
    params = param_shapes(gpt2)
    assert params["token_embedding"].shape == (50304, 768)
    n_padding = (50304 - 50257) * 768
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) - n_padding == 124_439_808
    n_biases = sum(leaf.size for leaf in jax.tree.leaves(param_shapes(replace(gpt2, bias=False))))
    # Per layer: query, key, value, out, down, two LayerNorms [D] and up [4 D]; and the final LayerNorm.
    assert 124_439_808 + n_padding - n_biases == 12 * 11 * 768 + 768


def test_vocabularies_are_padded_from_1024_on():
    sizes = {65: 65, 1023: 1023, 1024: 1024, 1025: 1152, 50257: 50304, 50304: 50304}
    assert {size: replace(TINY, vocab_size=size).padded_vocab_size for size in sizes} == sizes


def test_initialization():
    config = replace(TINY, n_layer=3, n_embd=64, vocab_size=500, block_size=200)
    params = jax.jit(GPT(config).init)(jax.random.key(0), tokens_of(config, length=1))["params"]
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name, values = path_name(path), np.asarray(leaf)
        assert values.dtype == np.float32
        if name.endswith(("bias", "scale")):
            assert (values == name.endswith("scale")).all(), name
            continue
        residual = name.endswith(("out/kernel", "down/kernel"))
        std = 0.02 / np.sqrt(2 * config.n_layer) if residual else 0.02
        for part in values if name.startswith("layers") else [values]:
            # Five standard errors, of the sample's standard deviation and of its mean.
            assert abs(part.std() / std - 1) < 5 / np.sqrt(2 * part.size), name
            assert abs(part.mean() / std) < 5 / np.sqrt(part.size), name
        if name.startswith("layers"):
            assert not np.array_equal(values[0], values[1]), f"{name}: layers begin alike"


def test_capped_logits(scramble):
    params, tokens_BT = scramble(TINY), tokens_of(TINY)
    plain_BTV = np.asarray(logits_of(TINY, params, tokens_BT))
    capped_BTV = logits_of(replace(TINY, logit_cap=1.5), params, tokens_BT)
    np.testing.assert_allclose(capped_BTV, 1.5 * np.tanh(plain_BTV / 1.5), rtol=0, atol=1e-6)
    assert np.abs(plain_BTV).max() > 2


def test_padded_ids_take_no_part(scramble):
    """With a cap too, which would make their logits finite."""
    config = replace(TINY, vocab_size=1030, logit_cap=2.0)
    params, windows_BT = scramble(config), tokens_of(config, length=config.block_size + 1)
    logits_BTV = np.asarray(logits_of(config, params, windows_BT[:, :-1]))
    assert logits_BTV.shape[-1] == 1152
    assert (logits_BTV[..., 1030:] == -np.inf).all() and np.isfinite(logits_BTV[..., :1030]).all()

    loss_and_grads = jax.jit(jax.value_and_grad(lambda params: loss_sum(GPT(config), params, windows_BT)[0]))
    loss, grads = loss_and_grads(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    assert not np.asarray(grads["token_embedding"][1030:]).any()
    assert np.asarray(grads["token_embedding"][:1030]).any(axis=-1).all()
    junk = params | {"token_embedding": params["token_embedding"].at[1030:].set(1e3)}
    other_loss, other_grads = loss_and_grads(junk)
    assert loss == other_loss
    jax.tree.map(np.testing.assert_array_equal, grads, other_grads)


def test_targets_past_the_end_do_not_count(scramble):
    config = replace(TINY, n_layer=1)
    params, windows_BT = scramble(config), np.array(tokens_of(config, length=config.block_size + 1))
    short_BT = jnp.asarray(windows_BT[:, :9])
    windows_BT[:, 9:] = -1
    sums = jax.jit(jax.value_and_grad(lambda p, windows_BT: loss_sum(GPT(config), p, windows_BT), has_aux=True))
    (nats, n_targets), grads = sums(params, jnp.asarray(windows_BT))
    (short_nats, n_short), short_grads = sums(params, short_BT)
    assert n_targets == n_short == 2 * 8
    # The same sums of about 16 terms of order 1, which XLA may add up in another order.
    np.testing.assert_allclose(nats, short_nats, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), grads, short_grads)


def record(module_class, config, params, tokens_BT, key=None):
    """Input and output of every call of modules of a class: {path: [(x, y), one per layer]}."""
    calls = defaultdict(list)

    def interceptor(next_function, arguments, options, context):
        y = next_function(*arguments, **options)
        if isinstance(context.module, module_class) and context.method_name == "__call__":
            # The path of modules in the scan begins at the scanned block; a callback's closure must not hold tracers.
            path = "/".join(context.module.path)

            def keep(x, y):
                calls[path].append((np.array(x), np.array(y)))
                return y

            y = jax.pure_callback(keep, jax.ShapeDtypeStruct(y.shape, y.dtype), arguments[0], y)
        return y

    with nn.intercept_methods(interceptor):
        # Compiled anew in every call, since what is intercepted is traced: __wrapped__ is the function before jit.
        jax.block_until_ready(jax.jit(partial(logits_of.__wrapped__, config))(params, tokens_BT, key))
    return calls


def test_dropout_is_in_its_places_and_keeps_expectations(scramble):
    config = replace(TINY, dropout=0.2, n_embd=32)
    batch, length = 16, config.block_size
    calls = record(Dropout, config, scramble(config), tokens_of(config, batch), jax.random.key(0))
    shapes = sorted((y.shape, len(each)) for each in calls.values() for _, y in each[:1])
    activations, weights = (batch, length, 32), (batch, config.n_head, length, length)
    # The attention weights and both branches of each of two layers; the embedding once.
    assert shapes == sorted([(weights, 2), (activations, 2), (activations, 2), (activations, 1)])
    masks = []
    for path, each in calls.items():
        for x, y in each:
            kept, n = y[x != 0] != 0, np.count_nonzero(x)
            assert abs(kept.mean() - 0.8) < 4 * np.sqrt(0.8 * 0.2 / n), path
            np.testing.assert_allclose(y[y != 0], x[y != 0] * 256 / 205, rtol=1e-6, err_msg=path)
            if x.shape == activations:
                masks.append(y != 0)
    for i, mask in enumerate(masks):
        for other in masks[:i]:  # independent masks agree in 0.8² + 0.2² of their places
            assert abs((mask == other).mean() - 0.68) < 4 * np.sqrt(0.68 * 0.32 / mask.size)


@pytest.mark.parametrize(("rate", "kept"), [(1e-4, 255), (0.1, 230), (0.5, 128), (0.999, 1)])
def test_dropout_decides_on_each_place_by_itself(rate, kept):
    """Four places share a random word: no two of them are alike, and none goes without a decision."""
    x = jnp.ones((2000, 10))  # no multiple of four
    y = np.asarray(Dropout(rate).apply({}, x, rngs={"dropout": jax.random.key(0)}))
    mask, p = y != 0, kept / 256
    assert mask.shape == x.shape and set(np.unique(y)) <= {0, np.float32(1) / np.float32(p)}
    assert abs(mask.mean() - p) < 4.5 * np.sqrt(p * (1 - p) / mask.size)
    np.testing.assert_allclose(mask.mean(axis=0), p, atol=4.5 * np.sqrt(p * (1 - p) / 2000))
    together = np.cov(mask.T.astype(float))[~np.eye(10, dtype=bool)]
    np.testing.assert_allclose(together, 0, atol=4.5 * p * (1 - p) / np.sqrt(2000) + 3 / 2000)


def test_dropout_is_on_exactly_where_there_is_a_key(scramble):
    params, tokens_BT, dropped = scramble(TINY), tokens_of(TINY), replace(TINY, dropout=0.5)
    plain = logits_of(TINY, params, tokens_BT)

    def with_key(seed):
        return logits_of(dropped, params, tokens_BT, jax.random.key(seed))

    np.testing.assert_array_equal(logits_of(dropped, params, tokens_BT), plain)
    assert not np.allclose(with_key(0), plain, atol=0.1)
    assert not np.allclose(with_key(0), with_key(1), atol=0.1)
    np.testing.assert_array_equal(with_key(0), with_key(0))


@pytest.mark.parametrize(("rate", "attention_rate"), [(0.5, 0.0), (0.0, 0.5)])
def test_attention_weights_may_have_a_dropout_of_their_own(scramble, rate, attention_rate):
    config = replace(TINY, dropout=rate, attention_dropout=attention_rate)
    calls = record(Dropout, config, scramble(config), tokens_of(config), jax.random.key(0))
    for x, y in (pair for each in calls.values() for pair in each):
        dropped = attention_rate if x.ndim == 4 else rate
        assert np.array_equal(x, y) == (dropped == 0)
    assert config.drops and not replace(TINY, attention_dropout=0.0).drops


def test_dropout_in_training_is_keyed_by_seed_step_and_micro_step(scramble):
    model = replace(TINY, dropout=0.0, attention_dropout=0.3, n_layer=1)
    params, windows_2BT = scramble(model), tokens_of(model, length=model.block_size + 1)[:, None]
    step = jax.jit(train_step, static_argnums=0)

    def loss(seed, step_number, windows_ABT):
        config = Config(model=model, train=TrainConfig(batch_size=2, accumulate=2, seed=seed))
        opt_state = make_optimizer(config.optimizer, config.train.max_steps).init(params)
        return float(step(config, TrainState(jnp.int32(step_number), params, opt_state), windows_ABT)[1]["train_loss"])

    first = loss(1, 0, windows_2BT)
    assert first == loss(1, 0, windows_2BT)
    assert abs(first - loss(1, 1, windows_2BT)) > 1e-3
    assert abs(first - loss(2, 0, windows_2BT)) > 1e-3
    # Were both micro-steps keyed alike, the order of their windows would not matter.
    assert abs(first - loss(1, 0, windows_2BT[::-1])) > 1e-3


def test_bfloat16_is_close_to_float32(scramble):
    params, tokens_BT = scramble(TINY), tokens_of(TINY, batch=8)
    exact = np.asarray(logits_of(TINY, params, tokens_BT))
    rough = logits_of(replace(TINY, dtype="bfloat16"), params, tokens_BT)
    assert rough.dtype == jnp.float32
    error = np.asarray(rough) - exact
    # Bfloat16 rounds by 2^-9 = 0.2% (half a unit in the last of 8 bits); some ten roundings in a row, at random, are
    # 0.6% of the logits' size, and the largest of 8,000 errors is about five times that.
    assert 1e-4 < error.std() / exact.std() < 0.015
    assert np.abs(error).max() / exact.std() < 0.075


def test_layer_norms_have_gpt2s_epsilon(scramble):
    config = replace(TINY, n_layer=1)
    # Activations so small that their variance is near 1e-5: epsilon 1e-6 would make outputs up to three times larger.
    params = scramble(config)
    small = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf if "norm" in str(path) else leaf * (0.01 if len(path) == 1 else 1e-3), params
    )
    calls = record(nn.LayerNorm, config, small, tokens_of(config))
    assert len(calls) == 3
    for path, [(x, y)] in calls.items():
        name = path.split("/")[-1]
        norm = params["final_norm"] if name == "final_norm" else jax.tree.map(lambda p: p[0], params["layers"][name])
        scale, bias = np.asarray(norm["scale"]), np.asarray(norm["bias"])
        variance = x.var(axis=-1, keepdims=True)
        assert variance.min() > 1e-6 and variance.max() < 1e-4
        expected = (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(variance + 1e-5) * scale + bias
        # Float32, and Flax's variance is E[x²] - E[x]²: about 1e-6 of outputs of order 1.
        np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5, err_msg=path)


LLAMA = {"norm": "rmsnorm", "position": "rope", "activation": "swiglu", "n_kv_head": 1}


MODERN = LLAMA | {"head_dim": 12, "window": 5, "nope_interval": 2, "qk_norm": True, "qk_norm_scale": True}


@pytest.mark.parametrize(
    "variant", [{}, MODERN, *(pytest.param(each, marks=pytest.mark.slow) for each in (LLAMA, SPEEDRUN))]
)
def test_layers_in_a_loop_are_the_layers_unrolled(scramble, variant):
    config = replace(TINY, **variant)
    params, tokens_BT = scramble(config), tokens_of(config)
    unrolled = replace(config, layers="unrolled")
    looped = logits_of(replace(config, layers="looped"), params, tokens_BT)
    # The same sums, which XLA may fuse in another way, for logits of order 1.
    np.testing.assert_allclose(looped, logits_of(unrolled, params, tokens_BT), rtol=0, atol=1e-5)
    drawn = [jax.jit(GPT(each).init)(jax.random.key(3), tokens_BT[:, :1])["params"] for each in (config, unrolled)]
    jax.tree.map(np.testing.assert_array_equal, *drawn)


def test_rope_sees_distances_alone():
    config = replace(TINY, position="rope", block_size=40)
    q, k = jnp.asarray(np.random.default_rng(0).standard_normal((2, 1, 1, 1, config.head_width)), jnp.float32)

    def score(query, key):
        turned = [rotate(x, rope_angles(config, jnp.array([[place]]))) for x, place in ((q, query), (k, key))]
        return float(jnp.sum(turned[0] * turned[1]))

    assert abs(score(7, 3) - score(29, 25)) < 1e-4 < abs(score(7, 3) - score(7, 4))
    assert np.isclose(np.linalg.norm(rotate(q, rope_angles(config, jnp.array([[31]])))), np.linalg.norm(q), rtol=1e-5)


@pytest.mark.parametrize(
    ("remat", "layers", "fields"),
    [
        ("dots", "looped", {}),
        pytest.param("full", "looped", {"position": "rope", "nope_interval": 2}, marks=pytest.mark.slow),
        pytest.param("full", "looped", SPEEDRUN, marks=pytest.mark.slow),
        pytest.param("full", "looped", {}, marks=pytest.mark.slow),
        pytest.param("dots", "looped", SPEEDRUN, marks=pytest.mark.slow),
        pytest.param("dots", "unrolled", {}, marks=pytest.mark.slow),
        pytest.param("full", "unrolled", {}, marks=pytest.mark.slow),
    ],
)
def test_computing_again_changes_no_gradient_and_holds_less(scramble, remat, layers, fields, assert_trees_close):
    config = replace(TINY, n_layer=3, layers=layers, dropout=0.1, block_size=32, **fields)
    params, windows_BW, key = scramble(config), tokens_of(config, batch=8, length=33), jax.random.key(0)

    def compiled(config):
        loss = jax.grad(lambda params: loss_sum(GPT(config), params, windows_BW, {"dropout": key})[0])
        return jax.jit(loss).lower(params).compile()

    plain, again = compiled(config), compiled(replace(config, remat=remat))
    assert_trees_close(again(params), plain(params), rtol=0, atol=2e-3)  # sums over 256 places of order 1 each
    held = [program.memory_analysis().temp_size_in_bytes for program in (again, plain)]
    assert held[0] < 0.9 * held[1] or layers == "unrolled", held
