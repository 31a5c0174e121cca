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
# Windows on a chip at a time on v5e (four times as many on v5p, twice on v6e), and remat.
CONFIGS = {
    "gpt2_124m": (8, "dots"),
    "gpt2_350m": (8, "dots"),
    "gpt2_774m": (4, "dots"),
    "gpt2_1558m": (4, "full"),
    "llama_7b": (1, "full"),
}
MESHES = {"v5e-8": "1x8x1", "v5e-256": "16x16x1", "v5p-128": "4x16x1", "v6e-64": "8x8x1"}
ROWS = [
    *(("gpt2_124m", machine) for machine in MESHES),
    *((config, "v5e-8") for config in ("gpt2_350m", "gpt2_774m", "gpt2_1558m")),
    *(("llama_7b", machine) for machine in ("v5e-256", "v5p-128")),
]
HEADS = (
    "config | hardware | mesh | micro-steps, remat | HBM, GiB | step, ms | 1000 tokens/s | MFU | chip-hours | links, GB"
)


def options(config: str, machine: str) -> list[str]:
    """The options of the command that plans a config for a machine."""
    rows, remat = CONFIGS[config]
    mesh = "1x256x1" if (config, machine) == ("llama_7b", "v5e-256") else MESHES[machine]
    data, fsdp, _ = map(int, mesh.split("x"))
    batch = 1024 if config == "llama_7b" else 512
    rows *= {"v5p-128": 4, "v6e-64": 2}.get(machine, 1)
    accumulate = max(1, batch // (rows * data * fsdp))
    return [
        *("--config", f"configs/{config}.py", "--topology", machine, "--mesh", mesh),
        *("--model.remat", remat, "--train.accumulate", str(accumulate)),
    ]


def plan(command: list[str]) -> dict[str, Any]:
    """The plan as JSON, with the command, the versions and the date."""
    print(" ".join(command), file=sys.stderr, flush=True)
    python = [sys.executable, "-m", "gptjax.plan", "--json", *command]
    result = subprocess.run(python, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
    return {"command": command, "date": date.today().isoformat(), **versions, **json.loads(result.stdout)}


def row(made: dict[str, Any]) -> str:
    name = Path(made["command"][1]).stem
    micro = f"{made['accumulate']}, {made['model']['remat']}"
    mesh = " x ".join(str(size) for size in made["mesh"].values())
    memory = f"{made['hbm_bytes'] / 2**30:.1f} of {made['hbm_capacity_bytes'] / 2**30:.1f}"
    start = f"| {name} | {made['topology']} | {mesh} | {micro} | {memory} |"
    if not made["fits"]:
        return f"{start} does not fit | | | | |"
    bound = max(made["seconds"], key=lambda name: made["seconds"][name])
    pairs = [
        f"{made['roofline_seconds'] * 1e3:,.0f} to {made['serial_seconds'] * 1e3:,.0f}, {bound}",
        f"{made['tokens_per_second'] / 1e3:,.0f} to {made['tokens_per_second_serial'] / 1e3:,.0f}",
        f"{made['mfu_ceiling']:.2f} to {made['mfu_serial']:.2f}",
        f"{made['run']['chip_hours']:,.0f} to {made['run_serial']['chip_hours']:,.0f}",
        f"{sum(each['bytes'] for each in made['collectives']) / 1e9:.1f}",
    ]
    return f"{start} " + " | ".join(pairs) + " |"


def main() -> None:
    done = [json.loads(line) for line in PLANS.read_text().splitlines()] if PLANS.exists() else []
    found = {tuple(made["command"]): made for made in done}
    for command in (tuple(options(*pair)) for pair in ROWS):
        if command not in found:
            found[command] = plan(list(command))
            PLANS.write_text("".join(json.dumps(made) + "\n" for made in found.values()))
    rows = [f"| {HEADS} |", "|---" * 10 + "|", *(row(found[tuple(options(*pair))]) for pair in ROWS)]
    splice(ROOT / "docs" / "plan.md", "\n".join(rows))


if __name__ == "__main__":
    main()
