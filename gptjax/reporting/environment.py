"""environment.json: what a run's numbers depend on besides its config and data, an entry for each of its starts."""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax

from gptjax import distributed
from gptjax.config import Config
from gptjax.errors import UserError, first_line
from gptjax.files import read_json, write_atomically
from gptjax.host import n_cores

FILE = "environment.json"
PARTS = ("code", "versions", "hardware", "variables")  # of an entry: what surrounds the run
PACKAGES = (
    "gptjax jax jaxlib flax optax orbax-checkpoint numpy tokenizers jax-cuda12-pjrt jax-cuda13-pjrt nvidia-cudnn-cu12 "
    "nvidia-cudnn-cu13 libtpu"
).split()
VARIABLES = re.compile("(CUDA|JAX|LIBTPU|MKL|NCCL|NVIDIA|OMP|OPENBLAS|TF|TPU|XLA)_")
UNRECORDED = re.compile("KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL|CACHE")  # such as NVIDIA_API_KEY; caches change no number
DIFF_CHARACTERS = 50_000  # of which more are cut off
GIT_SECONDS = 5.0


@contextlib.contextmanager
def recorded(run_dir: Path, step: int, config: Config, data: str) -> Iterator[None]:
    """Record, beside the block, that the run starts after `step`, with the fingerprint `data` of its tokens.

    Entries of starts whose steps this one repeats are dropped, so an entry holds for the steps between its own and the
    next one's. The block waits for nothing, and a failure costs a note.
    """
    with ThreadPoolExecutor(1) as thread:
        if distributed.is_first():
            thread.submit(_record, run_dir / FILE, {"step": step, "config": asdict(config), "data": data})
        yield


def read(run_dir: Path) -> list[dict[str, Any]]:
    """The entries of a run, the earliest first; none if it has no record. Raises `UserError` if that is damaged."""
    if not (run_dir / FILE).exists():
        return []
    values = read_json(run_dir / FILE)
    try:
        for start in values["starts"]:
            whole = isinstance(start["step"], int) and isinstance(start["hardware"]["devices"], int)
            if not (whole and all(isinstance(start[part], dict) for part in ("config", *PARTS))):
                raise TypeError
        return list(values["starts"])
    except (TypeError, KeyError) as error:
        raise UserError(f"{run_dir / FILE} is damaged: remove it, or restore it from a copy") from error


def surroundings() -> dict[str, Any]:
    """The code, package versions, hardware and environment variables of this process."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    variables = {k: v for k, v in sorted(os.environ.items()) if VARIABLES.match(k) and not UNRECORDED.search(k)}
    return {"code": _code(), "versions": versions, "hardware": _hardware(), "variables": variables}


def _record(path: Path, start: dict[str, Any]) -> None:
    try:
        entries: list[dict[str, Any]] = []
        with contextlib.suppress(UserError):
            entries = [entry for entry in read(path.parent) if entry["step"] < start["step"]]
        now = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "command": sys.argv}
        starts = [*entries, start | now | surroundings()]
        write_atomically(path, json.dumps({"starts": starts}, indent=1) + "\n")
    except Exception as error:  # no record is worth the run
        print(f"note: {path} was not written: {first_line(error)}")


def _code() -> dict[str, str | None]:
    """The commit and the uncommitted changes, if git knows this package, and a hash of the package's source."""
    package, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\n" + path.read_bytes())
    here = Path(__file__).relative_to(package.parent).as_posix()
    commit = _git("rev-parse", "HEAD", f"HEAD:./{here}")  # not one around site-packages
    diff = _git("diff", "--no-ext-diff", "HEAD", "--", ".") if commit else None
    if diff and len(diff) > DIFF_CHARACTERS:
        diff = f"{diff[:DIFF_CHARACTERS]}\n[{len(diff) - DIFF_CHARACTERS:,} more characters]\n"
    return {"commit": commit and commit.split()[0], "diff": diff, "sha256": digest.hexdigest()}


def _git(*arguments: str) -> str | None:
    """The output of git beside the package; None if it fails or takes long."""
    command = ["git", "--no-optional-locks", "-C", str(Path(__file__).parents[2]), *arguments]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=True,
            timeout=GIT_SECONDS,
            start_new_session=True,  # Ctrl-C is for the run
        )
        return done.stdout.decode(errors="replace")
    return None


def _hardware() -> dict[str, Any]:
    devices, cpu = jax.devices(), None
    with contextlib.suppress(OSError):
        cpu = re.search(r"^model name\s*: (.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.M)
    return {
        "devices": len(devices),
        "kind": devices[0].device_kind,
        "runtime": devices[0].client.platform_version,
        "processes": distributed.count(),
        "cpu": cpu[1] if cpu else platform.processor() or platform.machine(),
        "cores": n_cores(),
    }
