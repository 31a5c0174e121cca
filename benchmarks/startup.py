"""From the command to the first step or text: python -m benchmarks.startup [--json]

Ours is train.py with configs/shakespeare.py on prepared data, to the end of its first step and so with the evaluation
before it, and sample.py to its first text, each with an empty cache of compiled programs and with the one that this
leaves. The rival is PyTorch, to the end of the first step of its compiled model, without data or evaluation.
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


def seconds_until(pattern: bytes, file: Path, command: list[str], folder: Path, cache: Path) -> float:
    """From the start of a process until a file matches a pattern; "output" is the process's own output."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": str(cache)}
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2", "PYTHONUNBUFFERED": "1"}
    start = time.perf_counter()
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=output)
        while not (file.exists() and re.search(pattern, file.read_bytes(), re.DOTALL)):
            assert process.poll() is None, f"{command} ended with exit code {process.returncode}"
            time.sleep(0.005)
        seconds = time.perf_counter() - start
        process.kill()
        process.wait()
    return seconds


def rounds(n: int, rival_python: str, folder: Path) -> Iterator[dict[str, float]]:
    """Seconds of each contender, in turn."""
    train = [sys.executable, str(ROOT / "train.py"), "--config", str(ROOT / "configs" / "shakespeare.py")]
    made = [*train, "--out_dir", "made", "--train.max_steps", "2"]
    subprocess.run(made, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, stdout=subprocess.DEVNULL)
    train += ["--train.log_interval", "1", "--out_dir"]
    sample = [sys.executable, str(ROOT / "sample.py"), "--run", "made", "--prompt", "ROMEO:", "--max_new_tokens", "64"]
    for i in range(n):
        times = {}
        for state in ("empty", "warm"):
            run, cache = f"{state}{i}", folder / f"cache{i}"
            first_step = (b"\n1,", folder / run / "metrics.csv")
            times[f"train.py, {state} cache"] = seconds_until(*first_step, [*train, run], folder, cache)
        for state in ("empty", "warm"):
            times[f"sample.py, {state} cache"] = seconds_until(b"ROMEO:.", folder / "output", sample, folder, cache)
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
    show([Result(names[name], seconds, rival, "s") for name, seconds in medians.items()], arguments)


if __name__ == "__main__":
    main()
