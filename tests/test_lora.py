"""LoRA: it starts without effect, it alone is trained, on any mesh, and merged it is a plain model."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.checkpoint import Checkpoints
from gptjax.config import Config, MeshConfig, ModelConfig, OptimizerConfig, TrainConfig
from gptjax.errors import UserError
from gptjax.hub.init_from import open_pretrained
from gptjax.hub.weights import merge_lora
from gptjax.inference.language_model import LanguageModel
from gptjax.model import GPT, init_params, param_shapes
from gptjax.optimizer import freeze
from gptjax.sharding import by_path, make_mesh, one_device, with_shardings
from gptjax.tokenizer import Tokenizer
from gptjax.training import compile_steps, loss_sum

ALPHABET = "abcdefghijkl "
# lora_alpha is there too, though nothing reads it, so that merged models are compiled no second time.
PLAIN = ModelConfig(
    vocab_size=13, block_size=16, n_layer=1, n_head=2, n_embd=16, bias=True, lora_alpha=5.0, dtype="float32"
)
# Grouped-query attention, and a MLP with a gate, in more than one layer.
LLAMA = replace(
    PLAIN, n_layer=2, norm="rmsnorm", position="rope", activation="swiglu", n_head=4, n_kv_head=2, bias=False
)
MODELS = {"gpt2": PLAIN, "llama": LLAMA}
RANK = {"lora_rank": 3}
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
    return {path: np.asarray(leaf) for path, leaf in by_path(tree).items()}


def is_lora(path):
    return path.endswith(("lora_a", "lora_b"))


def batch(step):
    return np.random.default_rng(step).integers(0, len(ALPHABET), (1, 8, 17), np.int32)


TOKENS_BT = batch(0)[0, :, :-1]


@partial(jax.jit, static_argnums=0)
def logits_of(config, params):
    return GPT(config).apply({"params": params}, jnp.asarray(TOKENS_BT))


def test_the_layers_that_are_named_have_it_and_b_is_drawn_as_zero():
    """lora_b is zero and lora_a is not, so that nothing changes at first and there is a gradient."""
    for layers in ("query", "query,key,value,out,up,gate,down"):
        config = replace(LLAMA, **RANK, lora_layers=layers)
        paths = by_path(param_shapes(config))
        assert {path.split("/")[-2] for path in paths if is_lora(path)} == set(layers.split(","))
    for path, leaf in leaves_of(jax.jit(lambda: init_params(CONFIG.model, 7))()).items():
        assert not path.endswith("lora_a") or np.all(leaf.std(axis=(1, 2)) > 0.05)
        assert not path.endswith("lora_b") or not leaf.any()
    for layers in ("", "query,", "attention", "query;up", "head"):
        with pytest.raises(UserError, match="model.lora_layers=.* is not a list of linear layers"):
            replace(PLAIN, **RANK, lora_layers=layers)


@pytest.mark.parametrize("name", MODELS)
def test_with_b_zero_it_changes_no_logit_and_merged_it_is_a_plain_model(name, scramble):
    config = replace(MODELS[name], **RANK)
    params = scramble(config)
    merged_config, merged = merge_lora(config, params)
    assert merged_config == MODELS[name] and merge_lora(merged_config, merged) == (merged_config, merged)
    before, after = leaves_of(params), leaves_of(merged)
    shapes = by_path(param_shapes(MODELS[name]))
    assert {path: leaf.shape for path, leaf in after.items()} == {path: leaf.shape for path, leaf in shapes.items()}
    for path in after:
        assert np.array_equal(before[path], after[path]) == (not path.endswith("kernel")), path
    # The same products in another order, for logits of order 1.
    np.testing.assert_allclose(logits_of(merged_config, merged), logits_of(config, params), rtol=0, atol=1e-5)
    without = jax.tree_util.tree_map_with_path(lambda path, a: 0 * a if path[-1].key == "lora_b" else a, params)
    plain = merge_lora(config, without)[1]
    np.testing.assert_array_equal(logits_of(config, without), logits_of(merged_config, plain))
    assert np.abs(logits_of(config, without) - logits_of(config, params)).max() > 0.1


@pytest.fixture(scope="module")
def start(scramble):
    return scramble(CONFIG.model)


@partial(jax.jit, static_argnums=(0, 1))
def gradient(config, prepare, params):
    """Of the first batch's mean loss."""
    windows_BW = jnp.asarray(batch(0)[0])
    return jax.grad(lambda params: loss_sum(GPT(config), prepare(params), windows_BW)[0] / 128)(params)


def as_they_are(params):
    return params


@pytest.fixture(scope="module")
def gradients(start):
    """Of all parameters by their paths, with none frozen."""
    return leaves_of(gradient(CONFIG.model, as_they_are, start))


def test_its_gradients_are_those_of_the_plain_model(start, gradients):
    """With dL/dW of the merged kernels W + s A B, the chain rule gives s dL/dW B' for A, and s A' dL/dW for B.

    With freezing they are the same, and all other gradients are zero.
    """
    scale, leaves = CONFIG.model.lora_alpha / CONFIG.model.lora_rank, leaves_of(start)
    plain = leaves_of(gradient(PLAIN, as_they_are, merge_lora(CONFIG.model, start)[1]))
    for path, frozen in leaves_of(gradient(CONFIG.model, freeze, start)).items():
        if not is_lora(path):
            assert not frozen.any() and gradients[path].any(), path
            continue
        # Sums of 128 tokens' float32 gradients in other orders, of order 0.01 to 0.1.
        np.testing.assert_allclose(frozen, gradients[path], rtol=0, atol=1e-6, err_msg=path)
        layer = path.rpartition("/")[0]
        a_LDR, b_LRF = leaves[f"{layer}/lora_a"], leaves[f"{layer}/lora_b"]
        gradient_LDF = plain[f"{layer}/kernel"].reshape(*a_LDR.shape[:2], -1)
        b_LRF = b_LRF.reshape(*b_LRF.shape[:2], -1)
        if path.endswith("lora_a"):
            expected = np.einsum("ldf,lrf->ldr", gradient_LDF, b_LRF)
        else:
            expected = np.einsum("ldr,ldf->lrf", a_LDR, gradient_LDF)
        assert np.abs(frozen).max() > 1e-3
        np.testing.assert_allclose(frozen.reshape(expected.shape), scale * expected, rtol=0, atol=1e-6, err_msg=path)


@pytest.fixture(scope="module")
def trained(start):
    """On one device, and on eight: the compiled steps, the state after three of them, and each step's metrics."""
    results = []
    for mesh in (CONFIG.mesh, MeshConfig(data=2, fsdp=2, tensor=2)):
        steps = compile_steps(replace(CONFIG, mesh=mesh), make_mesh(mesh, 8))
        on_mesh = jax.tree.map(lambda a, like: jax.device_put(np.array(a), like.sharding), start, steps.state.params)
        state, metrics = steps.start(on_mesh), []
        for step in range(3):
            state, values = steps.train(state, jnp.asarray(batch(step)))
            metrics.append(jax.device_get(values))
        results.append((steps, state, metrics))
    return results


def test_it_alone_is_trained_and_alike_on_every_mesh(trained, start, gradients):
    [(_, one, metrics), (_, eight, metrics_8)] = trained
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(eight)} == {8}
    before, after, after_8 = leaves_of(start), leaves_of(one.params), leaves_of(eight.params)
    for path, leaf in before.items():
        if is_lora(path):
            assert (after[path] != leaf).mean() > 0.99, path
        else:
            np.testing.assert_array_equal(after[path], leaf, err_msg=path)
        # Adam divides by the gradient's size, so rounding moves small ones; three steps of 0.01 measured 1e-5.
        np.testing.assert_allclose(after[path], after_8[path], rtol=0, atol=3e-4, err_msg=path)
    for step, step_8 in zip(metrics, metrics_8, strict=True):
        np.testing.assert_allclose(step["train_loss"], step_8["train_loss"], rtol=1e-5)
    norm = np.sqrt(sum(np.square(leaf).sum() for path, leaf in gradients.items() if is_lora(path)))
    for values in (metrics[0], metrics_8[0]):
        np.testing.assert_allclose(values["grad_norm"], norm, rtol=1e-5)
    moments = {path: leaf for path, leaf in leaves_of(one.opt_state).items() if leaf.ndim}
    own = {path: leaf.shape for path, leaf in before.items() if is_lora(path)}
    for name in ("mu", "nu"):  # AdamW's, of nothing else
        found = {path.partition(f"/{name}/")[2]: leaf for path, leaf in moments.items() if f"/{name}/" in path}
        assert {path: leaf.shape for path, leaf in found.items()} == own and all(leaf.any() for leaf in found.values())
    assert len(moments) == 2 * len(own)


def test_a_checkpoint_resumes_bit_for_bit(trained, tmp_path):
    steps, state, _ = trained[0]
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(3, {}, params=state.params, opt_state=state.opt_state)
    checkpoints.wait()
    trees, _ = checkpoints.restore(params=steps.state.params, opt_state=steps.state.opt_state)
    checkpoints.close()
    copies = jax.tree.map(jnp.array, state), state._replace(step=jnp.array(state.step), **trees)
    jax.tree.map(np.testing.assert_array_equal, *(steps.train(copy, jnp.asarray(batch(3))) for copy in copies))


def test_a_run_with_it_is_loaded_and_starts_other_runs(trained, tmp_path):
    state = trained[0][1]
    checkpoints = Checkpoints(tmp_path / "checkpoints" / "best")
    checkpoints.save(3, {}, params=state.params)
    checkpoints.close()
    (tmp_path / "config.json").write_text(CONFIG.to_json())
    Tokenizer.characters(ALPHABET).save(tmp_path / "tokenizer.json")
    expected_BTV, model = logits_of(CONFIG.model, state.params), LanguageModel.load(str(tmp_path))
    assert model.config.lora_rank == 0 and model.n_params == sum(leaf.size for leaf in by_path(model.params).values())
    np.testing.assert_allclose(logits_of(PLAIN, model.params), expected_BTV, rtol=0, atol=1e-5)
    weights = open_pretrained(str(tmp_path))
    assert weights.config == PLAIN
    abstract = with_shardings(one_device(), param_shapes(CONFIG.model))
    params = weights.load(CONFIG.model, abstract, 7)
    np.testing.assert_allclose(logits_of(CONFIG.model, params), expected_BTV, rtol=0, atol=1e-5)
    assert not any(leaf.any() for path, leaf in leaves_of(params).items() if path.endswith("lora_b"))  # drawn anew
