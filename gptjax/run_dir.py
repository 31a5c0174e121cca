"""The run directory: the config, tokenizer, checkpoints and metrics of a run in one self-contained folder."""

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
    """The folder for a new run: `out_dir`, or else the first of out/NAME, out/NAME-2, out/NAME-3, ... without a run.

    Raises `UserError` if `out_dir` already holds a run.
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
    """Whether `path` holds a run with any checkpoint."""
    return _has_checkpoint(path, "*")


def can_resume(path: Path) -> bool:
    """Whether `path` holds a run that can continue. A run that was killed before its first save cannot."""
    return _has_checkpoint(path, "latest")


def _has_checkpoint(path: Path, which: str) -> bool:
    steps = (path / "checkpoints").glob(f"{which}/*")
    return (path / "config.json").exists() and any(step.name.isdecimal() for step in steps)


def newest_run(name: str | None = None) -> Path:
    """The run in out/ that saved last; with a name, among out/NAME, out/NAME-2, out/NAME-3, ...

    Raises `UserError` if there is none.
    """
    fits = re.compile(f"{re.escape(name)}(-[0-9]+)?" if name else ".*")
    runs = [path for path in Path("out").glob("*") if fits.fullmatch(path.name) and holds_run(path)]
    if not runs:
        raise UserError(f"no run in {Path('out', name or '')}; train one with train.py or name its folder")
    return max(runs, key=lambda path: max(p.stat().st_mtime for p in (path / "checkpoints").iterdir()))


def load_run(path: Path, which: Literal["best", "latest"]) -> tuple[Config, Any, Tokenizer]:
    """The config, parameters (on the default device) and tokenizer of a run; `UserError` if any cannot be read."""
    config = Config.from_json(path / "config.json")
    abstract = with_shardings(one_device(), jax.eval_shape(lambda: init_state(config)).params)
    trees, _ = Checkpoints(path / "checkpoints" / which, read_only=True).restore(params=abstract)
    return config, trees["params"], Tokenizer.load(path / "tokenizer.json")


def trained_tokens(path: Path, which: Literal["best", "latest"]) -> int:
    """The tokens that a run's checkpoint was trained on, those of every epoch counted."""
    config = Config.from_json(path / "config.json")
    step = Checkpoints(path / "checkpoints" / which, read_only=True).step or 0
    return step * config.train.batch_size * config.model.block_size


def require_resumable(saved: Config, config: Config) -> None:
    """Raise `UserError` with the field that keeps `config` from continuing exactly the run that has `saved`."""
    old, new = flat(saved), flat(config)
    for name in old:
        if not field_metadata(name)["free_on_resume"] and old[name] != new[name]:
            raise UserError(
                f"cannot resume with {name}={new[name]}: the run has {old[name]}; "
                f"pass --{name} {old[name]} or start a new run (without --resume, with another --out_dir)"
            )
    if saved.mesh != config.mesh:
        print(f"note: the mesh of the run was {saved.mesh} and is now {config.mesh}: equal up to rounding only")
    before, after = [c.optimizer.decay_steps or c.train.max_steps for c in (saved, config)]
    if before != after:
        raise UserError(
            f"cannot resume with train.max_steps={config.train.max_steps}: it would move the end of the learning-rate "
            f"decay from step {before} to {after}; to continue at the final learning rate pass "
            f"--optimizer.decay_steps {before}"
        )
