"""LoRA: it begins as nothing, it alone is trained, on any mesh, and merged it is a plain model."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.checkpoint import Checkpoints
from gptjax.config import LINEAR_LAYERS, Config, MeshConfig, ModelConfig, OptimizerConfig, TrainConfig
from gptjax.errors import UserError
from gptjax.export import main
from gptjax.hub.families import draw_params, path_of
from gptjax.hub.init_from import open_pretrained
from gptjax.hub.weights import merge_lora
from gptjax.inference.language_model import LanguageModel
from gptjax.inference.sampling import Sampling
from gptjax.model import GPT
from gptjax.optimizer import freeze
from gptjax.planning.hlo_cost import Program
from gptjax.resolve import resolve
from gptjax.sharding import make_mesh, one_device, with_shardings
from gptjax.tokenizer import Tokenizer
from gptjax.training import compile_steps, loss_sum, trace_train_step

ALPHABET = "abcdefghijkl "
# lora_alpha is there too, though nothing reads it, so that merged models are compiled no second time.
PLAIN = ModelConfig(
    vocab_size=len(ALPHABET),
    block_size=16,
    n_layer=1,
    n_head=2,
    n_embd=16,
    bias=True,
    lora_alpha=5.0,
    dtype="float32",
)
LLAMA = replace(
    PLAIN, n_layer=2, norm="rmsnorm", position="rope", activation="swiglu", n_head=4, n_kv_head=2, bias=False
)
SPEEDRUN = replace(
    PLAIN,
    norm="nonparametric_rmsnorm",
    position="rope",
    activation="relu2",
    qk_norm=True,
    embedding_norm=True,
    logit_cap=2.0,
    tied_head=False,
    bias=False,
)
MODELS = {"gpt2": PLAIN, "llama": LLAMA, "speedrun": SPEEDRUN}
RANK, SEED = {"lora_rank": 3}, 7
CONFIG = Config(
    model=replace(PLAIN, **RANK),
    optimizer=OptimizerConfig(learning_rate=0.01, warmup_steps=0, grad_clip=0.0),
    train=TrainConfig(max_steps=3, batch_size=8),
    mesh=MeshConfig(data=1),
)


@pytest.fixture(scope="module", autouse=True)
def compile_quickly():
    """Half of this file's time would be XLA's optimizations."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def leaves_of(tree):
    return {path_of(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def is_lora(path):
    return path.rpartition("/")[2] in ("lora_a", "lora_b")


def batch(step, n=8):
    return np.random.default_rng(step).integers(0, len(ALPHABET), (1, n, 17), np.int32)


drawn = jax.jit(draw_params, static_argnums=(0, 1))


@partial(jax.jit, static_argnums=0)
def logits_of(config, params, tokens_BT):
    return GPT(config).apply({"params": params}, tokens_BT)


def with_updates(config, plain, seed=0):
    """The same weights with LoRA's, of which none is zero."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: draw_params(config, 0))

    def leaf(path, shape):
        known = leaves.get(path_of(path))
        return jnp.asarray(rng.normal(0, 0.3, shape.shape) if known is None else known, jnp.float32)

    leaves = leaves_of(plain)
    return jax.tree_util.tree_map_with_path(leaf, shapes)


def test_it_is_drawn_as_nothing():
    """lora_b is zero and lora_a is not."""
    for path, leaf in leaves_of(drawn(CONFIG.model, SEED)).items():
        if is_lora(path):
            assert np.all(leaf == 0) if path.endswith("lora_b") else np.all(leaf.std(axis=(1, 2)) > 0.05)


@pytest.mark.parametrize("name", MODELS)
def test_at_its_beginning_it_changes_no_logit(scramble, name):
    """Bit for bit, for what is added are zeros."""
    config, plain = replace(MODELS[name], **RANK), scramble(MODELS[name])
    moved = with_updates(config, plain)
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: 0 * leaf if path_of(path).endswith("lora_b") else leaf, moved
    )
    tokens_BT = batch(0)[0, :, :-1]
    logits_BTV = logits_of(config, params, tokens_BT)
    np.testing.assert_array_equal(logits_BTV, logits_of(MODELS[name], plain, tokens_BT))
    assert np.abs(logits_of(config, moved, tokens_BT) - logits_BTV).max() > 0.1


@pytest.mark.parametrize("name", MODELS)
def test_merged_it_is_a_plain_model_with_the_same_logits(scramble, name):
    config = replace(MODELS[name], **RANK)
    params = with_updates(config, scramble(MODELS[name]))
    merged_config, merged = merge_lora(config, params)
    assert (merged_config.lora_rank, replace(merged_config, **RANK)) == (0, config)
    shapes = jax.eval_shape(lambda: draw_params(MODELS[name], 0))
    assert jax.tree.structure(merged) == jax.tree.structure(shapes)
    jax.tree.map(
        lambda leaf, shape: np.testing.assert_equal((leaf.shape, leaf.dtype), (shape.shape, shape.dtype)),
        merged,
        shapes,
    )
    tokens_BT = batch(0)[0, :, :-1]
    # The same products in another order, for logits of order 1.
    np.testing.assert_allclose(
        logits_of(merged_config, merged, tokens_BT), logits_of(config, params, tokens_BT), rtol=0, atol=1e-5
    )
    before, after = leaves_of(params), leaves_of(merged)
    for path in after:
        assert np.array_equal(before[path], after[path]) == (not path.endswith("kernel")), path
    assert merge_lora(merged_config, merged) == (merged_config, merged)


@pytest.fixture(scope="module")
def start(scramble):
    return with_updates(CONFIG.model, scramble(PLAIN))


def as_they_are(params):
    return params


@partial(jax.jit, static_argnums=(0, 1))
def gradient(config, prepare, params):
    """Of the first batch's mean loss."""
    windows_BW = jnp.asarray(batch(0)[0])
    return jax.grad(lambda params: loss_sum(GPT(config), prepare(params), windows_BW)[0] / 128)(params)


def test_its_gradients_are_those_of_the_plain_model(start):
    """With dL/dW of the merged kernels W + s A B, the chain rule gives s dL/dW B' for A, and s A' dL/dW for B.

    Then, the same without freezing; and with it all other gradients are zero.
    """
    config, params = CONFIG.model, start
    scale = config.lora_alpha / config.lora_rank
    frozen, whole = leaves_of(gradient(config, freeze, params)), leaves_of(gradient(config, as_they_are, params))
    merged_config, merged = merge_lora(config, params)
    plain, leaves = leaves_of(gradient(merged_config, as_they_are, merged)), leaves_of(params)
    for path, gradients in frozen.items():
        if not is_lora(path):
            assert not gradients.any() and whole[path].any(), path
            continue
        # Sums of 128 tokens' float32 gradients in other orders, of order 0.01 to 0.1.
        np.testing.assert_allclose(gradients, whole[path], rtol=0, atol=1e-6, err_msg=path)
        layer = path.rpartition("/")[0]
        a_LDR, b_LRF = leaves[f"{layer}/lora_a"], leaves[f"{layer}/lora_b"]
        gradient_LDF = plain[f"{layer}/kernel"].reshape(*a_LDR.shape[:2], -1)
        b_LRF = b_LRF.reshape(*b_LRF.shape[:2], -1)
        if path.endswith("lora_a"):
            expected = np.einsum("ldf,lrf->ldr", gradient_LDF, b_LRF)
        else:
            expected = np.einsum("ldr,ldf->lrf", a_LDR, gradient_LDF)
        assert np.abs(gradients).max() > 1e-3
        np.testing.assert_allclose(gradients.reshape(expected.shape), scale * expected, rtol=0, atol=1e-6, err_msg=path)


@pytest.fixture(scope="module")
def trained(start):
    """Mesh -> its steps, the state after three of them, and each step's metrics."""
    results = {}
    for mesh in (CONFIG.mesh, MeshConfig(data=2, fsdp=2, tensor=2)):
        config = replace(CONFIG, mesh=mesh)
        steps = compile_steps(config, make_mesh(mesh, 8))
        copies = jax.tree.map(
            lambda leaf, like: jax.device_put(np.array(leaf), like.sharding), start, steps.state.params
        )
        state, metrics = steps.start(copies), []
        for step in range(3):
            state, values = steps.train(state, jnp.asarray(batch(step)))
            metrics.append(jax.device_get(values))
        results[mesh] = steps, state, metrics
    return results


def test_only_its_parameters_change_and_alike_on_every_mesh(trained, start):
    before, afters = leaves_of(start), [leaves_of(state.params) for _, state, _ in trained.values()]
    for after in afters:
        for path in before:
            if is_lora(path):
                assert (after[path] != before[path]).mean() > 0.99, path
            else:
                np.testing.assert_array_equal(after[path], before[path], err_msg=path)
    for path in before:
        # Adam divides by the gradient's size, so rounding moves small ones; three steps of 0.01 measured 1e-5.
        np.testing.assert_allclose(*(after[path] for after in afters), rtol=0, atol=3e-4, err_msg=path)
    losses = [[values["train_loss"] for values in metrics] for _, _, metrics in trained.values()]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    [(_, state, _), (_, on_8, _)] = trained.values()
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(on_8)} == {8}
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(state)} == {1}


def test_the_gradients_norm_is_its_own_alone(trained, start):
    gradients = leaves_of(gradient(CONFIG.model, as_they_are, start))
    own = [leaf for path, leaf in gradients.items() if is_lora(path)]
    norm = np.sqrt(sum(np.square(leaf).sum() for leaf in own))
    for _, _, metrics in trained.values():
        np.testing.assert_allclose(metrics[0]["grad_norm"], norm, rtol=1e-5)


def test_the_others_gradients_are_not_summed_over_devices():
    config = replace(CONFIG, mesh=MeshConfig(data=2))
    state, traced = trace_train_step(config, make_mesh(config.mesh, 8))
    moved = sum(each.nbytes * each.times for each in Program(traced.lower().compile().as_text(), 2).collectives())
    paths = jax.tree_util.tree_leaves_with_path(state.params)
    own = 4 * sum(leaf.size for path, leaf in paths if "lora_" in path[-1].key)
    assert own <= moved < own + 64  # and the loss, with the gradient's norm as far as it is summed in parts


def test_the_optimizer_remembers_nothing_of_the_others(trained):
    for _, state, _ in trained.values():
        moments = {path: leaf for path, leaf in leaves_of(state.opt_state).items() if leaf.ndim}
        own = {path: leaf for path, leaf in leaves_of(state.params).items() if is_lora(path)}
        for name in ("mu", "nu"):
            of_name = {path.partition(f"/{name}/")[2]: leaf for path, leaf in moments.items() if f"/{name}/" in path}
            assert of_name.keys() == own.keys()
            assert all(of_name[path].shape == own[path].shape and of_name[path].any() for path in own)
        assert len(moments) == 2 * len(own)


def test_a_checkpoint_goes_on_bit_for_bit(trained, tmp_path):
    steps, state, _ = trained[CONFIG.mesh]
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(3, {}, params=state.params, opt_state=state.opt_state)
    checkpoints.wait()
    trees, _ = checkpoints.restore(params=steps.state.params, opt_state=steps.state.opt_state)
    checkpoints.close()
    again = state._replace(step=jnp.array(state.step), **trees)
    jax.tree.map(np.testing.assert_array_equal, again, state)
    copy = jax.tree.map(jnp.array, state)
    nexts = [steps.train(each, jnp.asarray(batch(3))) for each in (copy, again)]
    jax.tree.map(np.testing.assert_array_equal, *nexts)


@pytest.mark.parametrize(
    ("name", "layers"),
    [("gpt2", "query"), ("gpt2", ",".join(LINEAR_LAYERS)), ("llama", "out,down,gate"), ("llama", "up,key,value")],
)
def test_only_the_layers_that_are_named_have_it(name, layers):
    plain, config = MODELS[name], replace(MODELS[name], **RANK, lora_layers=layers)
    shapes = {path: leaf.shape for path, leaf in _shapes(config).items()}
    own = [path for path in shapes if is_lora(path)]
    present = {path.split("/")[-2] for path in shapes if path.endswith("kernel")}
    assert {path.split("/")[-2] for path in own} == set(layers.split(",")) & present
    assert {path: shape for path, shape in shapes.items() if path not in own} == {
        path: leaf.shape for path, leaf in _shapes(plain).items()
    }
    for path in own:
        kernel = shapes[path.rpartition("/")[0] + "/kernel"]
        n_in = plain.mlp_features if "/down/" in path else plain.n_embd
        assert (
            shapes[path][:3] == (plain.n_layer, n_in, 3)
            if path.endswith("lora_a")
            else shapes[path][:2] == (plain.n_layer, 3)
        )
        assert path.endswith("lora_a") or n_in * np.prod(shapes[path][2:]) == np.prod(kernel[1:])


@cache
def _shapes(config):
    tree = jax.eval_shape(lambda: draw_params(config, 0))
    return {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def test_layers_that_do_not_exist_are_refused():
    for layers in ("", "query,", "attention", "query;up", "head"):
        with pytest.raises(UserError, match="model.lora_layers=.* is not a list of linear layers"):
            replace(PLAIN, **RANK, lora_layers=layers)


@pytest.fixture(scope="module")
def run(trained, tmp_path_factory):
    """The folder of a run with LoRA."""
    folder = tmp_path_factory.mktemp("run")
    _, state, _ = trained[CONFIG.mesh]
    checkpoints = Checkpoints(folder / "checkpoints" / "best")
    checkpoints.save(3, {}, params=state.params)
    checkpoints.close()
    (folder / "config.json").write_text(CONFIG.to_json())
    Tokenizer.characters(ALPHABET).save(folder / "tokenizer.json")
    return folder


def test_a_run_with_it_talks_exports_and_starts_other_runs(run, trained, tmp_path):
    _, state, _ = trained[CONFIG.mesh]
    tokens_BT = batch(5)[0, :, :-1]
    logits_BTV = logits_of(CONFIG.model, state.params, tokens_BT)
    main([str(run), str(tmp_path / "exported")])
    for folder in (run, tmp_path / "exported"):
        model = LanguageModel.load(str(folder))
        assert replace(model.config, lora_alpha=PLAIN.lora_alpha) == resolve(PLAIN, "cpu", training=False)
        assert model.n_params == sum(leaf.size for leaf in _shapes(PLAIN).values())
        # As merged above.
        np.testing.assert_allclose(logits_of(PLAIN, model.params, tokens_BT), logits_BTV, rtol=0, atol=1e-5)
    origin = open_pretrained(str(run))
    assert origin.config == PLAIN
    for config in (PLAIN, CONFIG.model):
        abstract = with_shardings(one_device(), jax.eval_shape(lambda config=config: draw_params(config, 0)))
        params = origin.load(config, abstract, SEED)
        np.testing.assert_allclose(logits_of(config, params, tokens_BT), logits_BTV, rtol=0, atol=1e-5)
    new, old = leaves_of(params), leaves_of(drawn(CONFIG.model, SEED))
    assert all(np.array_equal(new[path], old[path]) for path in new if is_lora(path))  # drawn anew, from that seed


def test_a_run_with_it_writes_what_the_whole_model_would(run, trained):
    model, ids = LanguageModel.load(str(run)), Tokenizer.characters(ALPHABET).encode("abc")
    *_, [answer] = model.answer([ids], 10, Sampling(temperature=0.0), [0])
    while len(ids) < 13:
        padded = np.zeros((8, 16), np.int32)
        padded[0, : len(ids)] = ids
        logits_V = logits_of(CONFIG.model, trained[CONFIG.mesh][1].params, padded)[0, len(ids) - 1]
        ids = np.append(ids, np.argmax(logits_V)).astype(np.int32)
    assert answer.text == model.tokenizer.decode(ids[3:])
