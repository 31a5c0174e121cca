"""The machine that a process runs on: its cores and its memory."""

import contextlib
import ctypes
import math
import os
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from gptjax.compilation_cache import cache_compiled_programs
from gptjax.errors import UserError, first_line

MAX_CPU_DEVICES = 4096
# Multiples of the memory that a process has used up to its first step on CPUs. Above KEPT of it between steps, what is
# free is returned to the system; on a machine with less than ROOM of it, large arrays are not kept at all.
KEPT, ROOM = 1.6, 2.5
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -3, -4, -8  # of glibc's malloc.h


def use_cores(rows: int, n_devices: int) -> None:
    """Call `prepare` and make `n_devices` CPU devices; 0: as many as there are cores and as divide `rows`.

    Call it before JAX runs anything. It does not change the number of GPUs or TPUs.
    """
    import jax

    if n_devices > MAX_CPU_DEVICES:
        raise UserError(f"{n_devices:,} CPU devices are more than {MAX_CPU_DEVICES:,}: lower --cpu_devices or the mesh")
    n_even = max(n for n in range(1, n_cores() + 1) if rows % n == 0)
    jax.config.update("jax_num_cpu_devices", n_devices or n_even)
    prepare()


def n_cores(root: Path = Path("/")) -> int:
    """The cores that this process may use, by its affinity and by the quota of its control group, rounded up."""
    n = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limits = _group_limits(root, "cpu", ["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"])
    return max(1, min([n, *(math.ceil(quota / period) for quota, period in limits)]))


def usable_memory(root: Path = Path("/")) -> float:
    """Bytes of memory that this process may use: the machine's or its control group's; infinity if unknown."""
    limits = [
        math.inf,
        *(limit for [limit] in _group_limits(root, "memory", ["memory.max"], ["memory.limit_in_bytes"])),
    ]
    with contextlib.suppress(AttributeError, OSError, ValueError):  # Windows
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return float(min(limits))


def _group_limits(root: Path, controller: str, v2: list[str], v1: list[str]) -> Iterator[list[int]]:
    """The numbers in the files `v2` or `v1` of this process's Linux control group, and of each group around it.

    A group without a limit is left out. A container may see its own group at the root alone.
    """
    with contextlib.suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            top = root / "sys/fs/cgroup" / (controller if controllers else "")
            folder = top / path.lstrip("/")
            for group in [folder, *(parent for parent in folder.parents if parent.is_relative_to(top))]:
                with contextlib.suppress(OSError, ValueError, IndexError):
                    text = " ".join((group / name).read_text(encoding="utf-8") for name in (v1 if controllers else v2))
                    if (numbers := [int(word) for word in text.split()])[0] > 0:
                        yield numbers


def prepare() -> None:
    """Make this process reuse the programs that an earlier process compiled.

    Raises `UserError` if JAX cannot use the platform that it is told to use.
    """
    cache_compiled_programs()
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        if re.search("DEADLINE|UNAVAILABLE", str(error)):  # another process is lost
            raise
        asked, reason = os.environ.get("JAX_PLATFORMS", ""), str(error) and first_line(error)
        raise UserError(
            f"JAX_PLATFORMS={asked} cannot be used: {reason or 'this JAX is installed without it'}; unset it to use "
            "the hardware that there is, or name cpu, cuda, rocm or tpu"
        ) from error


def keep_freed_memory() -> None:
    """Make glibc keep the arrays of up to 32 MiB that this process frees, so that later ones can use their memory.

    By default it returns a large array to the kernel, which hands memory out again page by page. Call it before there
    are threads: glibc gives a thread a heap of its own, from which it returns arrays all the same. Measured:
    docs/performance.md. Other C libraries stay as they are.
    """
    _glibc("mallopt", M_ARENA_MAX, 1)
    _glibc("mallopt", M_TOP_PAD, 64 << 20)
    _glibc("mallopt", M_MMAP_THRESHOLD, 32 << 20)


def keep_all_freed_memory() -> float:
    """Make glibc keep arrays of any size, if the machine has ROOM times the memory that this process has used so far.

    Returns the resident memory in bytes above which to call `return_freed_memory`, infinity if nothing is kept. It can
    be reached, since a small array that is put into freed memory splits it, and the next step allocates anew.
    """
    peak = peak_host_memory()
    if ROOM * peak >= usable_memory() or (ROOM - 1) * peak >= _available_memory():
        return math.inf
    _glibc("mallopt", M_MMAP_MAX, 0)
    _glibc("mallopt", M_TRIM_THRESHOLD, -1)
    return KEPT * peak


def return_freed_memory() -> None:
    """Make glibc return to the kernel what this process has freed so far."""
    _glibc("malloc_trim", 0)


def resident_memory() -> int:
    """The resident set of this process, in bytes; 0 where there is no /proc."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def _available_memory() -> float:
    """Bytes that Linux could still give to programs; infinity on other systems."""
    with contextlib.suppress(OSError, ValueError):
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        [kib] = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
        return 1024.0 * int(kib)
    return math.inf


def _glibc(name: str, *arguments: int) -> None:
    with contextlib.suppress(AttributeError, OSError, TypeError):
        getattr(ctypes.CDLL(None), name)(*arguments)


def overlap_options(platform: str, n_devices: int) -> dict[str, bool]:
    """XLA's options with which several GPUs communicate while they compute; it schedules one after the other otherwise.

    Given with a program, an option that XLA does not know is an error of JAX's; in XLA_FLAGS it would abort the
    process. Where the user's XLA_FLAGS name the option, they decide.
    """
    name = "xla_gpu_enable_latency_hiding_scheduler"
    overlaps = platform == "gpu" and n_devices > 1 and name not in os.environ.get("XLA_FLAGS", "")
    return {name: True} if overlaps else {}


@cache
def multiplies_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 faster than float32 and this JAX (0.12 or later) makes use of it."""
    import jax

    if jax.__version_info__ < (0, 12):
        return False
    with contextlib.suppress(OSError):
        return not {"avx512_bf16", "amx_bf16"}.isdisjoint(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    return False


def peak_host_memory() -> int:
    """The largest resident set of this process so far, in bytes; 0 on Windows, which does not tell."""
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
