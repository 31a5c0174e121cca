"""The run directory: the config, tokenizer, checkpoints and metrics of a run in one self-contained folder."""

import contextlib
import itertools
import re
from collections.abc import Collection
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

from gptjax.checkpoint import Checkpoints
from gptjax.config import Config, field_metadata, flat
from gptjax.errors import UserError
from gptjax.files import LOCK, InUse, locked, read_json
from gptjax.model import param_shapes
from gptjax.sharding import one_device, with_shardings
from gptjax.tokenizer import Tokenizer

# What a run writes in its folder, and other programs may have there.
OWN_FILES = (
    "config.json tokenizer.json environment.json metrics.csv loss.png report.md report.html checkpoints tensorboard"
).split()

CheckpointName = Literal["best", "latest"] | int  # of the best validation loss, the newest, or that of a step


def new_run_dir(name: str, out_dir: str | None, lock: ExitStack) -> Path:
    """The folder for a new run, locked: `out_dir`, or else the first of out/NAME, out/NAME-2, ... without a run.

    Raises `UserError` if `out_dir` already holds a run or other files, or is in use.
    """
    if out_dir is not None:
        path = Path(out_dir)
        _require_vacant(path)
        lock.enter_context(locked(path))
        return path
    for number in itertools.count(1):
        path = Path("out", name if number == 1 else f"{name}-{number}")
        if not holds_run(path):
            with contextlib.suppress(InUse):
                lock.enter_context(locked(path))
                return path
    raise AssertionError


def _require_vacant(path: Path) -> None:
    if can_resume(path):
        raise UserError(f"{path} already holds a run; continue it with --resume or choose another --out_dir")
    if best := [step for step in _steps(path, "best") if step > 0]:
        kept = path / "checkpoints" / "best" / str(best[-1])
        raise UserError(
            f"{path} holds {kept}, but no state of a run to continue: name another --out_dir (to start from these "
            f"parameters: --init_from {path})"
        )
    ours = (path / LOCK).exists()
    with contextlib.suppress(UserError):
        ours |= Config.from_json(path / "config.json") is not None  # of version 0.1, which had no locks
    if taken := [each for each in OWN_FILES if (path / each).exists() and not ours]:
        raise UserError(f"{path} holds another program's {taken[0]}, which a run would replace: name another --out_dir")


def holds_run(path: Path) -> bool:
    """Whether `path` holds a run with any checkpoint."""
    return bool(_steps(path, "*"))


def can_resume(path: Path) -> bool:
    """Whether `path` holds a run that can continue. A run that was killed before its first save cannot."""
    return bool(_steps(path, "latest"))


def _steps(path: Path, which: str) -> list[int]:
    """The steps of the checkpoints in a run's folder, which need not be intact."""
    return sorted(int(step.name) for step in (path / "checkpoints").glob(f"{which}/*") if step.name.isdecimal())


def saved_config(path: Path, which: Literal["best", "latest"] = "latest", step: int | None = None) -> Config:
    """The config of a run's checkpoint, by default of the newest one.

    Each checkpoint carries its config; those of version 0.1 have it in the run's config.json alone. Raises `UserError`
    if none can be read.
    """
    for number in reversed(_steps(path, which)) if step is None else [step]:
        meta = path / "checkpoints" / which / str(number) / "meta" / "metadata"
        with contextlib.suppress(UserError):
            if (values := read_json(meta).get("config")) is not None:
                return Config.from_dict(values, meta)
    return Config.from_json(path / "config.json")


def newest_run(name: str | None = None) -> Path:
    """The run in out/ that saved last; with a name, among out/NAME, out/NAME-2, out/NAME-3, ...

    Raises `UserError` if there is none.
    """
    fits = re.compile(f"{re.escape(name)}(-[0-9]+)?" if name else ".*")
    runs = [path for path in Path("out").glob("*") if fits.fullmatch(path.name) and holds_run(path)]
    if not runs:
        raise UserError(f"no run in {Path('out', name or '')}; train one with train.py or name its folder")
    return max(runs, key=lambda path: max(p.stat().st_mtime for p in (path / "checkpoints").iterdir()))


def load_run(path: Path, which: CheckpointName) -> tuple[Config, Any, Tokenizer]:
    """The config, parameters (on the default device) and tokenizer of a run; `UserError` if any cannot be read.

    A number takes the checkpoint of that step. The run may be training: a checkpoint that it replaces meanwhile is read
    anew.
    """
    name, step = _checkpoint(path, which)
    before = _steps(path, name)
    try:
        config = saved_config(path, name, step)
        abstract = with_shardings(one_device(), param_shapes(config.model))
        trees, meta = Checkpoints(path / "checkpoints" / name, read_only=True).restore(step=step, params=abstract)
    except UserError:
        if _steps(path, name) == before:
            raise
        return load_run(path, which)
    tokenizer = Tokenizer.load(path / "tokenizer.json")
    _, _, vocabulary = [*meta.get("data", "").split(":"), "", ""][:3]  # as Dataset.fingerprint; version 0.1 saved none
    if tokenizer.vocab_size > config.model.vocab_size or vocabulary not in ("", tokenizer.fingerprint()):
        raise UserError(f"{path / 'tokenizer.json'} is not the one that the run was trained with: restore it")
    return config, trees["params"], tokenizer


def _checkpoint(path: Path, which: CheckpointName) -> tuple[Literal["best", "latest"], int | None]:
    """The folder of a checkpoint and, of one that is named by its step, the step."""
    if isinstance(which, str):
        return which, None
    return "best" if which in _steps(path, "best") else "latest", which


def trained_tokens(path: Path, which: CheckpointName) -> int:
    """The tokens that a run's checkpoint was trained on, those of every epoch counted."""
    name, step = _checkpoint(path, which)
    config = saved_config(path, name, step)
    if step is None:
        step = Checkpoints(path / "checkpoints" / name, read_only=True).step or 0
    return step * config.train.batch_size * config.model.block_size


def require_resumable(saved: Config, config: Config, named: Collection[str] = ()) -> None:
    """Raise `UserError` with the field that keeps `config` from continuing exactly the run that has `saved`.

    A remedy against divergence, such as a lower learning rate, is taken with a note where `named`, the fields on the
    command line, has it.
    """
    old, new = flat(saved), flat(config)
    for name in [name for name in old if old[name] != new[name] and not field_metadata(name)["free_on_resume"]]:
        if field_metadata(name)["remedy"] and name in named:
            print(f"note: {name} was {old[name]} and is {new[name]} from here on")
            continue
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
