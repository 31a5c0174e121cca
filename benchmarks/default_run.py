"""The default run from the command to its report, beside another config in turn: python -m benchmarks.default_run OTHER

OTHER is a config file, such as an earlier one: git show REVISION:configs/shakespeare.py > other.py. Each run has an
empty cache of compiled programs and prepares its data. Losses are those of the whole validation split, in nats a
character, by --eval_only after the run. CPU seconds, user and system, are steadier than seconds where other programs
work.
"""

import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.paired import ROOT, Result, parser, show
from gptjax.data.token_files import open_split
from gptjax.tokenizer import Tokenizer


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run(config: Path, options: list[str], folder: Path) -> tuple[float, float, float]:
    """Seconds, CPU seconds and loss of one run of a config."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": str(folder / "cache")}
    command = [sys.executable, str(ROOT / "train.py"), "--config", str(config), "--out_dir", "run", *options]
    start, used = time.perf_counter(), cpu_seconds()
    subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
    seconds, used = time.perf_counter() - start, cpu_seconds() - used
    command = [sys.executable, str(ROOT / "train.py"), "--eval_only", "--out_dir", "run", "--train.eval_batches", "0"]
    out = subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, text=True).stdout
    [data] = (folder / "data").glob("*/val.bin")
    tokens = open_split(data.parent, "val")
    text = Tokenizer.load(data.parent / "tokenizer.json").decode(tokens.window(0, len(tokens)))
    return seconds, used, float(re.search(r"validation loss ([\d.]+)", out)[1]) * len(tokens) / len(text)


def main() -> None:
    options = parser(__doc__, ("default_run",))
    options.add_argument("other", type=Path, help="a config file")
    options.add_argument("--options", default="", help="more options of train.py, for both")
    arguments = options.parse_args()
    configs = {"ours": ROOT / "configs" / "shakespeare.py", "other": arguments.other.resolve()}
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in configs}
    for _ in range(arguments.rounds):
        for name, config in configs.items():
            with tempfile.TemporaryDirectory() as folder:
                found[name].append(run(config, arguments.options.split(), Path(folder)))
                print(name, *(f"{value:.4g}" for value in found[name][-1]), file=sys.stderr, flush=True)
    medians = [[statistics.median(values) for values in zip(*runs, strict=True)] for runs in found.values()]
    (seconds, used, loss), (other_seconds, other_used, other_loss) = medians
    work = "the default run, from the command to its report"
    to = f"to {loss:.4f} nats a character on the whole split, against {arguments.other.name} to {other_loss:.4f}"
    results = [Result(f"{work}, {to}", seconds, other_seconds, "s")]
    results += [Result(f"{work}, CPU time, {to}", used, other_used, "s")]
    show(results, arguments)


if __name__ == "__main__":
    main()
