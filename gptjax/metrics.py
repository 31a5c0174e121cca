"""What a person watches: metrics.csv, TensorBoard, and a progress bar or plain lines."""

import contextlib
import csv
import math
import os
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from gptjax import distributed
from gptjax.config import Config
from gptjax.errors import UserError
from gptjax.files import write_atomically

COLUMNS = ("step", "tokens", "seconds", "train_loss", "val_loss", "learning_rate", "grad_norm", "tokens_per_second")
SECONDS_BETWEEN_LINES = 5.0  # where output is no terminal


class Metrics:
    """Takes each step's metrics and, one step later, reads them off the device, so that it never waits for the host.

    One row every log_interval steps and at every evaluation: train_loss is the mean over the steps since the row
    before, learning_rate and grad_norm are that step's, tokens_per_second leaves evaluations and checkpoints out.
    """

    def __init__(self, run_dir: Path, config: Config, start: int, seconds: float, flops: float, peak: float) -> None:
        """`seconds` the run took up to step `start`; `flops` of a token; `peak` FLOP/s of all devices, nan: unknown."""
        self.config, self.step = config, start
        self._tokens_per_step = config.train.batch_size * config.model.block_size
        self._mfu_per_token_rate = flops / peak
        self._pending: tuple[int, Any] | None = None
        self._losses: list[float] = []
        self._last: dict[str, float] = {}
        self._began, self._row_began = time.perf_counter() - seconds, time.perf_counter()
        self._row_step, self._paused = start, 0.0
        from tensorboardX import SummaryWriter  # here, as it imports torch where there is one: a second or two

        self._csv = _CsvFile(run_dir / "metrics.csv", start) if distributed.is_first() else None
        self._tensorboard = SummaryWriter(
            str(run_dir / "tensorboard"),
            purge_step=start + 1 if start else None,
            write_to_disk=distributed.is_first(),
        )
        self._display = _Display(config.train.max_steps, start)

    @property
    def seconds(self) -> float:
        """Since the run began, less the time between a stop and its resumption."""
        return time.perf_counter() - self._began

    def add(self, step: int, metrics: Any) -> None:
        """Note the metrics, still on the device, of a step just dispatched."""
        self.flush()
        self._pending = (step, metrics)

    def flush(self, last: bool = False) -> None:
        """Wait for the last step that was added and take it into account; if no other follows, write its row.

        Raises:
            UserError: its loss or its gradients are not finite.
        """
        if self._pending is None:
            if last and self._losses:
                self.row()
            return
        (self.step, metrics), self._pending = self._pending, None
        self._last = {name: float(value) for name, value in jax.device_get(metrics).items()}
        loss, norm, train = self._last["train_loss"], self._last["grad_norm"], self.config.train
        if not (math.isfinite(loss) and math.isfinite(norm)):
            names = ["learning_rate", *["muon_learning_rate"] * (self.config.optimizer.matrix_optimizer == "muon")]
            rates = " or ".join(f"optimizer.{name}={getattr(self.config.optimizer, name)}" for name in names)
            raise UserError(
                f"train_loss={loss} and grad_norm={norm} at step {self.step}: the run diverged; lower {rates}, "
                "warm up for longer or clip harder; checkpoints are kept"
            )
        self._losses.append(loss)
        evaluated = self.step % train.eval_interval == 0 or self.step == train.max_steps  # and so gets its row
        if last or (self.step % train.log_interval == 0 and not evaluated):
            self.row()

    def row(self, val_loss: float | None = None) -> None:
        """Write what was seen since the last row."""
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
        if self._csv:
            self._csv.writerow(values)
        for name in COLUMNS[3:]:
            if values[name] is not None:
                self._tensorboard.add_scalar(name, values[name], self.step)
        self._display.show(self.step, values, math.nan if rate is None else rate * self._mfu_per_token_rate)
        self._losses, self._row_began, self._row_step, self._paused = [], time.perf_counter(), self.step, 0.0

    @contextlib.contextmanager
    def pause(self, doing: str) -> Iterator[None]:
        """What happens inside does not count as training time."""
        begin = time.perf_counter()
        self._display.note(doing)
        yield
        self._display.note("")
        self._paused += time.perf_counter() - begin

    def print(self, text: str) -> None:
        """A line above the progress bar."""
        self._display.print(text)

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._display.close()
        if self._csv:
            self._csv.close()
        self._tensorboard.close()


class _CsvFile:
    """Rows appended to metrics.csv; those behind `start`, the step that a run resumes from, are dropped."""

    def __init__(self, path: Path, start: int) -> None:
        lines = path.read_text().splitlines() if start and path.exists() else []
        kept = [
            line for line in lines[1:] if line.partition(",")[0].isdecimal() and int(line.partition(",")[0]) <= start
        ]
        write_atomically(path, "\n".join([",".join(COLUMNS), *kept]) + "\n")
        self._file = path.open("a", newline="")
        self._writer = csv.DictWriter(self._file, COLUMNS, lineterminator="\n")

    def writerow(self, values: dict[str, Any]) -> None:
        self._writer.writerow(values)
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class _Display:
    """A progress bar on a terminal, plain lines elsewhere."""

    def __init__(self, max_steps: int, start: int) -> None:
        self._max_steps, self._start, self._began, self._printed = max_steps, start, time.perf_counter(), 0.0
        self._console = Console()
        self._bar: Progress | None = None
        self._text = "compiling"
        if self._console.is_terminal:
            self._bar = Progress(BarColumn(), TextColumn("{task.description}"), console=self._console, transient=True)
            self._task = self._bar.add_task(self._text, total=max_steps, completed=start)
            self._bar.start()

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
        if self._bar:
            self._bar.update(self._task, completed=step, description=text)
        elif values["val_loss"] is None and time.perf_counter() - self._printed >= SECONDS_BETWEEN_LINES:
            self.print(text)

    def note(self, doing: str) -> None:
        if self._bar:
            self._bar.update(self._task, description=self._text + (f"  ({doing})" if doing else ""))

    def print(self, text: str) -> None:
        self._printed = time.perf_counter()
        try:
            if self._bar:
                self._console.print(text, highlight=False, markup=False)
            else:
                print(text, flush=True)
        except BrokenPipeError:  # a lost terminal, or `| tee` stopped by the same Ctrl-C: no reason to lose the run
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def close(self) -> None:
        if self._bar:
            self._bar.stop()
