"""The machine that a process runs on: how many devices its cores are, its memory, and programs compiled before."""

import contextlib
import ctypes
import os
import sys
from functools import cache
from pathlib import Path

M_TOP_PAD, M_MMAP_THRESHOLD = -2, -3  # of glibc's malloc.h


def use_cores(rows: int, n_devices: int) -> None:
    """Prepare, and make `n_devices` CPU devices, 0: as many as there are cores and as divide `rows`; before jax runs.

    Changes nothing on a machine whose devices are GPUs or TPUs.
    """
    import jax

    n_even = max(n for n in range(1, n_cores() + 1) if rows % n == 0)
    jax.config.update("jax_num_cpu_devices", n_devices or n_even)
    prepare()


def n_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def prepare() -> None:
    """Have this process use again the memory that it frees and the programs that were compiled before."""
    keep_freed_memory()
    keep_compiled_programs()


def keep_compiled_programs() -> None:
    """Have XLA keep the programs that took it longer than a fifth of a second, and read them when they come again.

    They lie in JAX_COMPILATION_CACHE_DIR or in ~/.cache/gptjax/xla (XDG_CACHE_HOME in place of ~/.cache), 2 GiB of them
    at most; with JAX_ENABLE_COMPILATION_CACHE=false, or where that folder cannot be written, none.
    """
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gptjax" / "xla"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_compilation_cache_max_size", 2 << 30)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def keep_freed_memory() -> None:
    """Have glibc keep the memory that a step frees, for the next step to use again.

    By default each large array goes back to the kernel, which hands it out anew page by page: 75 ms a step of
    configs/shakespeare.py on two cores, 46 with the memory kept. Other C libraries are left as they are.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_TOP_PAD, 64 << 20)
        _ = mallopt(M_MMAP_THRESHOLD, 1 << 30) or mallopt(M_MMAP_THRESHOLD, 32 << 20)  # older ones allow no more


@cache
def multiplies_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 faster than float32, and this jax has it do so (from 0.12 on)."""
    import jax

    if jax.__version_info__ < (0, 12):
        return False
    with contextlib.suppress(OSError):
        return not {"avx512_bf16", "amx_bf16"}.isdisjoint(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    return False


def peak_host_memory() -> int:
    """The most memory this process has held, in bytes: its largest resident set (0 on Windows, which has none)."""
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
