"""Ours and the others in turn, in the same run: medians, ratios, one JSON line a result.

Each contender is a process of its own that waits while another one works, so that neither has the other's threads,
memory or interpreter: `--rival_python` names the one that has PyTorch, where this one has not.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Result:
    """Medians in `unit`, a time; ratio = ours / rival; `limit` is the least possible, None where it is not known."""

    name: str
    ours: float
    rival: float
    unit: str
    ratio: float
    limit: float | None = None
    fraction_of_limit: float | None = None

    @classmethod
    def of(cls, name: str, ours: float, rival: float, unit: str, limit: float | None = None) -> "Result":
        return cls(name, ours, rival, unit, ours / rival, limit, None if limit is None else limit / ours)

    def row(self) -> str:
        """A row of a table in Markdown."""
        limit = "" if self.limit is None else f"{self.limit:.4g}, {self.fraction_of_limit:.2f}"
        return f"| {self.name} | {self.ours:.4g} | {self.rival:.4g} | {self.unit} | {self.ratio:.3f} | {limit} |"


HEADER = "| work | ours | rival | unit | ratio | limit, fraction |\n|---|---|---|---|---|---|"


class Contender:
    """A process that does one piece of work each time it is told to: `make(**options)` in it gives that piece."""

    def __init__(self, make: str, python: str | None = None, **options: Any):
        command = [python or sys.executable, "-m", "benchmarks.paired", make, json.dumps(options)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)
        self.facts: dict[str, Any] = self._answer()
        self.values: list[float] = []

    def turn(self) -> None:
        print(file=self._process.stdin, flush=True)
        self.values.append(self._answer())

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def _answer(self) -> Any:
        for line in self._process.stdout:
            if line.startswith("answer "):
                return json.loads(line.removeprefix("answer "))
        raise SystemExit(f"{self._process.args} ended with exit code {self._process.wait()}")

    def __enter__(self) -> "Contender":
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.communicate()


def in_turn(makers: Sequence[Callable[[], Contender]], rounds: int) -> list[Contender]:
    """Start every contender, let each work once unmeasured, then in turn for so many rounds."""
    with ExitStack() as stack:
        contenders = [stack.enter_context(make()) for make in makers]
        for _ in range(rounds + 1):
            for contender in contenders:
                contender.turn()
        for contender in contenders:
            del contender.values[0]
        return contenders


def parser(what: str, works: Sequence[str], default: Sequence[str] | None = None) -> argparse.ArgumentParser:
    """The options that all benchmarks have; all works are measured unless told otherwise."""
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--json", action="store_true", help="print one JSON object a line in place of a table")
    parser.add_argument("--rounds", type=int, default=5, help="of which medians are taken")
    parser.add_argument(
        "--works", nargs="+", default=list(default or works), choices=works, metavar="WORK", help=", ".join(works)
    )
    parser.add_argument("--rival_python", default=sys.executable, help="an interpreter that has PyTorch")
    return parser


def show(results: Sequence[Result], as_json: bool, header: bool = True) -> None:
    """Print results as soon as they are there."""
    if header and not as_json:
        print(HEADER)
    for result in results:
        print(json.dumps(asdict(result)) if as_json else result.row(), flush=True)


def _work(make: str, options: str) -> None:
    """In a contender's process: `make` is module:function of this package and returns (facts, function)."""
    module, _, name = make.partition(":")
    facts, function = getattr(__import__(f"benchmarks.{module}", fromlist=[name]), name)(**json.loads(options))
    print("answer", json.dumps(facts), flush=True)
    for _ in sys.stdin:
        print("answer", function(), flush=True)


if __name__ == "__main__":
    _work(*sys.argv[1:])
