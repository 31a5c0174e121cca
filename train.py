"""Train a GPT. What a config file sets can be set here too, and wins. Ctrl-C saves and stops; --resume goes on."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gptjax.config import Config, Parser, Section, load_config_file, option
from gptjax.errors import UserError, one_line_errors
from gptjax.host import use_cores
from gptjax.loop import train
from gptjax.run import holds_run, new_run_dir, newest_run


@dataclass(frozen=True)
class Arguments(Section):
    config: str | None = option(None, "Python file that builds a `config`; none: the defaults below")
    out_dir: str | None = option(None, "the run's folder; none: out/NAME, where NAME is the config file's")
    resume: bool = option(False, "continue the run in --out_dir, or else the newest one of this config")
    cpu_devices: int | None = option(
        None, "CPU devices; none: those of the mesh, or as many as there are cores and as divide a batch evenly"
    )

    def validate(self) -> None:
        self.require(self.cpu_devices is None or self.cpu_devices > 0, "cpu_devices", "is not positive")

    def run_dir(self) -> Path:
        name = Path(self.config).stem if self.config else None
        if not self.resume:
            return new_run_dir(name or "default", self.out_dir)
        path = Path(self.out_dir) if self.out_dir else newest_run(name)
        if not holds_run(path):
            raise UserError(f"{path} holds no run with a checkpoint to resume; leave --resume out to start one there")
        return path


def main(argv: Sequence[str]) -> int:
    first, parser = Parser("train.py", None, add_help=False), Parser("train.py", __doc__)
    first.add_fields(Arguments())
    helping = bool({"-h", "--help"} & set(argv))
    [arguments] = first.parse(argv, Arguments(), strict=False)
    run_dir = Path() if helping else arguments.run_dir()
    config = Config.from_json(run_dir / "config.json") if arguments.resume and not helping else Config()
    if arguments.config:
        config = load_config_file(Path(arguments.config))
    parser.add_fields(arguments)
    parser.add_fields(config)
    _, config = parser.parse(argv, arguments, config)
    on_mesh = max(0, config.mesh.data * config.mesh.fsdp * config.mesh.tensor)  # 0 where one of them is the rest
    use_cores(config.train.batch_size // config.train.accumulate, arguments.cpu_devices or on_mesh)
    return train(config, run_dir, arguments.resume)


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main(sys.argv[1:]))
