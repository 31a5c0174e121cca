"""Write the tables of docs/performance.md from benchmarks/results/*.jsonl: python -m benchmarks.page

Those files have the lines that the benchmarks print with --json: one result a line, with what it was measured on.
"""

import json
from itertools import groupby
from pathlib import Path
from string import ascii_lowercase
from typing import Any

from benchmarks.paired import HEADER, ROOT, Result

BEGIN, END = "<!-- written by benchmarks/, not by hand -->\n", "<!-- end -->\n"
RESULT, RUN = ("work", "ours", "rival", "unit", "limit"), ("date", "python", "jax", "torch", "command")


def splice(page: Path, text: str) -> None:
    """Replace what stands between the two markers of a page."""
    old = page.read_text()
    page.write_text(f"{old[: old.index(BEGIN)]}{BEGIN}\n{text}\n\n{old[old.index(END) :]}")


def table(lines: list[dict[str, Any]]) -> str:
    """The results of one machine, and below them the date, versions and command that each row's letter stands for."""
    runs = list(dict.fromkeys(tuple(line[key] for key in RUN) for line in lines))
    letters = [ascii_lowercase[i % 26] * (1 + i // 26) for i in range(len(runs))]  # a to z, aa, bb
    top, rule = HEADER.split("\n")
    rows = [f"{top} run |", f"{rule}---|"]
    for line in lines:
        letter = letters[runs.index(tuple(line[key] for key in RUN))]
        rows.append(f"{Result(*(line[key] for key in RESULT)).row()} {letter} |")
    notes = []
    for letter, (date, python, jax, torch, command) in zip(letters, runs, strict=True):
        versions = f"Python {python}, jax {jax}" + (f", PyTorch {torch}" if torch else "")
        notes.append(f"- {letter}: {date}, {versions}" + (f": `{command}`" if command else ""))
    return "\n".join([*rows, "", *notes])


def main() -> None:
    files = sorted((ROOT / "benchmarks" / "results").glob("*.jsonl"))
    lines = [json.loads(line) for path in files for line in path.read_text().splitlines()]
    tables = []
    for (machine, cores), group in groupby(lines, lambda line: (line["machine"], line["cores"])):
        tables.append(f"### {machine}" + (f", {cores} cores" if cores else "") + f"\n\n{table(list(group))}")
    splice(ROOT / "docs" / "performance.md", "\n\n".join(tables))


if __name__ == "__main__":
    main()
