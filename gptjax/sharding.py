"""The device mesh, and the one table of how each parameter is split over it."""

import math
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
from jax.experimental.mesh_utils import create_hybrid_device_mesh
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gptjax.config import MeshConfig, ModelConfig
from gptjax.errors import UserError
from gptjax.flops import device_peak
from gptjax.host import usable_memory

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# How each parameter is split, by whole names at the end of its path. A leading layer axis is never split. The
# optimizer's moments have their parameter's path at the end of theirs, so the table holds for them too, but for the
# data axis: `update_spec`.
TABLE = {
    r"(token_embedding|head)": P("tensor", "fsdp"),
    r"position_embedding": P(None, "fsdp"),
    r"attention/(query|key|value)/kernel": P(None, "fsdp", "tensor", None),
    r"attention/(query|key|value)/bias": P(None, "tensor", None),
    r"attention/out/kernel": P(None, "tensor", None, "fsdp"),
    r"mlp/(up|gate)/kernel": P(None, "fsdp", "tensor"),
    r"mlp/(up|gate)/bias": P(None, "tensor"),
    r"mlp/down/kernel": P(None, "tensor", "fsdp"),
    r"(attention/out|mlp/down)/bias": P(),
    r"(attention|mlp|query|key|final)_norm/(scale|bias)": P(),
    r"lora_[ab]": P(),
    r"(step|count|good_steps|loss_scale|ns_coeffs)": P(),  # counters, float16's scale and Muon's five constants
}


def path_name(path: tuple[Any, ...]) -> str:
    """A leaf's path in a tree as text: "layers/attention/query/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def by_path(tree: Any) -> dict[str, Any]:
    """The leaves of a tree, each by its path as in "layers/mlp/up/kernel"."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def spec_of(name: str) -> P:
    """The table's row for a parameter's path.

    Raises:
        KeyError: no row names it.
    """
    for end, spec in TABLE.items():
        if re.search(f"(^|/)({end})$", name):
            return spec
    raise KeyError(f"no row of gptjax.sharding.TABLE says how {name} is split: add one")


def make_mesh(
    config: MeshConfig, batch_size: int, state_bytes: int = 0, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh with axes (data, fsdp, tensor) over which `batch_size` windows split evenly; an axis of -1 takes the rest.

    With mesh.fsdp=0, fsdp takes the rest if with data alone the state would fill more than half of a device's memory.
    Of several TPU slices each has whole groups of fsdp and tensor: only the data axis crosses the network between them.

    Raises:
        UserError: the axes do not multiply to the number of devices, the batch does not split, or a process is left
            without a device.
    """
    devices = jax.devices() if devices is None else devices
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1
    n_devices, sizes = len(devices), {"data": config.data, "fsdp": config.fsdp, "tensor": config.tensor}
    if config.fsdp == 0:
        tensor = max(1, config.tensor)
        share = state_share(state_bytes, max(1, n_devices // tensor), tensor, devices[0].platform)
        full = share > memory(devices[0]) / 2
        sizes |= {"data": slices, "fsdp": -1} if full and config.data == -1 else {"fsdp": 1}
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
    used = devices[: math.prod(sizes.values())]
    if len({device.process_index for device in used}) < len({device.process_index for device in devices}):
        raise UserError(f"{asked} leaves whole processes without a device: all {n_devices} devices must be on the mesh")
    if sizes["data"] % slices:
        raise UserError(f"{asked} does not fit {slices} slices: mesh.data must be a multiple of their number")
    try:
        return _arrange(sizes, slices, used)
    except NotImplementedError as error:  # axes of a TPU's mesh are made of whole sides of its slice
        raise UserError(
            f"{asked} does not fit this slice: an axis has to be a product of sides of the slice"
        ) from error


def _arrange(sizes: dict[str, int], slices: int, devices: Sequence[jax.Device]) -> Mesh:
    axis_types = (jax.sharding.AxisType.Auto,) * 3
    if slices == 1:
        return jax.make_mesh(tuple(sizes.values()), AXES, axis_types, devices=devices)
    in_slice = sizes["data"] // slices, sizes["fsdp"], sizes["tensor"]
    return Mesh(create_hybrid_device_mesh(in_slice, (slices, 1, 1), devices), AXES, axis_types)


def memory(device: jax.Device) -> float:
    """Bytes of a device's own memory; infinity where it is unknown, as on CPUs, whose devices share the host's."""
    peak = device_peak(device.device_kind)
    return float(peak.memory) if peak else math.inf


def state_share(state_bytes: int, data: int, parts: int, platform: str) -> float:
    """Bytes of a device's part of the train state and the gradients, which fsdp and tensor split into so many parts.

    Moments are also split over the data axis, though not on CPUs (`splits_updates`). They count as a half of the state,
    as AdamW's are; Muon's are less, so its share is up to a quarter larger.
    """
    moments = 1 if platform == "cpu" else 1 / data
    return state_bytes * (1 + moments) / 2 / parts


def require_memory(mesh: Mesh, state_bytes: int, batch_tokens: int) -> None:
    """Raise `UserError` where a device cannot even hold its part of the train state and of a batch of token ids.

    CPU devices share the memory that this process may use.
    """
    devices, (data, fsdp, tensor) = mesh.local_devices, mesh.shape.values()
    needed = state_share(state_bytes, data, fsdp * tensor, devices[0].platform) + 4 * batch_tokens / (data * fsdp)
    usable = usable_memory() / len(devices) if devices[0].platform == "cpu" else memory(devices[0])
    if needed > usable:
        raise UserError(
            f"state and batch take {needed / 2**30:,.1f} GiB on each device, which has {usable / 2**30:,.1f} GiB: "
            "choose a smaller model or train.batch_size, or more parts with --mesh.fsdp"
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
    """The table's sharding for each array of a tree of parameters or of a train state."""

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = path_name(path)
        in_optimizer = name.startswith("opt_state/") and splits_updates(mesh.abstract_mesh)
        return NamedSharding(mesh, (update_spec if in_optimizer else _even_spec)(name, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def _even_spec(name: str, shape: tuple[int, ...], mesh: Any) -> P:
    """The table's row; a vocabulary too small to be padded, as of characters, stays whole where it does not divide."""
    spec = spec_of(name)
    odd = name.endswith(("token_embedding", "head")) and shape[0] % mesh.shape["tensor"]
    return P(None, spec[1]) if odd else spec


def update_spec(name: str, shape: tuple[int, ...], mesh: Any) -> P:
    """How an optimizer's moments are split, and the update that they give: the table's row, and over the data axis too.

    The data axis splits the first axis, after that of the layers, that it divides ("ZeRO", stage 1).
    """
    spec = _even_spec(name, shape, mesh)
    axes = [() if axis is None else (axis,) for axis in (*spec, *[None] * (len(shape) - len(spec)))]
    for i in range(len(shape) > 2, len(shape)):
        if shape[i] % (mesh.shape["data"] * math.prod(mesh.shape[axis] for axis in axes[i])) == 0:
            return P(*axes[:i], (*axes[i], "data"), *axes[i + 1 :])
    return spec


def splits_updates(mesh: jax.sharding.AbstractMesh) -> bool:
    """Whether the data axis splits the optimizer's work; not on CPUs, whose devices share one memory."""
    return mesh.shape["data"] > 1 and mesh.abstract_device is not None and mesh.abstract_device.platform != "cpu"


def split_update(tree: Any) -> Any:
    """Parameters or their gradients split as the optimizer's moments are, over the mesh in use."""
    mesh = mesh_in_use()
    if mesh.empty or not splits_updates(mesh):
        return tree

    def split(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(leaf, update_spec(path_name(path), leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(split, tree)


def with_shardings(mesh: Mesh, abstract: Any) -> Any:
    """The shapes and dtypes of `abstract` with the table's shardings."""
    return jax.tree.map(
        lambda leaf, split: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=split),
        abstract,
        shardings(mesh, abstract),
    )


def one_device() -> Mesh:
    """The mesh of this process's first device."""
    return jax.make_mesh((1, 1, 1), AXES, (jax.sharding.AxisType.Auto,) * 3, devices=jax.local_devices()[:1])


def mesh_in_use() -> jax.sharding.AbstractMesh:
    """The mesh over which arrays are split here; empty without one, and inside shard_map, where arrays are local."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.sharding.AbstractMesh((), ()) if mesh.manual_axes else mesh


def platform_in_use() -> str:
    """The platform of the mesh in use; "cpu" without one."""
    mesh = mesh_in_use()
    return "cpu" if mesh.empty or mesh.abstract_device is None else mesh.abstract_device.platform


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch [A, B, W]: B is split."""
    return NamedSharding(mesh, P(None, BATCH_AXES))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Split an activation over the mesh in use, if there is one: its leading axis like the batch, the rest by `axes`.

    Without this the compiler may replicate the batch, or communicate activations instead of weights.
    """
    return _constrain(x, (BATCH_AXES, *axes, *[None] * (x.ndim - 1 - len(axes))))


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def gathered(weight: jax.Array, name: str) -> jax.Array:
    """A parameter all-gathered over fsdp for its matmul; over tensor it stays split.

    Its gradient is split as the parameter is: a reduce-scatter moves half of the bytes of an all-reduce.
    """
    spec = _spec(weight, name)
    return _constrain(weight, tuple(None if axis == "fsdp" else axis for axis in spec))


def _gathered_forward(weight: jax.Array, name: str) -> tuple[jax.Array, None]:
    return gathered(weight, name), None


def _gathered_backward(name: str, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    return (_constrain(gradient, _spec(gradient, name)),)


gathered.defvjp(_gathered_forward, _gathered_backward)


def _spec(weight: jax.Array, name: str) -> tuple[Any, ...]:
    """How the table splits the axes that a parameter has here, which may be those of one layer."""
    return tuple(spec_of(name))[-weight.ndim :]


def by_layer(stacked: jax.Array) -> jax.Array:
    """Stacked layers split over as many mesh axes as divide their number; each layer's own array stays whole."""
    mesh, axes, n_parts = mesh_in_use(), list[str](), 1
    for axis in AXES if not mesh.empty else ():
        if len(stacked) % (n_parts * mesh.shape[axis]) == 0:
            axes, n_parts = [*axes, axis], n_parts * mesh.shape[axis]
    return _constrain(stacked, (tuple(axes), *[None] * (stacked.ndim - 1)))


def _constrain(x: jax.Array, axes: tuple[Any, ...]) -> jax.Array:
    """with_sharding_constraint on the mesh in use, if any; an axis that does not split evenly stays whole."""
    mesh = mesh_in_use()
    if mesh.empty:
        return x
    split = [
        axis if axis not in ("fsdp", "tensor") or n % mesh.shape[axis] == 0 else None
        for n, axis in zip(x.shape, axes, strict=True)
    ]
    return jax.lax.with_sharding_constraint(x, P(*split))
