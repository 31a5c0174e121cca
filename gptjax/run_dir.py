"""The run directory: a run's config, tokenizer, checkpoints and metrics in one folder that needs nothing else."""

import re
from pathlib import Path
from typing import Any, Literal

import jax

from gptjax.checkpoint import Checkpoints
from gptjax.config import Config, field_metadata, flat
from gptjax.errors import UserError
from gptjax.sharding import one_device, with_shardings
from gptjax.tokenizer import Tokenizer
from gptjax.training import init_state


def new_run_dir(name: str, out_dir: str | None) -> Path:
    """A folder for a new run: `out_dir`, else the first of out/NAME, out/NAME-2, out/NAME-3, ... that holds none.

    Raises:
        UserError: `out_dir` already holds a run.
    """
    if out_dir is not None:
        if holds_run(Path(out_dir)):
            raise UserError(f"{out_dir} already holds a run; continue it with --resume or choose another --out_dir")
        return Path(out_dir)
    path, number = Path("out") / name, 1
    while holds_run(path):
        number += 1
        path = Path("out") / f"{name}-{number}"
    return path


def holds_run(path: Path) -> bool:
    """Whether there is a run with a checkpoint in `path`."""
    return (path / "config.json").exists() and any(step.name.isdecimal() for step in (path / "checkpoints").glob("*/*"))


def can_resume(path: Path) -> bool:
    """Whether there is a run in `path` that can go on; one that was killed before its first save cannot."""
    latest = path / "checkpoints" / "latest"
    return (path / "config.json").exists() and any(step.name.isdecimal() for step in latest.glob("*"))


def newest_run(name: str | None = None) -> Path:
    """The run in out/ whose checkpoints changed last; with a name, of out/NAME, out/NAME-2, out/NAME-3, ...

    Raises:
        UserError: there is none.
    """
    fits = re.compile(f"{re.escape(name)}(-[0-9]+)?" if name else ".*")
    runs = [path for path in Path("out").glob("*") if fits.fullmatch(path.name) and holds_run(path)]
    if not runs:
        raise UserError(f"no run in {Path('out', name or '')}; train one with train.py or name its folder")
    return max(runs, key=lambda path: max(p.stat().st_mtime for p in (path / "checkpoints").iterdir()))


def load_run(path: Path, which: Literal["best", "latest"]) -> tuple[Config, Any, Tokenizer]:
    """Config, parameters (on the default device) and tokenizer of a run.

    Raises:
        UserError: `path` holds no such run, or its checkpoint is damaged.
    """
    config = Config.from_json(path / "config.json")
    abstract = with_shardings(one_device(), jax.eval_shape(lambda: init_state(config)).params)
    trees, _ = Checkpoints(path / "checkpoints" / which, read_only=True).restore(params=abstract)
    return config, trees["params"], Tokenizer.load(path / "tokenizer.json")


def trained_tokens(path: Path, which: Literal["best", "latest"]) -> int:
    """How many tokens a run's checkpoint was trained on, those of every epoch counted."""
    config = Config.from_json(path / "config.json")
    step = Checkpoints(path / "checkpoints" / which, read_only=True).step or 0
    return step * config.train.batch_size * config.model.block_size


def require_resumable(saved: Config, config: Config) -> None:
    """Raise `UserError`, naming the field, where `config` would not continue exactly what `saved` began."""
    old, new = flat(saved), flat(config)
    for name in old:
        if not field_metadata(name)["free_on_resume"] and old[name] != new[name]:
            raise UserError(
                f"cannot resume with {name}={new[name]}: the run has {old[name]}; "
                f"pass --{name} {old[name]} or start a new run (without --resume, with another --out_dir)"
            )
    if saved.mesh != config.mesh:
        print(f"note: the run was on {saved.mesh}, now it is on {config.mesh}: equal up to rounding, not bit for bit")
    if decay_end(saved) != decay_end(config):
        raise UserError(
            f"cannot resume with train.max_steps={config.train.max_steps}: it would move the end of the learning-rate "
            f"decay from step {decay_end(saved)} to {decay_end(config)}; to train on at the floor pass "
            f"--optimizer.decay_steps {decay_end(saved)}"
        )


def decay_end(config: Config) -> int:
    """The step at which the learning rate reaches its floor."""
    return config.optimizer.decay_steps or config.train.max_steps
