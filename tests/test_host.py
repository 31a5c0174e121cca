"""The machine: the devices, cores and memory that a process can use, and the cache of compiled programs."""

import os
import platform
import subprocess
import sys
from unittest.mock import Mock

import jax
import pytest

from gptjax import host
from gptjax.compilation_cache import MAX_BYTES, ProgramCache
from gptjax.errors import UserError
from gptjax.host import overlap_options


@pytest.mark.parametrize(
    ("membership", "files", "cores"),
    [
        ("0::/", {"cpu.max": "max 100000"}, None),
        ("0::/", {"cpu.max": "50000 100000"}, 1),
        ("0::/", {"cpu.max": "100001 50000"}, 3),
        ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "200000 100000"}, 2),
        ("0::/docker/not/mounted", {"cpu.max": "100000 100000"}, 1),
        ("4:memory:/\n3:cpu,cpuacct:/a", {"cpu/a/cpu.cfs_quota_us": "150000", "cpu/a/cpu.cfs_period_us": "50000"}, 3),
        ("3:cpu:/a", {"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "100000"}, None),
        ("0::/", {}, None),
        ("nonsense", {"cpu.max": "100000 100000"}, None),
    ],
)
def test_the_cores_of_a_process_follow_the_quota_of_its_control_groups(tmp_path, monkeypatch, membership, files, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    for name, text in {"proc/self/cgroup": membership, **{f"sys/fs/cgroup/{k}": v for k, v in files.items()}}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    assert host.n_cores(tmp_path) == (cores or 16)


def test_the_memory_of_a_process_is_its_control_groups_or_the_machines(tmp_path):
    machine = host.usable_memory(tmp_path)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/")
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("1048576\n")
    assert host.usable_memory(tmp_path) == 2**20 < machine


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are")
@pytest.mark.parametrize(("used", "available", "kept"), [(0.3, 0.5, True), (0.6, 0.95, False), (0.3, 0.4, False)])
def test_a_process_keeps_the_memory_it_frees_if_there_is_room(used, available, kept):
    """An array that a thread allocates after an equal one was freed causes page faults only if that was returned."""
    code = """
import resource, sys
from concurrent.futures import ThreadPoolExecutor
from gptjax import host
host.keep_freed_memory()
used, available = map(float, sys.argv[1:])
host.peak_host_memory, host.usable_memory, host._available_memory = lambda: used, lambda: 1.0, lambda: available
host.keep_all_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    len(b'x' * (100 << 20))
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
with ThreadPoolExecutor(1) as threads:
    threads.submit(faults).result()
    print(threads.submit(faults).result())
before = host.resident_memory()
host.return_freed_memory()
print(before - host.resident_memory())
"""
    out = subprocess.run(
        [sys.executable, "-c", code, str(used), str(available)], capture_output=True, text=True, check=True
    ).stdout
    n_faults, returned = map(int, out.split())
    assert n_faults < 10 if kept else n_faults > 40  # pages have up to 2 MiB
    assert (returned > 90 << 20) == kept


@pytest.mark.parametrize("error", [AssertionError(), RuntimeError("Unable to initialize backend 'xyz': unknown")])
def test_a_platform_that_jax_cannot_use_is_one_line(monkeypatch, error):
    monkeypatch.setattr(jax, "devices", Mock(side_effect=error))
    monkeypatch.setenv("JAX_PLATFORMS", "xyz")
    with pytest.raises(UserError, match="JAX_PLATFORMS=xyz cannot be used: .*name cpu, cuda, rocm or tpu"):
        host.prepare()


def test_a_mistyped_number_of_cpu_devices_is_refused():
    with pytest.raises(UserError, match="1,000,000 CPU devices are more than 4,096"):
        host.use_cores(8, 10**6)


def test_a_cached_program_is_whole_or_absent(tmp_path):
    cache, file = ProgramCache(tmp_path), tmp_path / "step-cache"
    assert cache.get("step") is None
    cache.put("step", b"program")
    for damaged in (file.read_bytes()[:-1], b"", b"another format" * 9, bytes([file.read_bytes()[0] ^ 1])):
        assert ProgramCache(tmp_path).get("step") == b"program"
        file.write_bytes(damaged)
        assert cache.get("step") is None
        cache.put("step", b"program")
    file.unlink()
    file.mkdir()  # as unreadable as another user's file
    cache.put("step", b"program")
    assert cache.get("step") is None and [path.name for path in tmp_path.iterdir()] == ["step-cache"]
    ProgramCache(tmp_path / "nowhere").put("step", b"program")


def test_only_several_gpus_overlap_and_a_users_flags_decide(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=x")
    [(name, value)] = overlap_options("gpu", 8).items()
    assert value is True and not overlap_options("gpu", 1) and not overlap_options("tpu", 8)
    monkeypatch.setenv("XLA_FLAGS", f"--xla_dump_to=x --{name}=false")
    assert not overlap_options("gpu", 8)


def test_xla_knows_the_options_for_several_gpus():
    options = overlap_options("gpu", 8)
    assert jax.jit(lambda x: x + 1, compiler_options=options)(1) == 2
    with pytest.raises(Exception, match="xla_gpu_unknown"):
        jax.jit(lambda x: x + 1, compiler_options={"xla_gpu_unknown": True})(1)


def test_the_programs_that_were_not_used_for_longest_are_deleted(tmp_path):
    cache = ProgramCache(tmp_path)
    for age, key in enumerate(("used", "new", "old")):
        cache.put(key, b"")
        os.utime(tmp_path / f"{key}-cache", (0, 1000 - age))
    with (tmp_path / "used-cache").open("r+b") as file:  # sparse
        file.truncate(MAX_BYTES - 40)
    ProgramCache(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"used-cache", "new-cache"}
