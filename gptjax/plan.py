"""Plan a run for hardware that is not here: python -m gptjax.plan --config configs/gpt2_124m.py --topology v5e:4x4

Compiles the training step with the hardware's own compiler and prints whether it fits, how fast it can be at best and
what the run costs. Needs an environment with the extra `plan`. Every field of a config is an option, as in train.py.
"""

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gptjax.__main__ import run_command
from gptjax.cli import Parser, load_config_file, program
from gptjax.config import Config, MeshConfig, Section, option

# What needs JAX is imported where it is used: --help and a mistake in an option do not wait for it.


@dataclass(frozen=True)
class Arguments(Section):
    """The options of `gptjax plan`."""

    config: str | None = option(
        None,
        "Python file that builds a `config`, or the name of one of gptjax's, such as gpt2_124m; none: the defaults",
        metavar="PATH",
    )
    topology: str = option(
        "v5e:4x4", "as v5e:4x4, v5e-16, v5e:16x16x2 (two slices), h100:8, h100:2x8 (nodes x GPUs), rtx4090:1"
    )
    mesh: str | None = option(None, "data x fsdp x tensor, as 1x16x1; none: the mesh fields below")
    price: float | None = option(None, "dollars per chip-hour")
    search: bool = option(False, "try micro-batches, remat and meshes, and recommend the fastest that fits")
    breakdown: bool = option(False, "list memory traffic and instructions by part of the model, and the largest")
    json: bool = option(False, "print one JSON object only")

    def validate(self) -> None:
        shape = self.mesh is None or re.fullmatch(r"\d+x\d+x\d+", self.mesh)
        self.require(bool(shape), "mesh", "is not DATAxFSDPxTENSOR, as 1x16x1")
        self.require(self.price is None or self.price >= 0, "price", "is negative")


def main(argv: Sequence[str]) -> None:
    """Print the plan of a run on hardware that need not be here."""
    name = program("plan")
    first, parser = Parser(name, None, add_help=False), Parser(name, __doc__, brief=True)
    first.add_fields(Arguments())
    [arguments] = first.parse(argv, Arguments(), strict=False)
    config = load_config_file(Path(arguments.config)) if arguments.config else Config()
    parser.add_fields(arguments)
    parser.add_fields(config)
    arguments, config = parser.parse(argv, arguments, config)
    from gptjax.planning.page import to_json, to_text
    from gptjax.planning.plan import complete_config, make_plan, search
    from gptjax.planning.topology import find_topology
    from gptjax.progress import working

    topology = find_topology(arguments.topology)
    config = complete_config(config, topology.devices[0])
    if arguments.mesh:
        config = replace(config, mesh=MeshConfig(*map(int, arguments.mesh.split("x"))))
    if arguments.search:
        plan = search(config, topology, sys.stderr if arguments.json else sys.stdout)
    else:
        with working(f"compiling the step for {topology.name}", say=True):
            plan = make_plan(config, topology)
    if arguments.json:
        print(json.dumps(to_json(plan, arguments.price)))
    else:
        print(to_text(plan, arguments.config or "the default config", arguments.price, arguments.breakdown))


if __name__ == "__main__":
    run_command("plan")
