"""The metrics of a run, step by step: metrics.csv, trackers such as TensorBoard, and a progress bar or plain lines."""

import contextlib
import csv
import math
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

from gptjax import distributed, progress
from gptjax.config import Config
from gptjax.errors import UserError, first_line
from gptjax.files import write_atomically
from gptjax.loss_scale import is_overflow
from gptjax.reporting.trackers import TensorBoard, WeightsAndBiases

COLUMNS = ("step", "tokens", "seconds", "train_loss", "val_loss", "learning_rate", "grad_norm", "tokens_per_second")
SECONDS_BETWEEN_LINES = 5.0  # where the output is not a terminal
SPIKE = 6.0  # standard deviations


class Spikes:
    """Finds the steps at which the loss jumps: by more than `SPIKE` standard deviations of its recent values."""

    def __init__(self) -> None:
        self._mean, self._variance, self._n, self._far = 0.0, 0.0, 0, False

    def jumps(self, loss: float) -> bool:
        """Whether this loss is a spike after those before; one is reported once, until the loss is back."""
        rise, self._n = loss - self._mean, self._n + 1
        far = self._n > 50 and rise > max(SPIKE * math.sqrt(self._variance), 0.1 * self._mean)
        again, self._far = far and self._far, far
        if not far:
            weight = max(0.02, 1 / self._n)
            self._mean += weight * rise
            self._variance += weight * (rise**2 * (1 - weight) - self._variance)
        return far and not again


class Metrics:
    """Reads each step's metrics off the device one step late, so that the device never waits for the host.

    It writes a row every log_interval steps and at every evaluation. There train_loss is the mean over the steps since
    the last row (without those that were not finite), learning_rate and grad_norm are those of the step, and
    tokens_per_second excludes evaluations and checkpoints.
    """

    def __init__(
        self,
        run_dir: Path,
        config: Config,
        start: int,
        seconds: float,
        flops: float,
        peak: float,
        place: Callable[[int], str] = "step {:,}".format,
    ) -> None:
        """`seconds` is the run's time until step `start`, `flops` are those of a token, `peak` the FLOP/s of all
        devices (nan: unknown), and `place` names a step and its place in the data."""
        self.config, self.step, self._place = config, start, place
        self.skipped, self._skipped_in_a_row, self._spikes = 0, 0, Spikes()
        self._tokens_per_step = config.train.batch_size * config.model.block_size
        self._mfu_per_token_rate = flops / peak
        self._pending: tuple[int, Any] | None = None
        self._losses: list[float] = []
        self._last: dict[str, float] = {}
        self._began, self._row_began = time.perf_counter() - seconds, time.perf_counter()
        self._row_step, self._paused = start, 0.0
        self._csv = _open_csv(run_dir / "metrics.csv", start) if distributed.is_first() else None
        self._display = _Display(config.train.max_steps, start)
        self.print = self._display.print
        self._tensorboard: Any = None
        self._wandb: Any = None
        if distributed.is_first() and config.train.wandb:
            self._wandb = WeightsAndBiases(run_dir, config)
        with self._logging("tensorboard"):
            if distributed.is_first():
                self._tensorboard = TensorBoard(run_dir / "tensorboard", start)

    @property
    def seconds(self) -> float:
        """The run's time so far, without the time between a stop and its resumption."""
        return time.perf_counter() - self._began

    def add(self, step: int, metrics: Any) -> None:
        """Take the metrics, still on the device, of the step that was just dispatched."""
        self.flush()
        self._pending = (step, metrics)

    def flush(self, last: bool = False) -> None:
        """Wait for the step that was added last, and write its row if it is due or if no step follows.

        A step whose loss or gradient is not finite changed nothing (`training.train_step`); it is counted in `skipped`.
        Raises `UserError` after more than train.max_skipped of them in a row. Neither counts a gradient of float16 that
        overflowed under a loss scale, which is lower in the next step.
        """
        if self._pending is None:
            if last and self._losses:
                self.row()
            return
        (self.step, metrics), self._pending = self._pending, None
        self._last = {name: float(value) for name, value in jax.device_get(metrics).items()}
        loss, train, scale = self._last["train_loss"], self.config.train, self._last.get("loss_scale", 1.0)
        finite = math.isfinite(loss), math.isfinite(self._last["grad_norm"])
        if all(finite):
            self._skipped_in_a_row = 0
            self._losses.append(loss)
            if self._spikes.jumps(loss):
                self.print(f"note: the training loss jumped to {loss:.4f} at {self._place(self.step)}")
        elif is_overflow(*finite, scale):
            place = self._place(self.step)
            self.print(
                f"note: float16 overflowed at {place}: its update is skipped, and the loss scale of {scale:,.0f} halved"
            )
        else:
            self._skip()
        if last or (self.step % train.log_interval == 0 and not train.evaluates(self.step)):
            self.row()

    def _skip(self) -> None:
        self.skipped, self._skipped_in_a_row = self.skipped + 1, self._skipped_in_a_row + 1
        problem = f"train_loss={self._last['train_loss']} and grad_norm={self._last['grad_norm']}"
        place = self._place(self.step)
        if self._skipped_in_a_row <= self.config.train.max_skipped:
            self.print(f"note: {problem} at {place}: its update is skipped")
            return
        names = ["learning_rate", *["muon_learning_rate"] * (self.config.optimizer.matrix_optimizer == "muon")]
        rates = " and ".join(f"--optimizer.{name} (now {getattr(self.config.optimizer, name)})" for name in names)
        narrow = ", or start again with --model.dtype float32" if self.config.model.dtype == "float16" else ""
        raise UserError(
            f"the run diverged: {problem} at {place}, after {self._skipped_in_a_row - 1} skipped updates in a row; "
            f"its checkpoints are kept: continue from an earlier one with --resume STEP and a lower {rates}, a lower "
            f"--optimizer.grad_clip (now {self.config.optimizer.grad_clip}) or another --data.seed{narrow}"
        )

    def row(self, val_loss: float | None = None) -> None:
        """Write a row for the steps since the last one."""
        now, n_steps = time.perf_counter(), self.step - self._row_step
        rate = n_steps * self._tokens_per_step / (now - self._row_began - self._paused) if n_steps else None
        values = {
            "step": self.step,
            "tokens": self.step * self._tokens_per_step,
            "seconds": round(self.seconds, 3),
            "train_loss": sum(self._losses) / len(self._losses) if self._losses else None,
            "val_loss": val_loss,
            "learning_rate": self._last.get("learning_rate"),
            "grad_norm": self._last.get("grad_norm"),
            "tokens_per_second": rate and round(rate, 1),
        }
        with self._logging("csv"):
            if self._csv:
                csv.DictWriter(self._csv, COLUMNS, lineterminator="\n").writerow(values)
        self._track(lambda log: log.write(self.step, {n: values[n] for n in COLUMNS[3:] if values[n] is not None}))
        self._display.show(self.step, values, math.nan if rate is None else rate * self._mfu_per_token_rate)
        self._losses, self._row_began, self._row_step, self._paused = [], time.perf_counter(), self.step, 0.0

    def picture(self, png: Path) -> None:
        """Hand the picture of the losses to the trackers."""
        self._track(lambda log: log.picture(self.step, png))

    def samples(self, texts: Mapping[int, str]) -> None:
        """Hand texts by the step of their checkpoint to the trackers."""
        self._track(lambda log: log.samples(texts))

    def _track(self, write: Callable[[Any], None]) -> None:
        for name in ("tensorboard", "wandb"):
            with self._logging(name):
                if log := getattr(self, f"_{name}"):
                    write(log)

    @contextlib.contextmanager
    def _logging(self, log: str) -> Iterator[None]:
        """A block that writes a log: if it fails, as on a full disk, the run continues without that log."""
        try:
            yield
        except Exception as error:
            if not isinstance(error, OSError) and log != "wandb":
                raise
            file = getattr(self, f"_{log}")
            setattr(self, f"_{log}", None)
            with contextlib.suppress(Exception):
                file.close()
            reason = getattr(error, "strerror", None) or first_line(error)
            self.print(f"note: {log} log stopped at step {self.step:,}: {reason}; the run continues")

    @contextlib.contextmanager
    def pause(self, doing: str) -> Iterator[None]:
        """Exclude the block from training time, and show on the progress bar what it does."""
        begin = time.perf_counter()
        self._display.note(doing)
        with progress.hidden():
            yield
        self._display.note("")
        self._paused += time.perf_counter() - begin

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *exception: object) -> None:
        self._display.bar.stop()
        for log, file in (("csv", self._csv), ("tensorboard", self._tensorboard), ("wandb", self._wandb)):
            with self._logging(log):
                if file:
                    file.close()


def _open_csv(path: Path, start: int) -> TextIO:
    """metrics.csv, open for more rows, without those after `start`, the step from which a run resumes."""
    kept = []
    for line in path.read_text(errors="replace").splitlines() if start and path.exists() else []:
        step = line.partition(",")[0]
        if line.count(",") == len(COLUMNS) - 1 and step.isdecimal() and len(step) < 16 and int(step) <= start:
            kept.append(line)
    write_atomically(path, "\n".join([",".join(COLUMNS), *kept]) + "\n")
    return path.open("a", newline="", buffering=1)  # a row is in the file as soon as it is written


class _Display:
    """A progress bar on a terminal, plain lines elsewhere."""

    def __init__(self, max_steps: int, start: int) -> None:
        self._max_steps, self._start, self._began, self._printed = max_steps, start, time.perf_counter(), 0.0
        self._console, self._text = Console(), "compiling the training step"
        columns = (SpinnerColumn(), BarColumn(), TextColumn("{task.description}", markup=False))
        self.bar = Progress(*columns, console=self._console, transient=True, disable=not self._console.is_terminal)
        self._task = self.bar.add_task(self._text, total=max_steps, completed=start)
        self.bar.start()

    def show(self, step: int, values: dict[str, Any], mfu: float) -> None:
        text = f"step {step:,}/{self._max_steps:,}"
        if values["train_loss"] is not None:
            text += f"  loss {values['train_loss']:.4f}"
        if values["tokens_per_second"] is not None:
            text += f"  {values['tokens_per_second']:,.0f} tokens/s"
            text += "" if math.isnan(mfu) else f"  MFU {mfu:.1%}"
            elapsed = time.perf_counter() - self._began
            left = timedelta(seconds=round(elapsed / max(step - self._start, 1) * (self._max_steps - step)))
            text += f"  ETA {left}" if step < self._max_steps else ""
        self._text = text
        self.bar.update(self._task, completed=step, description=text)
        quiet = self._console.is_terminal or time.perf_counter() - self._printed < SECONDS_BETWEEN_LINES
        if values["val_loss"] is None and not quiet:
            self.print(text)

    def note(self, doing: str) -> None:
        self.bar.update(self._task, description=self._text + (f"  ({doing})" if doing else ""))

    def print(self, text: str) -> None:
        """Print a line above the progress bar."""
        self._printed = time.perf_counter()
        if self._console.is_terminal:
            self._console.print(text, highlight=False, markup=False)
        else:
            print(text, flush=True)
