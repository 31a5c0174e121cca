"""How many FLOPs a training step has, and how many per second the hardware can do."""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from gptjax.config import Config


class Peak(NamedTuple):
    """The limits of one JAX device, as its vendor states them."""

    flops: float  # FLOP/s of dense bfloat16 matmuls that accumulate in float32
    bandwidth: float  # bytes/s of device memory
    memory: int  # bytes of device memory, a little more than a program can have

    @property
    def memory_bound(self) -> bool:
        """Whether memory, not matmuls, limits a training step: v6e has 560 FLOPs a byte, other TPUs at most 313."""
        return self.flops > 400 * self.bandwidth


# Names as in `device.device_kind`; TFLOP/s, GB/s and GiB per JAX device. "a / 2" is half a chip: on TPU v2, v3 and 7x a
# JAX device is one of the chip's two cores, on v4 and v5p both cores are one device. FLOP/s are dense: half of a
# vendor's figure "with sparsity". What vendors call a GB of memory is a GiB.
_TABLE: tuple[tuple[str, float, float, float], ...] = (
    # Google. v2, v3: "A Domain-Specific Supercomputer for Training Deep Neural Networks" (CACM, July 2020).
    ("TPU v2", 46 / 2, 700 / 2, 16 / 2),
    ("TPU v3", 123 / 2, 900 / 2, 32 / 2),
    # cloud.google.com/tpu/docs/v4, /v5e, /v6e and, for v5p and 7x, /tpu7x: the tables under "System architecture".
    ("TPU v4", 275, 1200, 32),
    ("TPU v5 lite|TPU v5e", 197, 819, 16),
    ("TPU v5|TPU v5p", 459, 2765, 95),
    ("TPU v6 lite|TPU v6e", 918, 1638, 32),
    ("TPU7|TPU7x|TPU v7x", 2307 / 2, 7380 / 2, 192 / 2),
    # NVIDIA V100 and T4 datasheets. These two have no bfloat16: this is their float16 tensor peak.
    ("V100-SXM2-16GB", 125, 900, 16),
    ("V100-SXM2-32GB", 125, 900, 32),
    ("V100-PCIE-16GB", 112, 900, 16),
    ("V100-PCIE-32GB", 112, 900, 32),
    ("V100S-PCIE-32GB", 130, 1134, 32),
    ("T4", 65, 320, 16),
    # NVIDIA datasheets of A100 (40 GB and 80 GB editions), A10, A10G ("for AWS"), L4 and L40S.
    ("A100-SXM4-40GB|A100-SXM-40GB|A100-PCIE-40GB", 312, 1555, 40),
    ("A100-SXM4-80GB|A100-SXM-80GB", 312, 2039, 80),
    ("A100 80GB PCIe|A100-PCIE-80GB", 312, 1935, 80),
    ("A10", 125, 600, 24),
    ("A10G", 70, 600, 24),
    ("L4", 121, 300, 24),
    ("L40S", 362, 864, 48),
    # GA102 and Ada architecture whitepapers, appendix A, "FP32 accumulate": half of the float16-accumulate figure.
    ("RTX 3090", 71, 936, 24),
    ("RTX 4090", 165.2, 1008, 24),
    # NVIDIA H100, H200 and GH200 datasheets; SXM unless the name says otherwise. The GH200's 480 GB are the CPU's.
    ("H100 80GB HBM3|H100", 989.5, 3350, 80),
    ("H100 PCIe", 756.5, 2000, 80),
    ("H100 NVL", 835.5, 3900, 94),
    ("H200", 989.5, 4800, 141),
    ("H200 NVL", 835.5, 4800, 141),
    ("GH200 480GB", 990, 4000, 96),
    ("GH200 144G HBM3e", 990, 4900, 144),
    # NVIDIA HGX B200 (FLOP/s) and DGX B200 (memory), an eighth of the machine; GB200 NVL72, half of a superchip.
    ("B200", 36e3 / 2 / 8, 64e3 / 8, 1440 / 8),
    ("GB200", 10e3 / 2 / 2, 16e3 / 2, 372 / 2),
)
PEAKS = {
    name.casefold(): Peak(flops=tflops * 1e12, bandwidth=gigabytes * 1e9, memory=round(gibibytes * 2**30))
    for names, tflops, gigabytes, gibibytes in _TABLE
    for name in names.split("|")
}


def device_peak(device_kind: str) -> Peak | None:
    """The peak of a JAX `device.device_kind`, None if the table does not have it.

    The whole name must match, except for case and the words NVIDIA, Tesla and GeForce: an RTX 3090 Ti is not an RTX
    3090, and a MIG slice of an H200 is not an H200.
    """
    words = device_kind.casefold().split()
    return PEAKS.get(" ".join(word for word in words if word not in ("nvidia", "tesla", "geforce")))


def measured_matmul_peak(
    mesh_devices: Sequence[jax.Device], dtype: DTypeLike = jnp.float32, *, size: int = 1024, seconds: float = 0.3
) -> float:
    """FLOP/s of the fastest of several [size, size] matmuls on all devices at once, measured for about `seconds`.

    Stands in for a vendor's peak on CPUs, whose devices share the cores.
    """
    mesh = Mesh(np.asarray(mesh_devices), ("data",))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    ones = jax.jit(lambda: jnp.ones((len(mesh_devices), size, size), dtype), out_shardings=sharding)()
    matmul = jax.jit(lambda x, y: jnp.einsum("bij,bjk->bik", x, y), out_shardings=sharding)
    matmul(ones, ones).block_until_ready()
    times, end = list[float](), time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        matmul(ones, ones).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * size**3 * len(mesh_devices) / min(times)


def matmul_params(params: Any) -> int:
    """Entries of a model's weight matrices and of its output head, tied or not.

    Embedding lookups, norms and biases do not count. nanoGPT counts all but the position embedding, which is within
    0.1% of this for GPT-2.
    """
    head = params["head" if "head" in params else "token_embedding"]
    layers = jax.tree_util.tree_leaves_with_path(params["layers"])
    return head.size + sum(leaf.size for path, leaf in layers if path[-1].key == "kernel")


def step_flops(config: Config, params: Any) -> int:
    """FLOPs of one optimizer step, on all devices together; `params` may be arrays or their shapes.

    A token's forward and backward pass are 6 N + 12 L D T (PaLM, appendix B; nanoGPT's `estimate_mfu`), where N is
    `matmul_params` and D the width of attention: query heads times head width. As in both sources attention counts in
    full, without regard to causality, and recomputation does not count. With a sliding window shorter than the context
    T is the window.
    """
    model = config.model
    attended = model.local_window or model.block_size
    per_token = 6 * matmul_params(params) + 12 * model.n_layer * model.n_head * model.head_width * attended
    return per_token * config.train.batch_size * model.block_size
