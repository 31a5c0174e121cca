"""What the whole suite runs under: 8 virtual CPU devices, no silent rank promotion, annotations that are checked.

Warnings are errors too (pyproject.toml). On CPU never have two multi-device programs in flight: block on each result.
"""

import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Before jax reads them. Tests mostly compile, so they make do with slower programs. Processes that they start
# compile as a user's do, and read what another one compiled, but not from the user's cache.
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # also where there is a GPU: test_gpu.py says how it comes in
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # the first of pytest's processes; the others have it from that one
    CACHE = tempfile.TemporaryDirectory(prefix="gptjax-xla-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from gptjax.config import (  # above the hook: config.py checks its fields itself, and with better words
    Config,
    ModelConfig,
)

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jaxtyping.install_import_hook("gptjax", "beartype.beartype")

from gptjax.checkpoint import Checkpoints
from gptjax.model import GPT
from gptjax.sharding import one_device, with_shardings
from gptjax.training import init_state


def pytest_configure(config: pytest.Config) -> None:
    # Where pytest runs in the background Ctrl-C is ignored, and so it would be in what it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # tensorboardX imports torch where there is one, and then whoever looks at all objects (test_report.py, through gc)
    # meets an object of torch's that complains about being looked at.
    config.addinivalue_line("filterwarnings", "ignore:`torch.distributed.reduce_op` is deprecated:FutureWarning")


@pytest.fixture(scope="session")
def scramble() -> Callable[..., Any]:
    """Parameters drawn far from their initialization, where zero biases and unit scales would hide a mistake.

    Kernels keep the size of activations (std 1/sqrt of their inputs), all else varies by 0.3.
    """

    def draw(config: ModelConfig, seed: int = 0) -> Any:
        rng = np.random.default_rng(seed)

        def leaf(path: tuple[Any, ...], shape: jax.ShapeDtypeStruct) -> jax.Array:
            name, layer = path[-1].key, path[-2].key if len(path) > 1 else None
            n_in = {"down": config.mlp_features}.get(layer, config.n_embd)
            scale = n_in**-0.5 if name == "kernel" else 0.3
            return jnp.asarray((name == "scale") + scale * rng.standard_normal(shape.shape), jnp.float32)

        tokens = jnp.zeros((1, config.block_size), jnp.int32)
        shapes = jax.eval_shape(lambda: GPT(config).init(jax.random.key(0), tokens)["params"])
        return jax.tree_util.tree_map_with_path(leaf, shapes)

    return draw


@pytest.fixture(scope="session")
def compilations() -> Callable[[], Any]:
    """`with compilations() as names:` collects what XLA compiles inside, one entry per program."""

    @contextmanager
    def collect() -> Iterator[list[str]]:
        names: list[str] = []

        def listen(event: str, seconds: float, **details: Any) -> None:
            if event == "/jax/core/compile/backend_compile_duration":
                names.append(str(details.get("fun_name", event)))

        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            yield names
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)

    return collect


@pytest.fixture(scope="session")
def assert_trees_close() -> Callable[..., None]:
    """Compare two trees leaf by leaf and name the leaf that differs."""

    def check(actual: Any, expected: Any, *, rtol: float = 0.0, atol: float = 0.0) -> None:
        actual_leaves = jax.tree_util.tree_leaves_with_path(actual)
        expected_leaves = dict(jax.tree_util.tree_leaves_with_path(expected))
        assert [path for path, _ in actual_leaves] == list(expected_leaves)
        for path, leaf in actual_leaves:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            other = np.asarray(expected_leaves[path])
            np.testing.assert_allclose(np.asarray(leaf), other, rtol=rtol, atol=atol, err_msg=name)

    return check


@pytest.fixture(scope="session")
def state_of() -> Callable[..., Any]:
    """Every array of a run's latest checkpoint, on one device, and its step."""

    def read(run_dir: Path) -> tuple[int | None, Any]:
        abstract = jax.eval_shape(lambda: init_state(Config.from_json(run_dir / "config.json")))
        abstract = with_shardings(one_device(), abstract)
        checkpoints = Checkpoints(run_dir / "checkpoints" / "latest", read_only=True)
        return checkpoints.step, checkpoints.restore(params=abstract.params, opt_state=abstract.opt_state)[0]

    return read
