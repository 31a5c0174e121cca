"""How long until a loss on tiny Shakespeare's whole validation split: python -m benchmarks.time_to_loss FILE [--json]

FILE is the corpus. Ours is train.py with configs/speedrun.py, the rival nanoGPT's README recipe for a CPU in PyTorch
with torch.compile: 2,000 steps, an evaluation of 20 batches every 250. Both from the start of Python to the loss of the
whole split after the last step, compilation included and no cache of compiled programs before it.
"""

import csv
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.paired import ROOT, Contender, Result, parser, show


def ours(corpus: Path, config: str) -> tuple[float, float]:
    """Seconds, and the last row's validation loss."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": f"{folder}/cache"}
        command = [sys.executable, str(ROOT / "train.py"), "--config", str(ROOT / "configs" / config)]
        command += ["--data.source", str(corpus.resolve()), "--out_dir", "run"]
        start = time.perf_counter()
        subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
        with (Path(folder) / "run" / "metrics.csv").open() as file:
            losses = [float(row["val_loss"]) for row in csv.DictReader(file) if row["val_loss"]]
    return seconds, losses[-1]


def rival(corpus: Path, python: str) -> tuple[float, float]:
    start = time.perf_counter()
    with Contender("nanogpt:whole_run", python, corpus=str(corpus.resolve())) as run:
        return time.perf_counter() - start, run.facts["loss"]


def main() -> None:
    options = parser(__doc__, ("nanogpt_cpu",))
    options.add_argument("corpus", type=Path, help="tiny Shakespeare")
    options.add_argument("--config", default="speedrun.py", help="ours, in configs/")
    arguments = options.parse_args()
    times: dict[str, list[tuple[float, float]]] = {"ours": [], "rival": []}
    for _ in range(arguments.rounds):
        times["ours"].append(ours(arguments.corpus, arguments.config))
        times["rival"].append(rival(arguments.corpus, arguments.rival_python))
    (seconds, loss), (other, other_loss) = [
        map(statistics.median, zip(*pairs, strict=True)) for pairs in times.values()
    ]
    name = (
        f"time to loss, configs/{arguments.config} to {loss:.4f}, against nanoGPT's recipe compiled to {other_loss:.4f}"
    )
    show([Result.of(name, seconds, other, "s")], arguments.json)


if __name__ == "__main__":
    main()
