"""The table of docs/plan.md: python -m benchmarks.plan_table plans.jsonl

Plans each big config for each of five machines, about a minute each, and prints the table in Markdown. Plans that the
file has already are not made again, so that a run which was stopped goes on. Wants an environment with gptjax[plan].
"""

import json
import subprocess
import sys
from pathlib import Path

MACHINES = ("v5e-8", "v5e-256", "v5p-128", "v6e-64", "h100:8")
# Windows on a chip at a time on v5e (four times as many on v5p and H100, twice on v6e), and remat.
CONFIGS = {
    "gpt2_124m": (8, "dots"),
    "gpt2_350m": (8, "dots"),
    "gpt2_774m": (4, "dots"),
    "gpt2_1558m": (4, "full"),
    "llama_7b": (1, "full"),
}
MESHES = {
    "v5e-8": "1x8x1",
    "v5e-256": "16x16x1",
    "v5p-128": "4x16x1",
    "v6e-64": "8x8x1",
    "h100:8": "1x8x1",
}


def options(config: str, machine: str) -> list[str]:
    """Of the command that plans a config for a machine."""
    rows, remat = CONFIGS[config]
    mesh = "1x256x1" if (config, machine) == ("llama_7b", "v5e-256") else MESHES[machine]
    data, fsdp, _ = map(int, mesh.split("x"))
    batch = 1024 if config == "llama_7b" else 512
    rows *= {"v5p-128": 4, "h100:8": 4, "v6e-64": 2}.get(machine, 1)
    accumulate = max(1, batch // (rows * data * fsdp))
    return [
        *("--config", f"configs/{config}.py", "--topology", machine, "--mesh", mesh),
        *("--model.remat", remat, "--train.accumulate", str(accumulate)),
    ]


def plan(command: list[str]) -> dict[str, object]:
    result = subprocess.run(
        [sys.executable, "-m", "gptjax.plan", "--json", *command],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return {"command": command, **json.loads(result.stdout.splitlines()[-1])}


def row(made: dict) -> str:
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


def main(path: Path) -> None:
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for config in CONFIGS:
        for machine in MACHINES:
            command = options(config, machine)
            if command not in [made["command"] for made in done]:
                print(" ".join(command), file=sys.stderr, flush=True)
                done.append(plan(command))
                path.write_text("".join(json.dumps(made) + "\n" for made in done))
    order = [options(config, machine) for config in CONFIGS for machine in MACHINES]
    heads = "config, hardware, mesh, micro-steps and remat, HBM (GiB a chip), step (ms), 1000 tokens/s, MFU, chip-hours"
    print("| " + " | ".join([*heads.split(", "), "GB over links"]) + " |\n" + "|---" * 10 + "|")
    for command in order:
        print(row(next(made for made in done if made["command"] == command)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
