"""Hardware by name, for compilers that run without it: v5e:4x4, v5e-16, h100:8, h100:2x8."""

import importlib.util
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from gptjax.errors import UserError
from gptjax.flops import INTERCONNECT, NODE_NETWORK, Peak, device_peak

INSTALL = "pip install -e '.[plan]', in an environment of its own"


class TPU(NamedTuple):
    kind: str
    memory: float  # GiB a program can have, as the compiler says where it refuses one
    max_sides: tuple[int, ...]  # of a slice; one that has them goes round, and so do cubes of 4 x 4 x 4
    cores: int  # that product names count for a chip
    options: dict[str, Any]


class GPU(NamedTuple):
    """What the compiler asks about a GPU: as `cudaGetDeviceProperties` gives it, in XLA's `gpu_device_info`."""

    kind: str
    capability: int
    cores: int
    fpus: int
    shared_kib: tuple[int, int]  # of a core, and of a block at most
    l2: int
    gigahertz: float
    memory: int  # bytes


# memory: read from "exceeds available HBM (15.75G)" and the like of libtpu 0.0.42.
TPUS = {
    "v4": TPU("TPU v4", 30.75, (12, 16, 16), 2, {"chip_config_name": "megacore"}),
    "v5e": TPU("TPU v5 lite", 15.75, (16, 16), 1, {}),
    "v5p": TPU("TPU v5", 95.74, (16, 20, 28), 2, {}),
    "v6e": TPU("TPU v6 lite", 31.25, (16, 16), 1, {}),
}
GPUS = {
    "a100": GPU("NVIDIA A100-SXM4-80GB", 80, 108, 64, (164, 163), 41_943_040, 1.41, 85_100_068_864),
    "h100": GPU("NVIDIA H100 80GB HBM3", 90, 132, 128, (228, 227), 52_428_800, 1.98, 84_942_979_072),
    "h200": GPU("NVIDIA H200", 90, 132, 128, (228, 227), 52_428_800, 1.98, 151_397_597_184),
    "b200": GPU("NVIDIA B200", 100, 148, 128, (228, 227), 132_644_864, 1.965, 191_514_411_008),
}
KNOWN = "TPU slices as v5e:4x4 or v5e-16 (v4, v5e, v5p, v6e), GPUs as h100:8 or h100:2x8 (a100, h100, h200, b200)"


@dataclass(frozen=True)
class Topology:
    name: str
    kind: str  # as `device.device_kind` would say
    sides: tuple[int, ...]  # of a slice in chips; of GPUs the nodes, and the GPUs in each
    capacity: int  # bytes of a device's memory that a program can have
    devices: Sequence[jax.Device]

    @property
    def peak(self) -> Peak:
        peak = device_peak(self.kind)
        assert peak, f"{self.kind} is in no row of the table of peaks"
        return peak

    @property
    def platform(self) -> str:
        """ "gpu" or "tpu", as JAX names it."""
        return "gpu" if self.is_gpu else "tpu"

    @property
    def is_gpu(self) -> bool:
        return self.kind in NODE_NETWORK

    def bandwidth(self, group: Sequence[Any]) -> float:
        """Bytes/s at which the worst placed of these devices can receive from the others, at best.

        In a slice a device has a link along each side that the group spans, two where that side goes round. Between
        nodes each GPU's part of the network carries its part of what a node lacks.
        """
        link = INTERCONNECT[self.kind]
        if self.is_gpu:
            nodes = len({device.process_index for device in group})
            across = NODE_NETWORK[self.kind] * (len(group) - 1) / (nodes - 1) if nodes > 1 else math.inf
            return min(link, across)
        spans = [len({device.coords[axis] for device in group}) for axis in range(len(self.sides))]
        cubes = len(self.sides) == 3 and all(side % 4 == 0 for side in self.sides)
        goes_round = [side > 2 and (cubes or side == 16) for side in self.sides]
        return link * sum(
            2 if span == side and wrapped else 1
            for span, side, wrapped in zip(spans, self.sides, goes_round, strict=True)
            if span > 1
        )


def find_topology(name: str) -> Topology:
    """The hardware of that name: libtpu's names, Google's product names, and h100:GPUS or h100:NODESxGPUS.

    Raises:
        UserError: there is none, or this environment has no compiler for it.
    """
    libtpu_like = re.sub(r"^(\d+)x([a-z]\w*)$", r"\2:\1", name.lower().replace("v5litepod", "v5e").replace("-", ":", 1))
    family, _, shape = libtpu_like.partition(":")
    sizes = tuple(int(n) for n in shape.split("x")) if re.fullmatch(r"\d+(x\d+)*", shape) else ()
    if family in TPUS:
        sides = slice_of(TPUS[family], sizes) if "-" in name or len(sizes) == 1 else sizes
        return _tpu(name, family, sides)
    if family in GPUS and 1 <= len(sizes) <= 2 and min(sizes) > 0:
        return _gpu(GPUS[family], (1, *sizes)[-2:])
    raise UserError(f"topology={name!r} is not known; known are {KNOWN}")


def slice_of(tpu: TPU, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """The sides of a slice that a product name means, as near to a cube as powers of two come; () where none does."""
    chips = sizes[0] // tpu.cores if len(sizes) == 1 else 0
    if chips <= 0 or chips & (chips - 1):
        return ()
    exponent, dims = chips.bit_length() - 1, len(tpu.max_sides)
    sides = [2 ** ((exponent + i) // dims) for i in range(dims)]
    return tuple(sorted(sides, reverse=chips == 4 and dims == 3))


def _tpu(name: str, family: str, sides: tuple[int, ...]) -> Topology:
    tpu = TPUS[family]
    fits = len(sides) == len(tpu.max_sides) and all(
        0 < n <= most for n, most in zip(sorted(sides), sorted(tpu.max_sides), strict=True)
    )
    if not fits:  # the compiler ends the process for one that is too large
        most = "x".join(map(str, tpu.max_sides))
        raise UserError(f"topology={name!r} is no slice of a {family} pod of {most} chips; known are {KNOWN}")
    if not importlib.util.find_spec("libtpu"):
        raise UserError(f"no TPU compiler in this environment: {INSTALL}")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # else one process at a time, as there is one TPU
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no metadata server to ask
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_WORKER_ID", "0")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")  # any will do: the topology is given by name
    jax.config.update("jax_platforms", "cpu")
    libtpu_name = f"{family}:{'x'.join(map(str, sides))}"
    host = {"chips_per_host_bounds": [*sides, 1][:3]} if sides in ((1, 1), (2, 4)) else {}
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=libtpu_name, **tpu.options, **host).devices
    except Exception as error:
        raise UserError(f"topology={name!r} is refused by the TPU compiler: {_first_line(error)}") from error
    return Topology(libtpu_name, tpu.kind, sides, int(tpu.memory * 2**30), devices)


def _gpu(gpu: GPU, sides: tuple[int, ...]) -> Topology:
    nodes, per_node = sides
    if not any(importlib.util.find_spec(name) for name in ("jax_cuda12_plugin", "jax_cuda13_plugin")):
        raise UserError(f"no GPU compiler in this environment: {INSTALL}")
    jax.config.update("jax_platforms", "cpu")  # or the plugin looks for a GPU
    try:
        devices = topologies.get_topology_desc(
            "", platform="cuda", topology=f"1x{nodes}x{per_node}", target_config=_target_config(gpu)
        ).devices
    except Exception as error:
        raise UserError(f"the GPU compiler does not start: {_first_line(error)}") from error
    name = next(key for key, value in GPUS.items() if value is gpu)
    # What JAX takes of a GPU: docs.jax.dev, "GPU memory allocation".
    fraction = float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.75"))
    shape = f"{nodes}x{per_node}" if nodes > 1 else str(per_node)
    return Topology(f"{name}:{shape}", gpu.kind, sides, int(fraction * gpu.memory), devices)


def _target_config(gpu: GPU) -> str:
    peak = device_peak(gpu.kind)
    assert peak
    info = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "threads_per_core_limit": 2048,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "shared_memory_per_block": 48 << 10,
        "shared_memory_per_core": gpu.shared_kib[0] << 10,
        "shared_memory_per_block_optin": gpu.shared_kib[1] << 10,
        "core_count": gpu.cores,
        "fpus_per_core": gpu.fpus,
        "l2_cache_size": gpu.l2,
        "clock_rate_ghz": gpu.gigahertz,
        "memory_bandwidth": int(peak.bandwidth),
        "device_memory_size": gpu.memory,
    }
    fields = "\n".join(f"{key}: {value}" for key, value in info.items())
    major, minor = divmod(gpu.capability, 10)
    return (
        f"gpu_device_info {{ {fields} cuda_compute_capability {{ major: {major} minor: {minor} }} }}\n"
        f'platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 }} device_description_str: "{gpu.kind}"'
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
