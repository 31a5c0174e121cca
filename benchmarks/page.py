"""A table in Markdown and a picture of results: python -m benchmarks.page results.jsonl docs/benchmarks.png

results.jsonl has the lines that the benchmarks print with --json; of two with one name the later one counts.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt

from benchmarks.paired import HEADER, Result


def read(path: Path) -> list[Result]:
    results = [Result(**json.loads(line)) for line in path.read_text().splitlines() if line.startswith("{")]
    return list({result.name: result for result in results}.values())


def plot(results: Sequence[Result], path: Path) -> None:
    """How many times faster than each rival, and how near to the limit, a bar a result."""
    matplotlib.use("Agg")
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(13, 0.42 * len(results) + 1.2), sharey=True, width_ratios=(3, 1), layout="constrained"
    )
    places, times = range(len(results)), [1 / result.ratio for result in results]
    left.barh(places, times, color=["tab:blue" if x >= 1 else "tab:red" for x in times])
    left.set_xscale("log")
    left.axvline(1, color="black", linewidth=1)
    for place, x in zip(places, times, strict=True):
        left.text(x, place, f" {x:.3g}x", va="center", fontsize=8)
    left.set_yticks(places, [result.name for result in results], fontsize=8)
    left.invert_yaxis()
    left.set_xlabel("times faster than the rival")
    left.margins(x=0.12)
    right.barh(places, [result.fraction_of_limit or 0 for result in results], color="tab:gray")
    right.set_xlim(0, 1)
    right.set_xlabel("fraction of the measured limit")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(lines: str, picture: str) -> None:
    results = read(Path(lines))
    print("\n".join([HEADER, *(result.row() for result in results)]))
    plot(results, Path(picture))


if __name__ == "__main__":
    main(*sys.argv[1:])
