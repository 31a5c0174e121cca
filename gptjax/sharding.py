"""The device mesh, and the one table that says how each parameter is split over it."""

import math
import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gptjax.config import MeshConfig, ModelConfig
from gptjax.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# The end of a parameter's path -> how its axes are split. The leading axis of `layers` is the layer, never split.
# The optimizer's moments have their parameter's path at the end of theirs, so the table splits them alike.
TABLE = {
    r"(token_embedding|head)$": P("tensor", "fsdp"),
    r"position_embedding$": P(None, "fsdp"),
    r"attention/(query|key|value)/kernel$": P(None, "fsdp", "tensor", None),
    r"attention/(query|key|value)/bias$": P(None, "tensor", None),
    r"attention/out/kernel$": P(None, "tensor", None, "fsdp"),
    r"mlp/(up|gate)/kernel$": P(None, "fsdp", "tensor"),
    r"mlp/(up|gate)/bias$": P(None, "tensor"),
    r"mlp/down/kernel$": P(None, "tensor", "fsdp"),
    r"": P(),
}


def make_mesh(config: MeshConfig, batch_size: int) -> Mesh:
    """A mesh with axes (data, fsdp, tensor) that splits `batch_size` windows evenly, of all devices if one axis is -1.

    Raises:
        UserError: the axes do not multiply to the number of devices, or the batch does not split.
    """
    n_devices, sizes = jax.device_count(), {"data": config.data, "fsdp": config.fsdp, "tensor": config.tensor}
    asked = " x ".join(f"mesh.{name}={size}" for name, size in sizes.items())
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if fixed > n_devices or (-1 in sizes.values() and n_devices % fixed):
        raise UserError(
            f"{asked} does not fit {n_devices} devices: the product of the axes can be no more, and with one of them "
            "-1 it must divide that number (on a CPU --cpu_devices sets it)"
        )
    sizes = {name: n_devices // fixed if size == -1 else size for name, size in sizes.items()}
    asked = " x ".join(f"mesh.{name}={size}" for name, size in sizes.items())
    if batch_size % (sizes["data"] * sizes["fsdp"]):
        raise UserError(
            f"train.batch_size / train.accumulate = {batch_size} windows do not split over {asked}; "
            f"choose a multiple of {sizes['data'] * sizes['fsdp']}, or fewer devices with --mesh.data"
        )
    return jax.make_mesh(
        tuple(sizes.values()),
        tuple(sizes),
        (jax.sharding.AxisType.Auto,) * 3,
        devices=jax.devices()[: math.prod(sizes.values())],
    )


def require_divisible(model: ModelConfig, mesh: Mesh) -> None:
    """Raise `UserError` where the mesh does not divide what the table splits."""
    for field, value, axis in (
        ("n_head", model.n_head, "tensor"),
        ("n_kv_head", model.kv_heads, "tensor"),
        ("mlp_width", model.mlp_features, "tensor"),
        ("n_embd", model.n_embd, "fsdp"),
    ):
        size = mesh.shape[axis]
        model.require(value % size == 0, field, f"does not split over mesh.{axis}={size}")


def shardings(mesh: Mesh, tree: Any) -> Any:
    """For each array of a tree of parameters, or of a train state, its sharding by the table.

    A vocabulary too small to be padded, as one of characters is, stays whole where it does not divide.
    """

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = next(spec for end, spec in TABLE.items() if re.search(end, name))
        if name.endswith(("token_embedding", "head")) and leaf.shape[0] % mesh.shape["tensor"]:
            spec = P(None, spec[1])
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, tree)


def with_shardings(mesh: Mesh, abstract: Any) -> Any:
    """The same shapes and dtypes with the table's shardings."""
    return jax.tree.map(
        lambda leaf, split: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=split),
        abstract,
        shardings(mesh, abstract),
    )


def one_device() -> Mesh:
    """The mesh of this process's first device."""
    return jax.make_mesh((1, 1, 1), AXES, (jax.sharding.AxisType.Auto,) * 3, devices=jax.local_devices()[:1])


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of a batch [accumulate, B, T]: B is split."""
    return NamedSharding(mesh, P(None, BATCH_AXES))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Split an activation over the mesh in use, if there is one: its leading axis like the batch, the rest as given.

    The compiler would else be free to replicate the batch, or to move activations where weights should move.
    """
    return _constrain(x, (BATCH_AXES, *axes, *[None] * (x.ndim - 1 - len(axes))))


def gathered(weight: jax.Array, name: str) -> jax.Array:
    """A parameter as its product wants it: whole over fsdp, split over tensor as the table says."""
    spec = next(spec for end, spec in TABLE.items() if re.search(end, name))
    return _constrain(weight, tuple(None if axis == "fsdp" else axis for axis in spec)[-weight.ndim :])


def _constrain(x: jax.Array, axes: tuple[Any, ...]) -> jax.Array:
    """with_sharding_constraint on the mesh in use, if there is one; an axis that does not split evenly stays whole."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    split = [
        axis if axis != "tensor" or n % mesh.shape["tensor"] == 0 else None
        for n, axis in zip(x.shape, axes, strict=True)
    ]
    return jax.lax.with_sharding_constraint(x, P(*split))
