"""A speedrun's fields of the model compute what a plain PyTorch form of them does: logits, loss, every gradient."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import ModelConfig
from gptjax.model import GPT
from gptjax.training import loss_sum

torch = pytest.importorskip("torch", reason="the reference is PyTorch; pip install 'gptjax[test]' brings it")

ALL = ModelConfig(
    vocab_size=61,
    block_size=16,
    n_layer=2,
    n_head=4,
    n_kv_head=2,
    n_embd=24,
    activation="relu2",
    norm="nonparametric_rmsnorm",
    norm_eps=1e-3,
    position="rope",
    rope_theta=1000.0,
    qk_norm=True,
    embedding_norm=True,
    logit_cap=3.0,
    tied_head=False,
    dtype="float32",
)
SOME = replace(ALL, norm="rmsnorm", position="learned", qk_norm=False, embedding_norm=False)
CASES = {"all": ALL, "some": SOME}


def logits_of(config, params, tokens):
    """One row and one layer at a time."""

    def rms(x, weights=None):
        x = x / torch.sqrt(torch.mean(x**2, -1, keepdim=True) + config.norm_eps)
        return x if weights is None else x * weights

    def norm(x, tree, name, i=None):
        weights = tree[name]["scale"] if config.norm == "rmsnorm" else None
        return rms(x, weights if i is None or weights is None else weights[i])

    def turned(x):
        half = x.shape[-1] // 2
        frequencies = config.rope_theta ** (-torch.arange(half) / half)
        angles = torch.arange(len(x))[:, None, None] * frequencies
        pairs = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([pairs.real, pairs.imag], -1)

    rows, layers = [], params["layers"]
    for row in tokens:
        x = params["token_embedding"][row]
        if config.position == "learned":
            x = x + params["position_embedding"][: len(row)]
        x = rms(x) if config.embedding_norm else x
        for i in range(config.n_layer):
            attention, mlp = layers["attention"], layers["mlp"]
            y = norm(x, layers, "attention_norm", i)
            q, k, v = [torch.einsum("td,dnh->tnh", y, attention[n]["kernel"][i]) for n in ("query", "key", "value")]
            if config.qk_norm:
                q, k = rms(q), rms(k)
            if config.position == "rope":
                q, k = turned(q), turned(k)
            k, v = [torch.repeat_interleave(part, config.n_head // config.kv_heads, 1) for part in (k, v)]
            heads = torch.nn.functional.scaled_dot_product_attention(
                *(part.transpose(0, 1) for part in (q, k, v)), is_causal=True
            )
            x = x + torch.einsum("nth,nhd->td", heads, attention["out"]["kernel"][i])
            h = norm(x, layers, "mlp_norm", i) @ mlp["up"]["kernel"][i]
            x = x + torch.relu(h) ** 2 @ mlp["down"]["kernel"][i]
        logits = norm(x, params, "final_norm") @ params["head"].T
        rows.append(config.logit_cap * torch.tanh(logits / config.logit_cap))
    return torch.stack(rows)


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_logits_loss_and_every_gradient(config, scramble, assert_trees_close):
    params = scramble(config)
    windows = np.random.default_rng(1).integers(0, config.vocab_size, (3, 17), np.int32)
    theirs = jax.tree.map(lambda leaf: torch.tensor(np.array(leaf), requires_grad=True), params)
    logits = logits_of(config, theirs, torch.from_numpy(windows[:, :-1]).long())
    targets = torch.from_numpy(windows[:, 1:]).long().flatten()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets)
    loss.backward()

    @jax.jit
    def ours(params):
        def mean_loss(params):
            return loss_sum(GPT(config), params, jnp.asarray(windows))[0] / targets.numel()

        return GPT(config).apply({"params": params}, jnp.asarray(windows[:, :-1])), jax.value_and_grad(mean_loss)(
            params
        )

    our_logits, (our_loss, grads) = ours(params)
    # Float32 and logits of order 1, whose sums are in another order here; squares double what is rounded.
    assert logits.std() > 0.5
    np.testing.assert_allclose(our_logits, logits.detach().numpy(), rtol=0, atol=2e-5)
    np.testing.assert_allclose(our_loss, loss.item(), rtol=3e-6)
    assert_trees_close(grads, jax.tree.map(lambda leaf: leaf.grad.numpy(), theirs), rtol=1e-5, atol=2e-6)
    assert all(np.abs(leaf).max() > 2e-4 for leaf in jax.tree.leaves(grads))
