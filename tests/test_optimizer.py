"""Schedules and Muon, against plain forms of them: AdamW itself is compared with PyTorch's in parity/test_parity.py."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gptjax.config import OptimizerConfig
from gptjax.optimizer import make_optimizer, make_schedule

L, D, N, H, F, STEPS = 2, 6, 2, 3, 10, 6
MUON = OptimizerConfig(
    learning_rate=0.01,
    min_learning_rate=0.002,
    schedule="linear",
    warmup_steps=2,
    decay_fraction=0.5,
    weight_decay=0.1,
    grad_clip=1.5,
    matrix_optimizer="muon",
    muon_learning_rate=0.05,
    muon_weight_decay=0.2,
)
# Kernels and the axes of theirs that are a matrix's inputs: the rest but the layer are its outputs.
KERNELS = {
    "attention/query": ((L, D, N, H), D),
    "attention/key": ((L, D, 1, H), D),
    "attention/out": ((L, N, H, D), N * H),
    "mlp/up": ((L, D, F), D),
    "mlp/down": ((L, F, D), F),
}


@pytest.fixture(scope="module", autouse=True)
def compile_quickly():
    """Most of this file's time would be XLA's optimizations."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def draw(seed):
    """A tree of the model's shape: numbers of a gradient, or of parameters."""
    rng = np.random.default_rng(seed)
    layers = {"attention": {}, "mlp": {}, "mlp_norm": {"scale": rng.standard_normal((L, D))}}
    for path, (shape, _) in KERNELS.items():
        part, name = path.split("/")
        layers[part][name] = {"kernel": rng.standard_normal(shape)}
    layers["mlp"]["up"]["bias"] = rng.standard_normal((L, F))
    tree = {"token_embedding": rng.standard_normal((7, D)), "head": rng.standard_normal((7, D)), "layers": layers}
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def trained(config, gradients):
    optimizer, params = make_optimizer(config, STEPS), draw(0)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params


def rate(peak, floor, step):
    """Two steps of warm-up, constant to half of the six steps, a line down."""
    return [peak / 3, peak * 2 / 3, peak, peak, peak - (peak - floor) / 3, peak - (peak - floor) * 2 / 3][step]


def orthogonalized(matrix):
    x = matrix / np.linalg.norm(matrix)
    for _ in range(5):
        product = x @ x.T
        x = 3.4445 * x + (-4.7750 * product + 2.0315 * product @ product) @ x
    return x


def test_muon_is_the_plain_algorithm_on_each_matrix_of_each_layer():
    gradients = [draw(seed) for seed in range(1, 1 + STEPS)]
    actual, start = trained(MUON, gradients), draw(0)
    norms = [np.sqrt(sum(np.square(x).sum() for x in jax.tree.leaves(g))) for g in gradients]
    assert min(norms) > MUON.grad_clip
    for path, (_, n_in) in KERNELS.items():
        part, name = path.split("/")
        for layer in range(L):
            x = np.asarray(start["layers"][part][name]["kernel"][layer], np.float64).reshape(n_in, -1)
            momentum, before = np.zeros_like(x), x
            for step, gradient in enumerate(gradients):
                g = np.asarray(gradient["layers"][part][name]["kernel"][layer], np.float64).reshape(n_in, -1)
                g = g * MUON.grad_clip / norms[step]
                momentum = 0.95 * momentum + 0.05 * g
                mixed = 0.95 * momentum / (1 - 0.95 ** (step + 2)) + 0.05 * g / (1 - 0.95 ** (step + 1))
                scale = np.sqrt(max(1, x.shape[1] / n_in))
                # The floor is to Muon's peak what AdamW's is to its own.
                x = x - rate(0.05, 0.01, step) * (scale * orthogonalized(mixed) + 0.2 * x)
            # Newton-Schulz takes rounding of 1e-7 along small singular values up to 3.4 ** 5 times: 1e-4 of a step.
            ours = np.asarray(actual["layers"][part][name]["kernel"][layer]).reshape(n_in, -1)
            np.testing.assert_allclose(ours, x, rtol=0, atol=1e-5, err_msg=f"{path} {layer}")
            assert np.abs(x - before).max() > 0.05


def test_beside_muon_all_else_follows_adamw():
    gradients = [draw(seed) for seed in range(1, 4)]
    adamw = OptimizerConfig(**vars(MUON) | {"matrix_optimizer": "adamw"})
    ours, theirs = [jax.tree_util.tree_leaves_with_path(trained(config, gradients)) for config in (MUON, adamw)]
    for (path, leaf), (_, other) in zip(ours, theirs, strict=True):
        assert np.array_equal(leaf, other) == (path[-1].key != "kernel"), path


def test_muon_is_that_of_pytorch():
    """Scale, coefficients, decay: with one and the same gradient, for PyTorch's momentum starts without correction."""
    torch = pytest.importorskip("torch")
    config = OptimizerConfig(**vars(MUON) | {"grad_clip": 0.0, "schedule": "cosine", "warmup_steps": 0})
    gradient = draw(1)
    actual, start = trained(config, 2 * [gradient]), draw(0)
    for path, (_, n_in) in KERNELS.items():
        part, name = path.split("/")
        matrices = [np.array(tree["layers"][part][name]["kernel"][1]).reshape(n_in, -1).T for tree in (start, gradient)]
        weight = torch.nn.Parameter(torch.from_numpy(matrices[0].copy()))
        weight.grad = torch.from_numpy(matrices[1].copy())
        muon = torch.optim.Muon([weight], lr=0.05, weight_decay=0.2)
        for step in range(2):
            muon.param_groups[0]["lr"] = 5 * float(make_schedule(config, STEPS)(step))
            muon.step()
        moved = np.asarray(actual["layers"][part][name]["kernel"][1]).reshape(n_in, -1).T - matrices[0]
        theirs = weight.detach().numpy() - matrices[0]
        # PyTorch iterates in bfloat16, 8 bits: a few of a hundred after five rounds.
        assert np.linalg.norm(moved - theirs) < 0.05 * np.linalg.norm(theirs), path


def test_a_matrix_without_a_gradient_stays():
    config = OptimizerConfig(**vars(MUON) | {"muon_weight_decay": 0.0})
    before = draw(0)
    after = trained(config, [jax.tree.map(jnp.zeros_like, before)])
    jax.tree.map(np.testing.assert_array_equal, after["layers"]["attention"], before["layers"]["attention"])


@pytest.mark.parametrize(
    ("warmup_steps", "decay_fraction", "decay_steps"),
    [(0, 0.5, None), (0, 1.0, 12), (1, 0.2, None), (4, 0.5, 12), (14, 1.0, None), (20, 0.2, 12)],
)
def test_the_linear_schedule(warmup_steps, decay_fraction, decay_steps):
    config = OptimizerConfig(
        schedule="linear",
        learning_rate=0.5,
        min_learning_rate=0.1,
        warmup_steps=warmup_steps,
        decay_fraction=decay_fraction,
        decay_steps=decay_steps,
    )
    end = max(decay_steps or 15, warmup_steps + 1)
    start = max(round(end - end * decay_fraction), warmup_steps)
    expected = [0.5 * (step + 1) / (warmup_steps + 1) for step in range(warmup_steps)]
    expected += [0.5] * (start - warmup_steps)
    expected += [0.5 - 0.4 * i / (end - start) for i in range(end - start)] + [0.1] * 5
    schedule = jax.jit(make_schedule(config, 15))
    np.testing.assert_allclose([float(schedule(step)) for step in range(len(expected))], expected, rtol=1e-5)
