"""Orbax checkpoints: written asynchronously, complete or absent, restored whole or not at all."""

import errno
import hashlib
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from gptjax.errors import UserError

CHECKSUMS = "sha256.json"  # in a checkpoint: its files and their SHA-256, since Orbax notices not every damage
SPARE_BYTES = 1 << 20  # for a checkpoint's own description, and for the metrics
logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs its inner workings there


class Checkpoints:
    """The newest checkpoint in a folder; a newer one takes its place once it is complete on disk.

    A checkpoint has one item for each tree that `save` was given (params, opt_state) and a dictionary, `meta`. Several
    processes write one together, each its part, or read one together; with `read_only` each reads for itself.
    """

    def __init__(self, folder: Path, read_only: bool = False) -> None:
        self.folder, self._alone = folder, read_only
        if bad := set("[]*?") & set(str(folder.absolute())):  # Orbax would take them for a pattern, and save nothing
            raise UserError(f"{folder.absolute()} has {min(bad)!r} in its name: checkpoints cannot be written there")
        together: dict[str, Any] = {"barrier_sync_key_prefix": folder.name}  # or two folders' barriers would be one
        process = jax.process_index()
        alone = {"primary_host": process, "active_processes": {process}, "barrier_sync_key_prefix": f"alone{process}"}
        options = ocp.CheckpointManagerOptions(
            max_to_keep=1,
            read_only=read_only,
            create=not read_only,
            multiprocessing_options=ocp.options.MultiprocessingOptions(**(alone if read_only else together)),
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_checksums),
        )
        handlers: Any = {"params": ocp.StandardCheckpointHandler(), "opt_state": ocp.StandardCheckpointHandler()}
        handlers["meta"] = ocp.JsonCheckpointHandler()
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options, item_handlers=handlers)

    @property
    def step(self) -> int | None:
        """The step of the newest complete checkpoint, None where there is none."""
        return self._manager.latest_step()

    def save(self, step: int, meta: dict[str, Any], **trees: Any) -> None:
        """Copy the trees off the devices, then write them in the background.

        Raises:
            UserError: this or an earlier write failed; the checkpoint before it is still there.
        """
        items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        n_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(trees))
        try:
            if shutil.disk_usage(self.folder).free < 1.05 * n_bytes + SPARE_BYTES:  # sooner than in mid-write
                raise OSError(errno.ENOSPC, f"No space left for {n_bytes:,} bytes")
            self._manager.save(step, args=ocp.args.Composite(meta=ocp.args.JsonSave(meta), **items), force=True)
        except Exception as error:
            raise self._write_error(error) from error

    def drop_after(self, step: int) -> None:
        """Delete the checkpoint if it is of a later step: a run that resumes before it will make it again."""
        if self.step is not None and self.step > step:
            self._manager.delete(self.step)

    def wait(self) -> None:
        """Return when all is written.

        Raises:
            UserError: as `save`.
        """
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except Exception as error:
            raise self._write_error(error) from error

    def restore(self, **abstract: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The trees asked for, as arrays of the shapes, dtypes and shardings given, and `meta`.

        Raises:
            UserError: there is no checkpoint, it is damaged, or a parameter is missing, extra or of another shape.
        """
        step = self.step
        if step is None:
            raise UserError(f"{self.folder} holds no checkpoint: the run ended before it saved one; start it anew")
        try:
            self._verify_checksums(step)
            found = self._manager.item_metadata(step)
        except Exception as error:
            raise self._damaged(step, error) from error
        for name, tree in abstract.items():
            if found[name] is None:
                raise self._damaged(step, f"it has no {name}")
            self._compare(step, found[name].tree, tree)
        try:
            items = {name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()}
            restored = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore(), **items))
            return {name: jax.block_until_ready(restored[name]) for name in abstract}, restored["meta"]
        except Exception as error:
            raise self._damaged(step, error) from error

    def _write_checksums(self) -> None:
        """In the writing thread, just before a checkpoint is renamed to its final name and so is complete."""
        if jax.process_index() == 0:
            for folder in self.folder.iterdir():
                if folder.is_dir() and not (folder / CHECKSUMS).exists():
                    files = sorted(path for path in folder.glob("*/**/*") if path.is_file())  # final by now
                    sums = {str(path.relative_to(folder)): _sha256(path) for path in files}
                    (folder / CHECKSUMS).write_text(json.dumps(sums, indent=1))

    def _verify_checksums(self, step: int) -> None:
        """Several processes that read together each verify some of the files; one error ends all of them."""
        folder = self.folder / str(step)
        wanted = json.loads((folder / CHECKSUMS).read_text())
        share = sorted(wanted) if self._alone else sorted(wanted)[jax.process_index() :: jax.process_count()]
        for name in share:
            if not (folder / name).is_file():
                raise ValueError(f"{name} is missing")
            if _sha256(folder / name) != wanted[name]:
                raise ValueError(f"{name} is not what was written")

    def _compare(self, step: int, found: Any, wanted: Any) -> None:
        where = f"{self.folder / str(step)} does not fit this model"
        found_shapes, shapes = _shapes(found), _shapes(wanted)
        for name in sorted(found_shapes.keys() | shapes.keys(), key=lambda name: (name not in shapes, name)):
            if name not in found_shapes:
                raise UserError(f"{where}: it lacks {name} {shapes[name]}")
            if name not in shapes:
                raise UserError(f"{where}: it has {name} {found_shapes[name]}, which the model lacks")
            if shapes[name] != found_shapes[name]:
                raise UserError(f"{where}: {name} is {found_shapes[name]} there and {shapes[name]} in the model")

    def _damaged(self, step: int, error: Exception | str) -> UserError:
        reason = str(error).split("\n")[0][:200] or type(error).__name__
        return UserError(
            f"the checkpoint {self.folder / str(step)} is damaged and was not loaded ({reason}); "
            f"restore it from a copy, or use the run's other checkpoint (sample.py --checkpoint best or latest)"
        )

    def _write_error(self, error: Exception) -> UserError:
        left = f"step {self.step} is the last one that is whole" if self.step is not None else "there is none before it"
        if "No space left" in str(error) or getattr(error, "errno", None) == errno.ENOSPC:
            return UserError(
                f"cannot write a checkpoint in {self.folder}: the disk is full; {left}. Free space and --resume"
            )
        reason = str(error).split("\n")[0][:200]
        return UserError(f"cannot write a checkpoint in {self.folder}: {reason}; {left}. Mend that and --resume")

    def close(self) -> None:
        """Wait, as `wait` does, and end the writing threads."""
        try:
            self._manager.close()
        except Exception as error:
            raise self._write_error(error) from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves}
