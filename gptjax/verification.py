"""Verifies that a run's files are what it computed: checksums, configs, and steps that are computed again."""

import itertools
import math
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from gptjax.checkpoint import Checkpoints
from gptjax.config import Config, MeshConfig, flat
from gptjax.data import batches
from gptjax.data.prepare import load_dataset
from gptjax.errors import UserError
from gptjax.loop import Run, batch_maker, validation_loss
from gptjax.progress import track
from gptjax.reporting import environment
from gptjax.reporting.report import Columns, read_metrics
from gptjax.resolve import resolve
from gptjax.run_dir import saved_config
from gptjax.sharding import by_path, make_mesh
from gptjax.training import TrainState, compile_steps, state_bytes

TOLERANCE = 0.01  # of a metric, or of the norm of an array
MOST_SHOWN = 3  # differences of one file


class Difference(NamedTuple):
    """A difference between a run's file and what was computed again."""

    file: str
    text: str
    relative: float = math.inf  # of numbers


class Record(NamedTuple):
    """What a run left in its folder."""

    folder: Path
    starts: list[dict[str, Any]]  # of environment.json
    rows: Columns
    checkpoints: dict[str, Checkpoints]
    kept: dict[tuple[int, str], dict[str, Any]]  # `meta` of each intact checkpoint, such as (8, "latest")
    changes: list[str]  # what is no longer as the run had it, so that bits may differ

    def start(self, step: int) -> dict[str, Any] | None:
        """The start of the run after which it made `step`; None if it recorded none."""
        return next((start for start in reversed(self.starts) if start["step"] < step), None)

    def config(self, step: int) -> Config:
        """The config with which the run made `step`: that of its start, or else that of the next checkpoint."""
        if start := self.start(max(step, 1)):
            return Config.from_dict(start["config"], self.folder / environment.FILE)
        configs = {n: meta["config"] for (n, _), meta in self.kept.items() if "config" in meta}
        later = [n for n in configs if n >= step] or sorted(configs)[-1:]
        return Config.from_dict(configs[min(later)], self.folder) if later else saved_config(self.folder)


def verify(folder: Path, starts: list[dict[str, Any]], steps: tuple[int, int] | None) -> int:
    """Verify everything, print what differs, and return the exit code."""
    names, found = ("latest", "best"), list[Difference]()
    checkpoints = {name: Checkpoints(folder / "checkpoints" / name, read_only=True) for name in names}
    record = Record(folder, starts, read_metrics(folder / "metrics.csv"), checkpoints, {}, [])
    try:
        for check in (_damaged(record), _other_configs(record), _computed_again(record, steps)):
            for difference in check:
                found.append(difference)
                if sum(each.file == difference.file for each in found) <= MOST_SHOWN:
                    print(f"DIFFERS: {difference.file}: {difference.text}", flush=True)
    except UserError as error:
        if not found:
            raise
        print(f"note: the rest is not verified: {error}")
    if not found:
        print("verified: everything agrees bit for bit")
        return 0
    near = all(each.relative <= TOLERANCE for each in found)
    print(f"not equal bit for bit; differences: {len(found)}")
    if record.changes:
        print(f"{'equal' if near else 'not equal either'} within {TOLERANCE:.0%}, all that the changes above promise")
    return 0 if record.changes and near else 1


def _damaged(record: Record) -> Iterator[Difference]:
    """The damaged checkpoints; `record.kept` gets the others."""
    for name, checkpoints in record.checkpoints.items():
        for step in checkpoints.steps:
            if damage := checkpoints.damage(step):
                yield Difference(f"{name}/{step}", damage)
            else:
                record.kept[step, name] = checkpoints.restore(step, verified=True)[1]
    print(f"checksums: {', '.join(f'{name}/{step}' for step, name in record.kept) or 'no checkpoint'} as written")


def _other_configs(record: Record) -> Iterator[Difference]:
    """The fields that config.json or a checkpoint has otherwise than the start of the run."""
    last = max([step for step, _ in record.kept] + [start["step"] + 1 for start in record.starts], default=0)
    configs: dict[str, tuple[int, Config]] = {}
    try:
        configs["config.json"] = last, Config.from_json(record.folder / "config.json")
    except UserError as error:
        yield Difference("config.json", str(error))
    for (step, name), meta in record.kept.items():
        if "config" in meta:
            configs[f"{name}/{step}"] = step, Config.from_dict(meta["config"], record.folder)
    for file, (step, config) in configs.items():
        there, trained = flat(config), flat(record.config(step))
        for field in [field for field in there if there[field] != trained[field]]:
            yield Difference(file, f"{field} is {there[field]!r} there, but the run had {trained[field]!r}")


def _computed_again(record: Record, steps: tuple[int, int] | None) -> Iterator[Difference]:
    """Where the steps of the range differ from what the run recorded of them."""
    first, last = _range(record, steps)
    starts, state = [start["step"] for start in record.starts if first < start["step"] < last], None
    for begin, end in itertools.pairwise([first, *starts, last]):
        run = _open(record, begin + 1)
        recorded = [each["data"] for each in [*record.starts, *record.kept.values()] if "data" in each]
        if not all(run.dataset.matches(data) for data in recorded):
            yield Difference("data", f"the tokens of {run.config.data.source} are not those of the run")
            return
        split = jax.tree.map(lambda leaf: leaf.sharding, run.steps.state)
        state = jax.device_put(state, split) if state else _state(run, begin)
        print(f"computing steps {begin + 1:,} to {end:,} again", flush=True)
        state = yield from _train(record, run, state, begin, end)
    kept = ", ".join(f"{name}/{step}" for step, name in sorted(record.kept) if first < step <= last) or "none"
    print(f"compared: {len(_recorded(record.rows['step'], first, last))} steps of metrics.csv; checkpoints: {kept}")


def _train(
    record: Record, run: Run, state: TrainState, first: int, last: int
) -> Generator[Difference, None, TrainState]:
    """Train from step `first` to step `last`, yield what differs from the record, and return the state."""
    rows = record.rows["step"]
    whole = first in {0, *rows, *(start["step"] for start in record.starts)}
    losses = [] if whole else [math.nan]  # since the last row: not known
    with closing(batches.prefetch(batch_maker(run), range(first, last))) as stream:
        for step, windows in enumerate(track(stream, "computing", last - first), first + 1):
            state, on_device = run.steps.train(state, windows)
            metrics = {name: float(value) for name, value in jax.device_get(on_device).items()}
            if math.isfinite(metrics["train_loss"]) and math.isfinite(metrics["grad_norm"]):
                losses.append(metrics["train_loss"])
            if step in rows:
                metrics["train_loss"] = sum(losses) / len(losses) if losses else math.nan
                losses = []
                if np.isfinite(record.rows["val_loss"][rows == step]).any():
                    metrics["val_loss"] = validation_loss(run, state.params) or math.nan
                yield from _row_differences(record.rows, step, metrics)
            yield from _state_differences(record, run, step, state)
    return state


def _range(record: Record, asked: tuple[int, int] | None) -> tuple[int, int]:
    """The kept step to compute from, or 0, and the last step."""
    kept, rows = sorted(step for step, name in record.kept if name == "latest"), record.rows["step"]
    end = int(max([*kept, *rows], default=0))
    first, last = (kept[-2], kept[-1]) if len(kept) > 1 else (kept[-1] if kept else end, end)
    if asked:
        first, last = max([step for step in kept if step <= asked[0]], default=0), asked[1]
    if not _recorded([*kept, *rows], first, last) or last > end:
        raise UserError(f"no steps to compare: name some with --steps A:B; 0:{end} is the whole run")
    if first == 0 and record.config(1).init_from:
        raise UserError(f"the run's initial weights are not kept: pass --steps A:B with A of {kept}")
    return first, last


def _recorded(steps: Iterable[Any], first: int, last: int) -> set[int]:
    return {int(step) for step in steps if first < step <= last}


def _open(record: Record, step: int) -> Run:
    """The data and the compiled functions with which the run made `step`; what has changed since is noted."""
    config, start = record.config(step), record.start(step)
    dataset = load_dataset(config.data, config.model.block_size)
    model = resolve(config.model, jax.devices()[0], packed=config.data.format == "chat")
    changes = _changes(start, environment.surroundings()) if start else []
    rows = config.train.micro_batch_size
    try:
        mesh = make_mesh(config.mesh, rows)
    except UserError:
        mesh = make_mesh(MeshConfig(), rows, state_bytes(config))
        changes.append(f"mesh was {vars(config.mesh)} and is {dict(mesh.shape)}")
    for change in [change for change in changes if change not in record.changes]:
        print(f"note: {change}: bits may differ")
        record.changes.append(change)
    steps = compile_steps(replace(config, model=model), mesh)
    return Run(config, record.folder, dataset, mesh, steps, *record.checkpoints.values())


def _changes(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    names = [(part, name) for part in environment.PARTS for name in sorted({*then[part], *now[part]})]
    pairs = [(part, name, then[part].get(name), now[part].get(name)) for part, name in names]
    return [
        f"{part}.{name} was {old} and is {new}"
        for part, name, old, new in pairs
        if old != new and name not in ("commit", "diff")  # code.sha256 is of what they lead to
    ]


def _state(run: Run, step: int) -> TrainState:
    """The state that the run kept of a step, or its initial one."""
    if step == 0:
        return run.steps.init()
    shapes = run.steps.state
    trees, _ = run.latest.restore(step, verified=True, params=shapes.params, opt_state=shapes.opt_state)
    return TrainState(jax.device_put(np.int32(step), shapes.step.sharding), **trees)


def _row_differences(rows: Columns, step: int, computed: dict[str, float]) -> Iterator[Difference]:
    for row in np.flatnonzero(rows["step"] == step):
        for name in [name for name in rows if name in computed]:
            there, value = float(rows[name][row]), computed[name]
            if there != value and not math.isnan(there) and not (math.isnan(value) and name == "train_loss"):
                text = f"{name} of step {step} is {there} there and {value} when it is computed again"
                yield Difference("metrics.csv", text, abs(there - value) / abs(value) if value else math.inf)


def _state_differences(record: Record, run: Run, step: int, state: TrainState) -> Iterator[Difference]:
    """Where the parameters and the optimizer state of a step differ from those that the run kept of it."""
    for name, trees in (("latest", ("params", "opt_state")), ("best", ("params",))):
        if (step, name) not in record.kept:
            continue
        kept, _ = record.checkpoints[name].restore(
            step, True, **{tree: getattr(run.steps.state, tree) for tree in trees}
        )
        pairs = [pair for tree in trees for pair in _named_pairs(tree, kept[tree], getattr(state, tree))]
        if far := [found for pair in pairs if (found := _distance(*pair))]:
            (_, _, first), (_, largest, where) = far[0], max(far, key=lambda found: found[1])
            text = f"{len(far)} of {len(pairs)} arrays differ from those computed again, first {first}; "
            text += f"the largest difference is {largest:.3g}, in {where}"
            yield Difference(f"{name}/{step}", text, max(relative for relative, _, _ in far))


def _named_pairs(tree: str, kept: Any, ours: Any) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    for (path, leaf), own in zip(by_path(kept).items(), jax.tree.leaves(ours), strict=True):
        yield f"{tree}/{path}", np.asarray(leaf), np.asarray(own)


def _distance(name: str, kept: np.ndarray, ours: np.ndarray) -> tuple[float, float, str] | None:
    """The relative and the largest difference of two arrays, and their name; None if all bits agree."""
    if kept.tobytes() == ours.tobytes():
        return None
    a, b = kept.astype(np.float64), ours.astype(np.float64)
    norm = float(np.linalg.norm(b))
    return float(np.linalg.norm(a - b)) / norm if norm else math.inf, float(np.abs(a - b).max()), name
