"""A GPU does what the CPU does: JAX_PLATFORMS=cuda,cpu pytest tests/test_gpu.py where there is one."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.attention import causal_attention, sequence_attention
from gptjax.config import Config, MeshConfig, ModelConfig, TrainConfig
from gptjax.inference.decoder import lay_out
from gptjax.inference.generate import generate
from gptjax.inference.sampling import Sampling
from gptjax.resolve import resolve
from gptjax.sharding import batch_sharding, make_mesh
from gptjax.training import compile_steps

pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu", reason="JAX has no GPU here, or was told to use none")

MODEL = ModelConfig(vocab_size=64, block_size=128, n_layer=2, n_head=2, n_embd=128)


@pytest.fixture(autouse=True)
def exact_products():
    """float32 products in float32, which a GPU otherwise rounds to 10 bits of mantissa."""
    with jax.default_matmul_precision("float32"):
        yield


def devices_of(platform: str):
    return jax.devices(platform)[:1]


@pytest.mark.skipif(resolve(MODEL, jax.devices()[0]).attention != "cudnn", reason="cuDNN has no kernel for this GPU")
@pytest.mark.parametrize("n_kv_head", [4, 2])
def test_cudnns_attention_is_causal_attention(n_kv_head):
    rng = np.random.default_rng(0)
    shapes = [(2, 256, heads, 64) for heads in (4, n_kv_head, n_kv_head, 4)]
    *qkv, direction_BTNH = [jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in shapes]

    def both(function):
        def along(*qkv):
            return jnp.sum(function(*qkv).astype(jnp.float32) * direction_BTNH.astype(jnp.float32))

        return jax.jit(jax.value_and_grad(along, (0, 1, 2)))

    expected = both(causal_attention)(*[x.astype(jnp.float32) for x in qkv])
    found = both(partial(sequence_attention, "cudnn"))(*qkv)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
        assert np.linalg.norm(ours - theirs) < 0.02 * np.linalg.norm(theirs)


@pytest.mark.parametrize(
    ("attention", "dtype", "rtol"),
    [("plain", "float32", 1e-4), ("blockwise", "float32", 1e-4), ("auto", "auto", 0.01)],
)
def test_steps_on_a_gpu_are_those_on_a_cpu(attention, dtype, rtol):
    train = TrainConfig(batch_size=8, accumulate=2, max_steps=5)
    windows_ABW = np.random.default_rng(0).integers(64, size=(2, 4, 129), dtype=np.int32)
    results = []
    for platform in ("cpu", "gpu"):
        model = replace(MODEL, attention=attention, dtype=dtype if platform == "gpu" else "float32")
        model = resolve(model, *devices_of(platform))
        mesh = make_mesh(MeshConfig(), 4, devices=devices_of(platform))
        steps = compile_steps(Config(model=model, train=train), mesh)
        state, losses = steps.init(), []
        for _ in range(5):
            state, metrics = steps.train(state, jax.device_put(windows_ABW, batch_sharding(mesh)))
            losses.append(float(metrics["train_loss"]))
        results.append(losses)
    assert results[0][-1] < results[0][0] - 0.01
    np.testing.assert_allclose(results[1], results[0], rtol=rtol)
    learned = [losses[0] - losses[-1] for losses in results]
    np.testing.assert_allclose(learned[1], learned[0], rtol=0.2)


@pytest.mark.parametrize("form", [lambda params: params, lay_out], ids=["stacked", "laid out"])
def test_a_gpu_generates_what_a_cpu_does(scramble, form):
    model = resolve(replace(MODEL, dtype="float32"), jax.devices()[0], training=False)
    params, prompts = form(scramble(model)), [np.arange(5, dtype=np.int32), np.arange(40, dtype=np.int32)]
    texts = []
    for platform in ("cpu", "gpu"):
        [device] = devices_of(platform)
        with jax.default_device(device):
            chunks = generate(model, jax.device_put(params, device), prompts, 60, Sampling(temperature=0.0), [0, 1])
            texts.append(np.hstack([np.asarray(chunk.tokens_BC) for chunk in chunks]))
    np.testing.assert_array_equal(*texts)
