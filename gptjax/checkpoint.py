"""Orbax checkpoints with checksums: written in the background, complete or absent, restored whole or refused."""

import contextlib
import hashlib
import itertools
import json
import logging
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from gptjax import distributed
from gptjax.errors import UserError, first_line
from gptjax.files import read_json, sync
from gptjax.sharding import by_path

CHECKSUMS = "sha256.json"  # the SHA-256 of each file of a checkpoint, since Orbax does not detect every corruption
SPARE_BYTES = 1 << 20  # for a checkpoint's own description, and for the metrics
for name in ("absl", "asyncio"):  # Orbax logs its progress, and each part of a failed write
    logging.getLogger(name).setLevel(logging.CRITICAL)


class Checkpoints:
    """The newest `keep` checkpoints in a folder. An older one is deleted once a newer one is complete on disk.

    Those of every `keep_every` steps are never deleted. A checkpoint holds each tree that `save` got (params,
    opt_state) and `meta`, a dictionary. Several processes write or read one together, each a part of it. With
    `read_only`, each process reads on its own.
    """

    def __init__(self, folder: Path, read_only: bool = False, keep: int = 1, keep_every: int | None = None) -> None:
        self.folder, self._alone = folder, read_only
        if bad := set("[]*?") & set(str(folder.absolute())):  # Orbax would take the path for a pattern and save nothing
            raise UserError(f"{folder.absolute()} has {min(bad)!r} in its name: checkpoints cannot be written there")
        process, processes = jax.process_index(), ocp.options.MultiprocessingOptions
        alone = processes(process, active_processes={process}, barrier_sync_key_prefix=f"alone{process}")
        together = processes(barrier_sync_key_prefix=folder.name)  # or the barriers of two folders would be one
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            keep_period=keep_every,
            cleanup_tmp_directories=not read_only,  # of a save that was killed
            read_only=read_only,
            create=not read_only,
            multiprocessing_options=alone if read_only else together,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_checksums),
        )
        handlers: Any = {name: ocp.StandardCheckpointHandler() for name in ("params", "opt_state")}
        handlers["meta"] = ocp.JsonCheckpointHandler()
        if not read_only:
            sys.unraisablehook = _without_late_writes
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options, item_handlers=handlers)

    @property
    def step(self) -> int | None:
        """The step of the newest complete checkpoint; None if there is none."""
        return self._manager.latest_step()

    @property
    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, the newest last."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, meta: dict[str, Any], **trees: Any) -> None:
        """Copy the trees off the devices, then write them in the background.

        Raises `UserError` if this or an earlier write failed; the previous checkpoint is kept.
        """
        items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        n_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(trees))
        with self._writing():
            if shutil.disk_usage(self.folder).free < 1.05 * n_bytes + SPARE_BYTES:  # fail before the write begins
                raise OSError(f"No space left for {n_bytes:,} bytes")
            self._manager.save(step, args=ocp.args.Composite(meta=ocp.args.JsonSave(meta), **items), force=True)

    def wait(self) -> None:
        """Return when everything is written; raises what `save` does."""
        with self._writing():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def close(self) -> None:
        """Wait as `wait` does, and end the writing threads."""
        with self._writing():
            self._manager.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            left = [step for step in self.steps if (self.folder / str(step)).is_dir()]
            kept = f"step {left[-1]} is the last complete one" if left else "there is no earlier one"
            reason, fix = first_line(error), "Fix that"
            if "No space left" in str(error):
                reason, fix = "the disk is full", "Free space"
            elif "File too large" in str(error):
                reason, fix = "a file would be larger than this process may write", "Raise `ulimit -f`"
            raise UserError(
                f"cannot write a checkpoint in {self.folder}: {reason}; {kept}. {fix} and continue with --resume"
            ) from error

    def drop_after(self, step: int, suffix: str | None = None) -> None:
        """Delete the later checkpoints, which a run that resumes here writes again, or rename each to STEP.SUFFIX.

        A checkpoint that already has that name is kept: the next one is STEP.SUFFIX-2.
        """
        for later in [n for n in self.steps if n > step]:
            if suffix is None:
                self._manager.delete(later)
            elif jax.process_index() == 0:
                numbers = itertools.chain([""], (f"-{i}" for i in itertools.count(2)))
                names = (self.folder / f"{later}.{suffix}{number}" for number in numbers)
                aside = next(path for path in names if not path.exists())
                (self.folder / str(later)).rename(aside)
                print(f"note: the later checkpoint {self.folder / str(later)} is kept as {aside.name}")
        distributed.wait_for_all(f"drop/{self.folder.name}/{step}")
        self._manager.reload()

    def newest_intact(self) -> int | None:
        """The step of the newest checkpoint whose files all are as they were written; None if there is none.

        A note names each damaged one. Several processes each verify a part of the files.
        """
        for step in reversed(self.steps):
            problems = [*filter(None, distributed.gather(f"verify/{self.folder.name}/{step}", self.damage(step)))]
            if not problems:
                return step
            print(f"note: the checkpoint {self.folder / str(step)} is damaged and not used: {problems[0]}")
        return None

    def damage(self, step: int) -> str:
        """What is wrong with the files of a checkpoint; "" if all are as they were written."""
        try:
            self._verify_checksums(step)
        except Exception as error:
            return first_line(error)
        return ""

    def restore(
        self, step: int | None = None, verified: bool = False, **abstract: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The requested trees, as arrays of the given shapes, dtypes and shardings, and `meta`, of the newest step.

        Raises `UserError` if there is no checkpoint, if it is damaged, or if a parameter's name or shape differs.
        """
        step = self.step if step is None else step
        if step is None:
            raise UserError(f"{self.folder} holds no checkpoint: the run ended before it saved one; start it again")
        with self._reading(step):
            if not verified:
                self._verify_checksums(step)
            found = self._manager.item_metadata(step)
            if missing := [name for name in abstract if found[name] is None]:
                raise ValueError(f"it has no {missing[0]}")
        for name, tree in abstract.items():
            self._compare(step, _shapes(found[name].tree), _shapes(tree))
        with self._reading(step):
            items = {name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()}
            restored = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore(), **items))
            return {name: jax.block_until_ready(restored[name]) for name in abstract}, restored["meta"]

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise UserError(
                f"the checkpoint {self.folder / str(step)} is damaged and was not loaded ({first_line(error)}); "
                "restore it from a copy, or use the run's other checkpoint (sample.py --checkpoint best or latest)"
            ) from error

    def _write_checksums(self) -> None:
        """Write the checksums and wait until all is on disk.

        Orbax calls this in the writing thread, just before it gives a complete checkpoint its final name. It has synced
        the arrays itself, but not its descriptions of them.
        """
        if jax.process_index() == 0:
            for folder in self.folder.iterdir():
                unfinished = folder.is_dir() and not folder.name.isdecimal()
                if unfinished and not (folder / CHECKSUMS).exists():
                    files = sorted(path for path in folder.glob("*/**/*") if path.is_file())
                    sums = {str(path.relative_to(folder)): _sha256(path) for path in files}
                    (folder / CHECKSUMS).write_text(json.dumps(sums, indent=1), encoding="utf-8")
                    for path in (*folder.rglob("*"), folder):
                        sync(path)

    def _verify_checksums(self, step: int) -> None:
        """Verify all files; processes that read together each verify a part, since an error in one ends all."""
        folder = self.folder / str(step)
        sums = read_json(folder / CHECKSUMS)
        part = sorted(sums) if self._alone else sorted(sums)[jax.process_index() :: jax.process_count()]
        for name in part:
            if not (folder / name).is_file():
                raise ValueError(f"{name} is missing")
            if _sha256(folder / name) != sums[name]:
                raise ValueError(f"{name} is not what was written")

    def _compare(self, step: int, found: dict[str, Any], model: dict[str, Any]) -> None:
        """Raise `UserError` for the first parameter whose shape differs; those that the model has come first."""
        problem = f"{self.folder / str(step)} does not fit this model"
        for name in [*sorted(model), *sorted(found)]:
            if name not in found:
                raise UserError(f"{problem}: it lacks {name} {model[name]}")
            if name not in model:
                raise UserError(f"{problem}: it has {name} {found[name]}, which the model lacks")
            if model[name] != found[name]:
                raise UserError(f"{problem}: {name} is {found[name]} there and {model[name]} in the model")


def _without_late_writes(unraisable: Any) -> None:
    """A hook for exceptions in threads of C++ that hides those of the remaining writes of a failed checkpoint."""
    if "Event loop is closed" not in str(unraisable.exc_value):
        sys.__unraisablehook__(unraisable)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {path: tuple(leaf.shape) for path, leaf in by_path(tree).items()}
