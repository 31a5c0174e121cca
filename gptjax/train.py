"""Train a GPT. Options override the config file. Ctrl-C saves and stops; --resume continues."""

import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from gptjax.__main__ import run_command
from gptjax.cli import Parser, load_config_file, program
from gptjax.config import Config, Section, option
from gptjax.errors import UserError
from gptjax.files import locked

# What needs JAX is imported where it is used: --help and a mistake in an option do not wait for it.

NEWEST = -1  # what --resume without a step means
QUESTION = "Who are you?"
run, cluster = partial(option, group="run"), partial(option, group="cluster")  # groups of --help


@dataclass(frozen=True)
class Arguments(Section):
    """The options of `gptjax train` beside those of the config."""

    config: str | None = run(
        None,
        "Python file that builds a `config`, or the name of one of gptjax's, such as shakespeare; none: the defaults",
        metavar="PATH",
    )
    out_dir: str | None = run(None, "the run's folder; none: out/NAME, where NAME is the config file's", metavar="PATH")
    resume: int | None = run(
        None,
        "continue the run in --out_dir, or else the newest one of this config; with a number, from the checkpoint of "
        "that step instead of the newest one",
        const=NEWEST,
        metavar="STEP",
    )
    auto_resume: bool = run(
        False, "--resume if --out_dir holds a run that can go on, else begin it: for jobs that a cluster starts again"
    )
    eval_only: bool = run(
        False, "print the validation loss of the run in --out_dir, or of --init_from's weights, and train nothing"
    )
    cpu_devices: int | None = cluster(
        None,
        "CPU devices of a process; none: as many as the mesh options ask for, or else one for a large model with few "
        "tokens a step, or one for each core, as far as they divide a batch evenly",
    )
    coordinator: str | None = cluster(
        None,
        "address of process 0, for several processes that train one model where JAX does not detect the cluster",
        metavar="HOST:PORT",
    )
    num_processes: int | None = cluster(None, "how many processes train; 1: this one alone, whatever the cluster says")
    process_id: int | None = cluster(None, "which of them this is, from 0")

    def validate(self) -> None:
        for name in ("cpu_devices", "num_processes"):
            self.require(getattr(self, name) is None or getattr(self, name) > 0, name, "is not positive")
        known = self.process_id is None or 0 <= self.process_id < (self.num_processes or 0)
        self.require(known, "process_id", f"is not in [0, num_processes={self.num_processes})")
        address = self.coordinator is None or re.fullmatch(r".+:\d+", self.coordinator)
        self.require(bool(address), "coordinator", "is not HOST:PORT")
        self.require(self.out_dir is not None or not self.auto_resume, "auto_resume", "takes an --out_dir")
        self.require(self.out_dir != "", "out_dir", "names no folder")
        self.require((self.resume or 0) >= NEWEST, "resume", "is negative")

    def run_dir(self, lock: ExitStack) -> Path:
        """The folder of the run to continue, or of a new one, locked until `lock` closes.

        Raises:
            UserError: there is none to continue, or one where a new one should be, or another process writes there.
        """
        from gptjax.run_dir import can_resume, new_run_dir, newest_run

        if self.eval_only and self.resume is None:
            return Path(self.out_dir or ".")
        name = Path(self.config).stem if self.config else None
        automatic = self.auto_resume and self.out_dir is not None and can_resume(Path(self.out_dir))
        if self.resume is None and not automatic:
            return new_run_dir(name or "default", self.out_dir, lock)
        path = Path(self.out_dir) if self.out_dir else newest_run(name)
        if not can_resume(path):
            raise UserError(f"{path} holds no run with a checkpoint to resume; leave --resume out to start one there")
        if not self.eval_only:
            lock.enter_context(locked(path))
        return path


def sample(run_dir: Path, step: int) -> str:
    """A text of the parameters of this step's checkpoint, for the report; of conversations the answer to `QUESTION`."""
    from gptjax.inference.language_model import LanguageModel
    from gptjax.inference.sampling import Sampling
    from gptjax.run_dir import saved_config

    model, chat = LanguageModel.load(str(run_dir), step), saved_config(run_dir).data.format == "chat"
    prompt = model.chat_prompt([{"role": "user", "content": QUESTION}]) if chat else model.tokenizer.prompt()
    *_, [answer] = model.answer([prompt], 400, Sampling(temperature=0.8), seeds=[0])
    text = answer.text.strip("\n")
    return f"> {QUESTION}\n\n{text}" if chat else text


def main(argv: Sequence[str]) -> int:
    """Train as the command line says; return the exit code, that of `loop.train`."""
    [arguments] = _parser(Arguments()).parse(argv, Arguments(), strict=False)
    given = load_config_file(Path(arguments.config)) if arguments.config else None
    _parser(Arguments(), given or Config(), add_help=True).parse(argv)  # --help, or an option that is mistaken
    return _train(arguments, given, argv)


def _parser(*defaults: Section, add_help: bool = False) -> Parser:
    parser = Parser(program("train"), __doc__, add_help, brief=True)
    for each in defaults:
        parser.add_fields(each)
    return parser


def _train(arguments: Arguments, given: Config | None, argv: Sequence[str]) -> int:
    """`given` is the config of --config."""
    from gptjax import cpu, distributed
    from gptjax.host import use_cores
    from gptjax.hub.init_from import open_pretrained, resumed
    from gptjax.loop import evaluate, train
    from gptjax.reporting.trackers import require_trackers
    from gptjax.run_dir import can_resume, saved_config

    named = {argument.removeprefix("--").partition("=")[0] for argument in argv}
    with (
        distributed.joined(arguments.coordinator, arguments.num_processes, arguments.process_id),
        ExitStack() as lock,
    ):
        run_dir = Path(distributed.from_first("folder", lambda: str(arguments.run_dir(lock))))
        resume = distributed.from_first("resume", lambda: str(can_resume(run_dir))) == "True"
        from_step = None if arguments.resume in (None, NEWEST) else arguments.resume
        saved = saved_config(run_dir, step=from_step) if resume else None
        config = given or saved or Config()
        _, config = _parser(arguments, config).parse(argv, arguments, config)
        require_trackers(config)
        on_mesh = config.mesh.data * (config.mesh.fsdp or 1) * config.mesh.tensor  # negative: one of them is the rest
        n_processes = distributed.count()
        wanted = cpu.n_devices(config) if on_mesh == -1 else max(0, on_mesh // n_processes)
        use_cores(config.train.micro_batch_size // n_processes, arguments.cpu_devices or wanted)
        weights = None
        if config.init_from and saved:
            config = resumed(config, saved, run_dir)
        elif config.init_from:
            weights = open_pretrained(config.init_from)
            config = weights.adapt(config)
        if arguments.eval_only:
            evaluate(config, run_dir if resume else None, weights, from_step)
            return 0
        return train(config, run_dir, resume, weights, sample, from_step, named)


if __name__ == "__main__":
    run_command("train")
