"""Measures several contenders in turn in the same run, each in a process of its own, and prints their medians.

A contender's process waits while another one works, so that they share neither threads nor memory. `--rival_python`
names the interpreter that has PyTorch, if this one does not.
"""

import argparse
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

from gptjax.host import n_cores

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Result:
    """Medians; less is better. `limit` is the least possible, None where it is not known."""

    work: str
    ours: float
    rival: float | None
    unit: str
    limit: float | None = None

    def row(self) -> str:
        """A row of a table in Markdown."""
        rival, ratio = ("", "") if self.rival is None else (f"{self.rival:.5g}", f"{self.ours / self.rival:.3f}")
        limit = "" if self.limit is None else f"{self.limit:.5g}, {self.limit / self.ours:.2f}"
        return f"| {self.work} | {self.ours:.5g} | {rival} | {self.unit} | {ratio} | {limit} |"


HEADER = "| work | ours | rival | unit | ratio | limit, fraction |\n|---|---|---|---|---|---|"


@cache
def circumstances(rival_python: str = sys.executable) -> dict[str, Any]:
    """What a line of JSON says beside the result: machine, cores, versions, date and command."""

    def ask(python: str, code: str) -> str | None:
        return subprocess.run([python, "-c", code], capture_output=True, text=True).stdout.strip() or None

    device = ask(sys.executable, "import jax; print(jax.devices()[0].device_kind)")
    on_cpu = device == "cpu"
    if on_cpu:
        cpu = dict(re.findall(r"(.+?)\s*: (.*)", Path("/proc/cpuinfo").read_text()))
        device = f"{cpu['model name']} (family {cpu['cpu family']}, model {cpu['model']})"
    options = [option for option in sys.argv[1:] if option != "--json"]
    return {
        "machine": device,
        "cores": n_cores() if on_cpu else None,
        "python": platform.python_version(),
        "jax": ask(sys.executable, "import jax; print(jax.__version__)"),
        "torch": ask(rival_python, "import torch; print(torch.__version__)"),
        "date": date.today().isoformat(),
        "command": shlex.join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *options]),
    }


class Contender:
    """A process that does one piece of work on each turn: `make(**options)` in it gives that piece."""

    def __init__(self, make: str, python: str | None = None, **options: Any):
        command = [python or sys.executable, "-m", "benchmarks.paired", make, json.dumps(options)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)
        self.facts: dict[str, Any] = self._answer()
        self.values: list[float] = []

    def turn(self) -> "Contender":
        with suppress(BrokenPipeError):  # of a process that has ended, as its answer shows
            print(file=self._process.stdin, flush=True)
        self.values.append(self._answer())
        return self

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def _answer(self) -> Any:
        for line in self._process.stdout:
            if line.startswith("answer "):
                return json.loads(line.removeprefix("answer "))
        self._process.communicate()
        raise SystemExit(f"{' '.join(self._process.args[2:])} ended with exit code {self._process.returncode}")

    def __enter__(self) -> "Contender":
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.communicate()


def in_turn(makers: Sequence[Callable[[], Contender]], rounds: int, required: int = 1) -> list[Any]:
    """Start all contenders, let each work once unmeasured, then in turn for so many rounds.

    The first `required` must finish. Another that ends before, such as a rival that is not installed, becomes None.
    """

    def tried(i: int, work: Callable[[], Contender]) -> Contender | None:
        try:
            return work()
        except SystemExit as error:
            if i < required:
                raise
            print(f"left out: {error}", file=sys.stderr)
            return None

    with ExitStack() as stack:
        contenders = [tried(i, lambda make=make: stack.enter_context(make())) for i, make in enumerate(makers)]
        for _ in range(rounds + 1):
            contenders = [each and tried(i, each.turn) for i, each in enumerate(contenders)]
        for each in filter(None, contenders):
            del each.values[0]
        return contenders


def parser(what: str, works: Sequence[str], default: Sequence[str] | None = None) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--json", action="store_true", help="print one JSON object a line in place of a table")
    parser.add_argument("--rounds", type=int, default=5, help="of which medians are taken")
    parser.add_argument(
        "--works", nargs="+", default=list(default or works), choices=works, metavar="WORK", help=", ".join(works)
    )
    parser.add_argument("--rival_python", default=sys.executable, help="an interpreter that has PyTorch")
    return parser


def show(results: Sequence[Result], arguments: argparse.Namespace, header: bool = True) -> None:
    """Print results, as rows of a table or as lines for benchmarks/results."""
    if header and not arguments.json:
        print(HEADER)
    extra = circumstances(arguments.rival_python) if arguments.json else {}
    for result in results:
        print(json.dumps(asdict(result) | extra) if arguments.json else result.row(), flush=True)


def _work(make: str, options: str) -> None:
    """In a contender's process: `make` is module:function of this package and returns (facts, function)."""
    module, _, name = make.partition(":")
    if name.startswith("our_"):  # as each command begins
        from gptjax.host import keep_freed_memory

        keep_freed_memory()
    facts, function = getattr(__import__(f"benchmarks.{module}", fromlist=[name]), name)(**json.loads(options))
    print("answer", json.dumps(facts), flush=True)
    for _ in sys.stdin:
        print("answer", function(), flush=True)


if __name__ == "__main__":
    _work(*sys.argv[1:])
