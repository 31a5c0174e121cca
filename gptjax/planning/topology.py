"""Finds hardware by name for compilers that run without it: v5e:4x4, v5e-16, v5e:16x16x2, h100:2x8, rtx4090:1."""

import importlib.util
import math
import operator
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from gptjax.errors import UserError
from gptjax.flops import Peak, device_peak

INSTALL = "pip install -e '.[plan]', in an environment of its own"


class TPU(NamedTuple):
    """A kind of TPU: its links, its memory and the slices that there are."""

    kind: str  # `device.device_kind`
    link: float  # bytes/s over one link of the torus, one way
    network: float  # bytes/s over a chip's share of its host's network card, one way; 0 where Google states none
    memory: float  # GiB that a program can have
    max_sides: tuple[int, ...]  # of a slice
    cores: int  # how many each chip adds to the number in a product name
    options: dict[str, Any]  # for the compiler


class GPU(NamedTuple):
    """A kind of GPU: its links, and what XLA's compiler has to know of it."""

    kind: str  # `device.device_kind`
    link: float  # bytes/s over all NVLinks, or else over PCI Express, one way
    network: float  # bytes/s over the GPU's network card, one way; 0: one node only
    # As `cudaGetDeviceProperties` gives them, for XLA's `gpu_device_info`:
    capability: tuple[int, int]
    cores: int
    fpus: int  # of a core
    shared_kib: tuple[int, int]  # of a core, and of a block at most
    l2: int
    gigahertz: float
    memory: int  # bytes
    threads: int = 2048  # of a core


# link: Google's pages (flops.py) state all links of a chip, both ways, for v5e, v5p and v6e, and one way for v4.
# network: the same pages, by chip (v5p) or by pod of 256 chips (v5e, v6e).
# memory: libtpu's message when a program does not fit.
TPUS = {
    "v4": TPU("TPU v4", 2400e9 / 8 / 6, 0.0, 30.75, (12, 16, 16), 2, {"chip_config_name": "megacore"}),
    "v5e": TPU("TPU v5 lite", 400e9 / 2 / 4, 6.4e12 / 8 / 256, 15.75, (16, 16), 1, {}),
    "v5p": TPU("TPU v5", 1200e9 / 2 / 6, 50e9 / 8, 95.74, (16, 20, 28), 2, {}),
    "v6e": TPU("TPU v6 lite", 800e9 / 2 / 4, 25.6e12 / 8 / 256, 31.25, (16, 16), 1, {}),
}
PCIE_4 = 16e9 * 16 * 128 / 130 / 8
# link: the datasheets, which state both ways. network: the user guides of DGX A100, H100, H200 and B200.
GPUS = {
    "a100": GPU("NVIDIA A100-SXM4-80GB", 300e9, 25e9, (8, 0), 108, 64, (164, 163), 41_943_040, 1.41, 85_100_068_864),
    "h100": GPU("NVIDIA H100 80GB HBM3", 450e9, 50e9, (9, 0), 132, 128, (228, 227), 52_428_800, 1.98, 84_942_979_072),
    "h200": GPU("NVIDIA H200", 450e9, 50e9, (9, 0), 132, 128, (228, 227), 52_428_800, 1.98, 151_397_597_184),
    "b200": GPU("NVIDIA B200", 900e9, 50e9, (10, 0), 148, 128, (228, 227), 132_644_864, 1.965, 191_514_411_008),
    # link: PCI Express 4.0 x16, 16 GT/s a lane with 128 of 130 bits; the bridge between two RTX 3090s is not counted.
    "l4": GPU("NVIDIA L4", PCIE_4, 0.0, (8, 9), 58, 128, (100, 99), 50_331_648, 2.04, 23_612_293_120, 1536),
    "l40s": GPU("NVIDIA L40S", PCIE_4, 0.0, (8, 9), 142, 128, (100, 99), 100_663_296, 2.52, 47_576_711_168, 1536),
    "rtx3090": GPU(
        "NVIDIA GeForce RTX 3090", PCIE_4, 0.0, (8, 6), 82, 128, (100, 99), 6_291_456, 1.695, 25_286_672_384, 1536
    ),
    "rtx4090": GPU(
        "NVIDIA GeForce RTX 4090", PCIE_4, 0.0, (8, 9), 128, 128, (100, 99), 75_497_472, 2.52, 25_386_352_640, 1536
    ),
}
KNOWN = (
    "TPU slices as v5e:4x4, v5e-16 or, two of them, v5e:16x16x2 (v4, v5e, v5p, v6e), "
    f"GPUs as h100:8, h100:2x8 or rtx4090:1 ({', '.join(GPUS)})"
)


class Topology(NamedTuple):
    """Devices that a plan is compiled for, without being here."""

    name: str
    hardware: TPU | GPU
    sides: tuple[int, ...]  # of a TPU slice in chips; for GPUs the nodes, and the GPUs in each
    capacity: int  # bytes of a device's memory that a program can have
    devices: Sequence[jax.Device]
    slices: int = 1

    @property
    def platform(self) -> str:
        """ "gpu" or "tpu", as JAX names it."""
        return "gpu" if isinstance(self.hardware, GPU) else "tpu"

    @property
    def peak(self) -> Peak:
        """FLOP/s and bytes/s of one device."""
        peak = device_peak(self.hardware.kind)
        assert peak, f"{self.hardware.kind} is not in the table of peaks"
        return peak

    def bandwidth(self, group: Sequence[Any]) -> float:
        """Bytes/s at which each of these devices can receive from the others, if the links are used fully.

        A TPU has one link along each side of the slice that the group spans, or two where that side is a ring. Between
        nodes of GPUs, and slices of TPUs, the network cards of all devices of one share what it receives. Example: an
        all-gather of S bytes over two nodes of 8 GPUs brings each GPU 15/16 S and each node S/2, 1/16 S per card.
        """
        is_gpu = isinstance(self.hardware, GPU)
        parts = len({device.process_index if is_gpu else getattr(device, "slice_index", 0) for device in group})
        within = self.hardware.link if is_gpu else self._torus_bandwidth(group)
        return within if parts == 1 else min(within or math.inf, self.hardware.network * (len(group) - 1) / (parts - 1))

    def _torus_bandwidth(self, group: Sequence[Any]) -> float:
        spans = [len({device.coords[axis] for device in group}) for axis in range(len(self.sides))]
        # Sides of 16 chips are rings, and all sides of a slice made of cubes of 4 x 4 x 4.
        cubes = len(self.sides) == 3 and all(side % 4 == 0 for side in self.sides)
        rings = [side > 2 and (cubes or side == 16) for side in self.sides]
        both_ways = [span == side and ring for span, side, ring in zip(spans, self.sides, rings, strict=True)]
        return self.hardware.link * sum(1 + two for span, two in zip(spans, both_ways, strict=True) if span > 1)


def find_topology(name: str) -> Topology:
    """The hardware of a name: libtpu's, Google's product names, and h100:GPUS or h100:NODESxGPUS.

    Raises `UserError` if there is no such hardware, or this environment has no compiler for it.
    """
    libtpu_like = re.sub(r"^(\d+)x([a-z]\w*)$", r"\2:\1", name.lower().replace("v5litepod", "v5e").replace("-", ":", 1))
    family, _, shape = libtpu_like.partition(":")
    sizes = tuple(int(n) for n in shape.split("x")) if re.fullmatch(r"\d+(x\d+)*", shape) else ()
    if family in TPUS:
        tpu, slices = TPUS[family], 1
        if len(sizes) == len(tpu.max_sides) + 1 and tpu.network:
            sizes, slices = sizes[:-1], sizes[-1]
        sides = slice_sides(tpu, sizes) if "-" in name or len(sizes) == 1 else sizes
        return _find_tpu(name, family, sides, slices)
    if family in GPUS and 1 <= len(sizes) <= 2 and min(sizes) > 0:
        nodes, per_node = (1, *sizes)[-2:]
        if nodes > 1 and not GPUS[family].network:
            raise UserError(f"topology={name!r}: {family} has no network that a plan knows; known are {KNOWN}")
        return _find_gpu(family, nodes, per_node)
    raise UserError(f"topology={name!r} is not known; known are {KNOWN}")


def slice_sides(tpu: TPU, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """The sides of the slice with that size in its product name; () if there is none.

    Slices have powers of two as sides and are as near to a cube as possible: v5p-32 has 16 chips, (2, 2, 4).
    """
    chips = sizes[0] // tpu.cores if len(sizes) == 1 else 0
    if chips <= 0 or chips & (chips - 1):
        return ()
    exponent, dims = chips.bit_length() - 1, len(tpu.max_sides)
    sides = [2 ** ((exponent + i) // dims) for i in range(dims)]
    return tuple(sorted(sides, reverse=chips == 4 and dims == 3))


def _find_tpu(name: str, family: str, sides: tuple[int, ...], slices: int) -> Topology:
    tpu = TPUS[family]
    fits = len(sides) == len(tpu.max_sides) and all(map(operator.le, sorted(sides), sorted(tpu.max_sides)))
    if not fits or min(*sides, slices) < 1:  # the compiler aborts the process if a slice is too large
        most = "x".join(map(str, tpu.max_sides))
        raise UserError(f"topology={name!r} is no slice of a {family} pod of {most} chips; known are {KNOWN}")
    if not importlib.util.find_spec("libtpu"):
        raise UserError(f"no TPU compiler in this environment: {INSTALL}")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # lets several processes compile at the same time
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no metadata server
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_WORKER_ID", "0")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")  # required, but the topology is given by name
    libtpu_name = f"{family}:{'x'.join(map(str, sides))}"
    host = {"chips_per_host_bounds": [*sides, 1][:3]} if sides in ((1, 1), (2, 4)) else {}
    several = {"num_slices": slices} if slices > 1 else {}
    devices = _describe(name, platform="tpu", topology_name=libtpu_name, **tpu.options, **host, **several)
    full_name = f"{libtpu_name}x{slices}" if slices > 1 else libtpu_name
    return Topology(full_name, tpu, sides, int(tpu.memory * 2**30), devices, slices)


def _find_gpu(family: str, nodes: int, per_node: int) -> Topology:
    gpu = GPUS[family]
    if not any(importlib.util.find_spec(name) for name in ("jax_cuda12_plugin", "jax_cuda13_plugin")):
        raise UserError(f"no GPU compiler in this environment: {INSTALL}")
    name = f"{family}:{nodes}x{per_node}" if nodes > 1 else f"{family}:{per_node}"
    devices = _describe(name, "", platform="cuda", topology=f"1x{nodes}x{per_node}", target_config=_target_config(gpu))
    # JAX's default share of a GPU's memory: docs.jax.dev, "GPU memory allocation".
    fraction = float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.75"))
    return Topology(name, gpu, (nodes, per_node), int(fraction * gpu.memory), devices)


def _describe(name: str, *arguments: Any, **options: Any) -> Sequence[jax.Device]:
    jax.config.update("jax_platforms", "cpu")  # otherwise JAX looks for the hardware
    try:
        return topologies.get_topology_desc(*arguments, **options).devices
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise UserError(f"topology={name!r} is refused by the compiler: {reason}") from error


def _target_config(gpu: GPU) -> str:
    peak, (major, minor), (shared, shared_by_block) = device_peak(gpu.kind), gpu.capability, gpu.shared_kib
    assert peak
    return f"""
        gpu_device_info {{
            threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {gpu.threads}
            registers_per_core_limit: 65536 registers_per_block_limit: 65536
            block_dim_limit_x: {2**31 - 1} block_dim_limit_y: 65535 block_dim_limit_z: 65535
            shared_memory_per_block: {48 << 10} shared_memory_per_core: {shared << 10}
            shared_memory_per_block_optin: {shared_by_block << 10}
            core_count: {gpu.cores} fpus_per_core: {gpu.fpus} clock_rate_ghz: {gpu.gigahertz}
            l2_cache_size: {gpu.l2} memory_bandwidth: {int(peak.bandwidth)} device_memory_size: {gpu.memory}
            cuda_compute_capability {{ major: {major} minor: {minor} }}
        }}
        platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 }} device_description_str: "{gpu.kind}"
    """
