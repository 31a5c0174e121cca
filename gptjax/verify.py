"""Verify that a run's files are what it computed: python -m gptjax.verify out/shakespeare

All checksums are verified, config.json is compared with the config of every checkpoint, and recorded steps are computed
again from a kept state: the rows of metrics.csv, the parameters and the optimizer state have to agree bit for bit. If
hardware, versions, code or environment variables are not the run's, they have to agree within 1%. The exit code is 0 if
they do, 1 if something differs, and 2 if nothing can be verified.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gptjax.__main__ import run_command
from gptjax.cli import parse_arguments, program
from gptjax.config import Section, argument, option
from gptjax.errors import UserError
from gptjax.host import use_cores

# What needs JAX is imported where it is used: --help and a mistake in an option do not wait for it.


@dataclass(frozen=True)
class Arguments(Section):
    """The options of `gptjax verify`."""

    run: str = argument("folder of a run")
    steps: str | None = option(
        None,
        "A:B, to compute again up to step B from the newest checkpoint at or before step A (0: from the start); none: "
        "from the last checkpoint but one to the last, or from the only one to the end of metrics.csv",
    )

    def validate(self) -> None:
        self.require(self.steps is None or self.range is not None, "steps", "is not A:B with steps A < B")

    @property
    def range(self) -> tuple[int, int] | None:
        """The steps A and B of `steps`; None if it is not A:B with A < B."""
        first, _, last = (self.steps or "").partition(":")
        known = max(len(first), len(last)) < 16 and first.isdecimal() and last.isdecimal() and int(first) < int(last)
        return (int(first), int(last)) if known else None


def main(argv: Sequence[str]) -> int:
    """Verify a run; return 0 if everything agrees, else 1."""
    arguments = parse_arguments(program("verify"), __doc__, argv, Arguments())
    from gptjax.reporting import environment
    from gptjax.run_dir import holds_run, saved_config
    from gptjax.verification import verify

    folder = Path(arguments.run)
    if not holds_run(folder):
        raise UserError(f"{folder} holds no run with a checkpoint")
    config, starts = saved_config(folder), environment.read(folder)
    on_cpu = [start["hardware"]["devices"] for start in starts if start["hardware"].get("kind") == "cpu"]
    on_mesh = 0 if starts else math.prod(vars(config.mesh).values())
    use_cores(config.train.micro_batch_size, max(0, on_mesh, *on_cpu))
    return verify(folder, starts, arguments.range)


if __name__ == "__main__":
    run_command("verify")
