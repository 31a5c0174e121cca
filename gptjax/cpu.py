"""CPU devices: a batch in splits that fit the cache, gradients device by device, one program at a time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, PartitionSpec

from gptjax import host
from gptjax.config import Config
from gptjax.sharding import BATCH_AXES, mesh_in_use

CACHED_TOKENS = 2048  # whose activations fit the cache, of all devices together; half as many with dropout
UPDATE_BOUND = 16_000  # parameters of the layers for each token of a step, from which one device is faster than two
RUNS_ONCE = {"xla_backend_optimization_level": 1}  # compiles in half the time


def is_cpu(mesh: Mesh) -> bool:
    """Whether the devices of the mesh are CPU devices."""
    return mesh.devices.flat[0].platform == "cpu"


def n_devices(config: Config) -> int:
    """How many CPU devices train a config fastest, as `host.use_cores` takes it: 1, or 0 for one a core.

    It is 1 for a large model with few tokens a step, since each of several devices would update all parameters.
    Measured: docs/performance.md.
    """
    model, tokens = config.model, config.train.batch_size * config.model.block_size
    return int(12 * model.n_layer * model.n_embd**2 > UPDATE_BOUND * tokens)


def n_splits(config: Config, mesh: Mesh) -> int:
    """Into how many splits, one after the other, a micro-step is cut so that activations stay in the cache.

    Measured: docs/performance.md.
    """
    rows, n_devices = config.train.micro_batch_size, mesh.shape["data"] * mesh.shape["fsdp"]
    limit = CACHED_TOKENS // 2 if config.model.drops else CACHED_TOKENS
    even = [n for n in range(1, rows // n_devices + 1) if rows % (n * n_devices) == 0]
    return next((n for n in even if rows // n * config.model.block_size <= limit), even[-1])


def split_gradient(gradient: Callable[..., Any], config: Config, mesh: Mesh) -> Callable[..., Any]:
    """`gradient` (training.gradient) with each micro-step cut into splits, which act as further micro-steps.

    On a mesh of data alone each device takes the gradient of its own splits, followed by one all-reduce of the
    flattened gradient. The numbers of the splits key dropout, so one device and several draw the same masks.
    """
    n, n_data = n_splits(config, mesh), mesh.shape["data"]
    by_device = mesh.size == n_data > 1 and not config.model.lora_rank
    if by_device and not config.model.drops:  # with dropout the number of splits must not depend on the devices
        n *= n_data
    by_device = by_device and n % n_data == 0

    def of_splits(key: Any, params: Any, scale: Any, windows_ABW: Any, numbers: Any) -> Any:
        (A, B, W), n = windows_ABW.shape, numbers.shape[1]
        windows = windows_ABW.reshape(A * n, B // n, W)
        if n > 1 and not mesh_in_use().empty:
            windows = jax.lax.with_sharding_constraint(windows, PartitionSpec(None, BATCH_AXES))
        return gradient(config, key, params, windows, numbers.reshape(-1), scale)

    def of_device(*arguments: Any) -> Any:
        flat, unravel = ravel_pytree(of_splits(*arguments))
        return unravel(jax.lax.pmean(flat, "data"))

    def whole(config: Config, key: Any, params: Any, windows_ABW: Any, scale: Any = None) -> Any:
        numbers = jnp.arange(len(windows_ABW) * n).reshape(-1, n)
        if not by_device:
            return of_splits(key, params, scale, windows_ABW, numbers)
        split = PartitionSpec(None, "data")
        specs = (PartitionSpec(), PartitionSpec(), PartitionSpec(), split, split)
        mapped = jax.shard_map(of_device, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)
        return mapped(key, params, scale, windows_ABW, numbers)

    return whole


def keeping_memory(train_step: Callable[..., Any]) -> Callable[..., Any]:
    """`train_step`; after its first call, which shows how much memory it takes, the process keeps what it frees."""
    limit = None

    def call(*arguments: Any) -> Any:
        nonlocal limit
        result = train_step(*arguments)
        if limit is None:
            jax.block_until_ready(result)
            limit = host.keep_all_freed_memory()
        elif host.resident_memory() > limit:
            host.return_freed_memory()
        return result

    return call


def one_at_a_time(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, returning once its result is computed.

    CPU devices share a pool of as many threads: of two programs in flight, each could hold a thread in a collective
    that waits for the other's, forever.
    """
    return lambda *arguments: jax.block_until_ready(function(*arguments))
