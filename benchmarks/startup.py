"""From the command to the end of the first step: python -m benchmarks.startup [--json]

Ours is train.py with configs/shakespeare.py on data that is prepared, the evaluation before the first step included,
once with an empty cache of compiled programs and once with the one that that run left; and sample.py to its first
text, from a run that is made first. The rival is PyTorch, from the start of Python to the end of the first step of its
compiled model, without data and without evaluation.
"""

import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.paired import ROOT, Contender, Result, parser, show

PROGRAM = """
import os, runpy, sys
import jax
from gptjax.metrics import Metrics

def add(self, step, metrics):
    jax.block_until_ready(metrics)
    print("first step", flush=True)
    os._exit(0)

Metrics.add = add
sys.argv = ["train.py", *sys.argv[1:]]
runpy.run_path("{root}/train.py", run_name="__main__")
"""


def seconds_until(pattern: bytes, command: list[str], folder: Path, cache: Path) -> float:
    """From the start of a process to its first output that matches a pattern."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": str(cache)}
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2", "PYTHONUNBUFFERED": "1"}
    start = time.perf_counter()
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE) as process:
        found = b""
        while not re.search(pattern, found, re.DOTALL) and (byte := process.stdout.read(1)):
            found += byte
        seconds = time.perf_counter() - start
        process.kill()
    assert re.search(pattern, found, re.DOTALL), found.decode()
    return seconds


def rounds(n: int, rival_python: str, folder: Path) -> Iterator[dict[str, float]]:
    """Seconds of each contender, in turn."""
    config = ["--config", str(ROOT / "configs" / "shakespeare.py")]
    train = [sys.executable, "-c", PROGRAM.format(root=ROOT), *config, "--out_dir"]
    made = [sys.executable, str(ROOT / "train.py"), *config, "--out_dir", "made", "--train.max_steps", "2"]
    subprocess.run(made, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, stdout=subprocess.DEVNULL)
    sample = [sys.executable, str(ROOT / "sample.py"), "--run", "made", "--prompt", "ROMEO:", "--max_new_tokens", "64"]
    for i in range(n):
        cache = folder / f"cache{i}"
        times = {
            "train.py, empty cache": seconds_until(b"first step", [*train, f"cold{i}"], folder, cache),
            "train.py, warm cache": seconds_until(b"first step", [*train, f"warm{i}"], folder, cache),
            "sample.py, empty cache": seconds_until(b"ROMEO:.", sample, folder, cache),
            "sample.py, warm cache": seconds_until(b"ROMEO:.", sample, folder, cache),
        }
        start = time.perf_counter()
        with Contender("works:torch_step", rival_python, work="nanogpt_cpu", dtype="float32", compiled=True):
            times["rival"] = time.perf_counter() - start
        yield times


def main() -> None:
    arguments = parser(__doc__, ("startup",)).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = list(rounds(arguments.rounds, arguments.rival_python, Path(folder)))
    medians = {name: statistics.median(times[name] for times in found) for name in found[0]}
    rival = medians.pop("rival")
    names = {name: f"startup, {name}, against PyTorch compiled" for name in medians}
    show([Result.of(names[name], seconds, rival, "s") for name, seconds in medians.items()], arguments.json)


if __name__ == "__main__":
    main()
