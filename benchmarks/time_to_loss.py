"""Seconds to a loss on tiny Shakespeare's whole validation split: python -m benchmarks.time_to_loss FILE [--json]

FILE is the corpus. Ours is train.py with configs/speedrun.py, the rival nanoGPT's README recipe for a CPU in PyTorch
with torch.compile: 2,000 steps and an evaluation of 20 batches every 250. Time runs from the start of Python to the
loss of the whole split after the last step (ours: after the best), with compilation and an empty cache of compiled
programs. What train.py does afterwards (checkpoint, picture, sample, report) does not count. Losses are nats a
character.
"""

import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.paired import ROOT, Contender, Result, parser, show


def ours(corpus: Path, config: str, dtype: str) -> tuple[float, float]:
    """Seconds to the best validation loss, and that loss."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        environment |= {"JAX_COMPILATION_CACHE_DIR": f"{folder}/cache"}
        command = [sys.executable, str(ROOT / "train.py"), "--config", str(ROOT / "configs" / config)]
        command += ["--data.source", str(corpus.resolve()), "--out_dir", "run", "--model.dtype", dtype]
        start, seconds, best, loss = time.perf_counter(), dict[str, float](), "", 0.0
        with subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                if match := re.search(r"^step ([\d,]+): validation loss", line):
                    seconds[match[1]] = time.perf_counter() - start
                elif match := re.search(r"best validation loss .* at step ([\d,]+)", line):
                    best = match[1]
                elif match := re.search(r"bits per character there .*\((\d+\.\d+) nats\)", line):
                    loss = float(match[1])
        assert process.returncode == 0
    return seconds[best], loss


def rival(corpus: Path, python: str) -> tuple[float, float]:
    start = time.perf_counter()
    with Contender("nanogpt:whole_run", python, corpus=str(corpus.resolve())) as run:
        return time.perf_counter() - start, run.facts["loss"]


def main() -> None:
    options = parser(__doc__, ("nanogpt_cpu",))
    options.add_argument("corpus", type=Path, help="tiny Shakespeare")
    options.add_argument("--config", default="speedrun.py", help="ours, in configs/")
    options.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of our activations")
    arguments = options.parse_args()
    times: dict[str, list[tuple[float, float]]] = {"ours": [], "rival": []}
    for _ in range(arguments.rounds):
        times["ours"].append(ours(arguments.corpus, arguments.config, arguments.dtype))
        times["rival"].append(rival(arguments.corpus, arguments.rival_python))
    (seconds, loss), (other, other_loss) = [
        map(statistics.median, zip(*pairs, strict=True)) for pairs in times.values()
    ]
    mine, others = f"configs/{arguments.config}, {arguments.dtype}, to {loss:.4f}", f"compiled to {other_loss:.4f}"
    name = f"time to loss, {mine}, against nanoGPT's recipe {others}"
    show([Result(name, seconds, other, "s")], arguments)


if __name__ == "__main__":
    main()
