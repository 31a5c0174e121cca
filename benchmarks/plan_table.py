"""Write the table of docs/plan.md: python -m benchmarks.plan_table

Makes the plans that benchmarks/plans.jsonl lacks, each in about a minute, in an environment with gptjax[plan].
"""

import importlib.metadata
import json
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.page import splice
from benchmarks.paired import ROOT

PLANS = ROOT / "benchmarks" / "plans.jsonl"
# Hardware for ten billion tokens: micro-steps of 8 to 32 windows a chip, and dollars per chip-hour (docs/plan.md).
AFFORDABLE = (
    "--topology v5e-8 --train.accumulate 8 --price 1.2",
    "--topology v6e-8 --train.accumulate 8 --price 2.7",
    "--topology h100:8 --train.accumulate 2 --price 2.69",
    "--topology rtx4090:1 --train.accumulate 32 --price 0.34",
)
ROWS = (
    "--config configs/gpt2_124m.py --topology v5e:4x4",
    "--config configs/llama_7b.py --topology v5p:4x4x4 --mesh 4x16x1",
    *(f"--config configs/gpt2_124m_10b.py {hardware}" for hardware in AFFORDABLE),
    *(f"--config configs/gpt2_124m_muon.py {hardware}" for hardware in AFFORDABLE),
)
HEADS = (
    "config | chips | mesh | micro-steps, remat | HBM, GiB | step, ms | k tokens/s | MFU | hours | chip-hours | cost "
    "| links, GB"
)


def plan(options: str) -> dict[str, Any]:
    """The plan as JSON, with its command, the versions and the date."""
    print(options, file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "gptjax.plan", "--json", *options.split()]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
    return {"command": options, "date": date.today().isoformat(), **versions, **json.loads(result.stdout)}


def row(made: dict[str, Any]) -> str:
    name = Path(made["command"].split()[1]).stem
    micro = f"{made['accumulate']}, {made['model']['remat']}"
    mesh = " x ".join(str(size) for size in made["mesh"].values())
    memory = f"{made['hbm_bytes'] / 2**30:.1f} of {made['hbm_capacity_bytes'] / 2**30:.1f}"
    start = f"| {name} | {made['topology']} | {mesh} | {micro} | {memory} |"
    if not made["fits"]:
        return f"{start} does not fit | | | | | | |"
    bound = max(made["seconds"], key=lambda name: made["seconds"][name])
    least, most = made["run"], made["run_serial"]
    pairs = [
        f"{made['roofline_seconds'] * 1e3:,.0f} to {made['serial_seconds'] * 1e3:,.0f}, {bound}",
        f"{made['tokens_per_second'] / 1e3:,.0f} to {made['tokens_per_second_serial'] / 1e3:,.0f}",
        f"{made['mfu_ceiling']:.2f} to {made['mfu_serial']:.2f}",
        f"{least['hours']:,.1f} to {most['hours']:,.1f}",
        f"{least['chip_hours']:,.0f} to {most['chip_hours']:,.0f}",
        "" if least["cost"] is None else f"${least['cost']:,.0f} to ${most['cost']:,.0f}",
        f"{sum(each['bytes'] for each in made['collectives']) / 1e9:.1f}",
    ]
    return f"{start} " + " | ".join(pairs) + " |"


def read() -> dict[str, Any]:
    """The plans that were made, by their options."""
    lines = PLANS.read_text().splitlines() if PLANS.exists() else []
    return {made["command"]: made for made in map(json.loads, lines)}


def table(found: dict[str, Any]) -> str:
    return "\n".join([f"| {HEADS} |", "|---" * 12 + "|", *(row(found[options]) for options in ROWS)])


def main() -> None:
    found = read()
    for options in ROWS:
        if options not in found:
            found[options] = plan(options)
            PLANS.write_text("".join(json.dumps(made) + "\n" for made in found.values()))
    splice(ROOT / "docs" / "plan.md", table(found))


if __name__ == "__main__":
    main()
