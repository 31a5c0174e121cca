"""The suite runs with 8 virtual CPU devices, with rank promotion an error, and with annotations that are checked.

Warnings are errors too (pyproject.toml). Block on each result on CPU: two programs in flight on several of its devices
could wait for each other forever.
"""

import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Before jax reads them. Tests mostly compile, so they use slower programs that compile faster. Processes that they
# start do so too, apart from those of test_scripts.py and test_golden.py, and share a cache that is not the user's.
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # even on a machine with a GPU; test_gpu.py says how to test that
if os.environ["JAX_PLATFORMS"] == "cpu":  # a GPU runs what its users run
    os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
    if version("jaxlib") < "0.11":  # newer ones abort at this flag; the older emitters compile in a third of the time
        os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # only in the first of pytest's processes; the others inherit it
    CACHE = tempfile.TemporaryDirectory(prefix="gptjax-xla-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from gptjax.config import ModelConfig  # before the hook, whose errors would replace config.py's own

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jaxtyping.install_import_hook("gptjax", "beartype.beartype")

from gptjax import cpu
from gptjax.checkpoint import Checkpoints
from gptjax.model import param_shapes
from gptjax.run_dir import saved_config
from gptjax.sharding import one_device, path_name, with_shardings
from gptjax.training import state_shapes

cpu.RUNS_ONCE["xla_backend_optimization_level"] = 0  # as XLA_FLAGS above say for all other programs

# A pytest that runs in the background ignores Ctrl-C, or with nohup SIGHUP; the processes that it starts would too.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def scramble() -> Callable[..., Any]:
    """Random parameters, without the zero biases and unit scales of an initialization, which could hide a mistake.

    Kernels keep the size of activations (std 1/sqrt of their inputs); everything else varies by 0.3.
    """

    def draw(config: ModelConfig, seed: int = 0) -> Any:
        rng = np.random.default_rng(seed)

        def leaf(path: tuple[Any, ...], shape: jax.ShapeDtypeStruct) -> jax.Array:
            name, layer = path[-1].key, path[-2].key if len(path) > 1 else None
            n_in = {"down": config.mlp_features}.get(layer, config.n_embd)
            scale = n_in**-0.5 if name == "kernel" else 0.3
            return jnp.asarray((name == "scale") + scale * rng.standard_normal(shape.shape), jnp.float32)

        return jax.tree_util.tree_map_with_path(leaf, param_shapes(config))

    return draw


@pytest.fixture(scope="session")
def compilations() -> Callable[[], Any]:
    """`with compilations() as names:` collects the names of the programs that XLA compiles in the block."""

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
    """Compare two trees; an error names the leaf that differs."""

    def check(actual: Any, expected: Any, *, rtol: float = 0.0, atol: float = 0.0) -> None:
        actual_leaves = jax.tree_util.tree_leaves_with_path(actual)
        expected_leaves = dict(jax.tree_util.tree_leaves_with_path(expected))
        assert [path for path, _ in actual_leaves] == list(expected_leaves)
        for path, leaf in actual_leaves:
            name = path_name(path)
            other = np.asarray(expected_leaves[path])
            np.testing.assert_allclose(np.asarray(leaf), other, rtol=rtol, atol=atol, err_msg=name)

    return check


@pytest.fixture(scope="session")
def state_of() -> Callable[..., Any]:
    """The step of a run's latest checkpoint, and its arrays, on one device."""

    def read(run_dir: Path) -> tuple[int | None, Any]:
        abstract = state_shapes(saved_config(run_dir))
        abstract = with_shardings(one_device(), abstract)
        checkpoints = Checkpoints(run_dir / "checkpoints" / "latest", read_only=True)
        return checkpoints.step, checkpoints.restore(params=abstract.params, opt_state=abstract.opt_state)[0]

    return read
