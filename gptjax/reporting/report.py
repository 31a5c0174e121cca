"""The report of a run: the plot of its losses and a summary in Markdown."""

import contextlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float, Real
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from gptjax.config import Config
from gptjax.files import replacing
from gptjax.host import peak_host_memory
from gptjax.reporting.metrics import COLUMNS

Columns = dict[str, Float[np.ndarray, " R"]]  # a column's name -> its R rows

LARGEST = 5e13  # a step, a count of tokens or a time in seconds that is not below it is damage
TRAIN, VAL, INK, GRID = "#3b6fb6", "#d1495b", "#3a3a3a", "#e6e6e6"


@dataclass(frozen=True)
class Figures:
    """What a run has measured.

    `characters_per_token`, of the validation text, makes losses of different tokenizers comparable. `mfu` is a
    fraction. `peak_memory` and `memory`, that of the devices, are in bytes.
    """

    metrics: Columns
    config: Config
    characters_per_token: float | None = None
    mfu: float | None = None
    peak_memory: int | None = None
    memory: float = math.inf  # unknown, as that of CPUs
    skipped: int = 0


def read_metrics(path: str | Path) -> Columns:
    """The columns of a run's metrics.csv as float64 arrays, nan where nothing was measured.

    They are those of `metrics.COLUMNS`. An incomplete or damaged line is left out, so the file can be read while the
    run writes it, and after a crash.
    """
    text = Path(path).read_text(encoding="utf-8", errors="replace")
    header, *lines = text[: text.rfind("\n") + 1].splitlines() or [""]
    names, rows = header.split(","), []
    for line in lines:
        with contextlib.suppress(ValueError):
            cells = dict(zip(names, [float(cell or "nan") for cell in line.split(",")], strict=True))
            if all(0 <= cells.get(name, -1) < LARGEST for name in COLUMNS[:3]):
                rows.append([cells.get(name, math.nan) for name in COLUMNS])
    table = np.array(rows).reshape(-1, len(COLUMNS))
    return {name: table[:, i] for i, name in enumerate(COLUMNS)}


def overfitting_onset(
    steps: Real[np.ndarray, " E"], val_losses: Float[np.ndarray, " E"], *, margin: float = 0.01
) -> int | None:
    """The step of the best validation loss if the loss has clearly risen since, otherwise None.

    It has clearly risen if the last two evaluations both lie more than `margin` (a fraction) above the best one. One
    bad evaluation, a noisy plateau or a loss that falls again are not enough.
    """
    evaluated = np.isfinite(val_losses)
    steps, losses = steps[evaluated], val_losses[evaluated]
    if len(losses) < 3:
        return None
    best = int(np.argmin(losses))
    risen = losses[best + 1 :][-2:] > losses[best] * (1 + margin)
    return int(steps[best]) if len(risen) == 2 and risen.all() else None


def smooth(values: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """A centred moving average with a Hann window over 4% of the values; it does not lag, as an exponential one does.

    Before the first value the curve is continued with its slope there; after the last it is mirrored.
    """
    half = len(values) // 50
    window = np.hanning(2 * half + 3)[1:-1]
    padded = np.concatenate([2 * values[:1] - values[half:0:-1], values, values[: -half - 1 : -1]])
    return np.convolve(padded, window / window.sum(), "valid") if len(values) else values


def plot_losses(metrics_csv: str | Path, png: str | Path, *, title: str) -> None:
    """Plot the losses of a run. The picture is replaced atomically, so a viewer never sees half of it."""
    figure = loss_figure(read_metrics(metrics_csv), title)
    with replacing(Path(png)) as temporary:
        figure.savefig(temporary, format="png")


def loss_figure(metrics: Columns, title: str) -> Figure:
    """Training and validation loss over steps and tokens, the best step, and where overfitting begins.

    The figure is not made by pyplot, which would keep every figure of a training loop in memory.
    """
    figure = Figure(figsize=(9, 5), dpi=150, layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    _draw_losses(axes, metrics)
    axes.set_xlim(step_limits(metrics))
    axes.set_ylim(loss_limits(metrics))
    tokens_per_step = metrics["tokens"][-1:].sum() / max(metrics["step"][-1:].sum(), 1)

    def step_and_tokens(step: float, _: int) -> str:
        return f"{step:,.0f}\n{count(step * tokens_per_step)} tokens" if tokens_per_step else f"{step:,.0f}"

    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(step_and_tokens))
    axes.set_title(title, loc="left", fontsize=14, fontweight="bold", color=INK, pad=30, parse_math=False)
    axes.set_xlabel("step", color=INK)
    axes.set_ylabel("loss (nats per token)", color=INK)
    axes.grid(color=GRID, linewidth=0.8)
    axes.tick_params(colors=INK, length=0, pad=6)
    axes.spines[:].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1), ncols=4, frameon=False, labelcolor=INK)
    return figure


def _draw_losses(axes: Axes, metrics: Columns) -> None:
    (steps, train), (val_steps, val) = measured(metrics, "train_loss"), measured(metrics, "val_loss")
    if len(train) >= 50:  # fewer are not smoothed
        axes.plot(steps, train, color=TRAIN, alpha=0.22, linewidth=0.8)
    if len(train):
        marker = "o" if len(train) == 1 else ""
        axes.plot(steps, smooth(train), marker, color=TRAIN, linewidth=1.8, label="training")
    if len(val):
        marker = "o-" if len(val) <= 50 else "-"
        axes.plot(val_steps, val, marker, color=VAL, linewidth=1.8, markersize=4.5, label="validation")
        best = int(np.argmin(val))
        label = f"best: {val[best]:.4f} at step {int(val_steps[best]):,}"
        axes.plot(val_steps[best], val[best], "o", color=VAL, markersize=9, markeredgecolor="white", label=label)
    if (onset := overfitting_onset(val_steps, val)) is not None:
        axes.axvline(onset, color=VAL, linewidth=1, linestyle=(0, (4, 3)), alpha=0.8)
        end, label = metrics["step"][-1], f"overfitting from step {onset:,}"
        axes.axvspan(onset, end, color=VAL, alpha=0.08, linewidth=0, label=label)


def loss_limits(metrics: Columns) -> tuple[float, float]:
    """The lowest and highest loss to draw: those of the run without its first 5%, which would flatten the rest."""
    (train_steps, train), (val_steps, val) = measured(metrics, "train_loss"), measured(metrics, "val_loss")
    steps, losses = np.concatenate([train_steps, val_steps]), np.concatenate([smooth(train), val])
    if len(losses) == 0:
        return 0.0, 1.0
    first, last = metrics["step"][[0, -1]]
    late = losses[steps > first + 0.05 * (last - first)]
    if len(losses) < 20 or len(late) < 2 or np.ptp(losses) < 1.5 * np.ptp(late):
        late = losses
    noise = np.std((train - smooth(train))[len(train) // 20 :]) if len(train) else 0.0
    room = max(0.06 * np.ptp(late), 2.5 * noise) or 0.1
    return float(late.min() - room), float(late.max() + room)


def step_limits(metrics: Columns) -> tuple[float, float]:
    """The first and last step, with a margin."""
    first, last = metrics["step"][[0, -1]] if len(metrics["step"]) else (0.0, 0.0)
    margin = 0.015 * (last - first) or 1
    return float(first - margin), float(last + margin)


def measured(metrics: Columns, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The steps at which a metric was measured and is finite, and its values there."""
    measured = np.isfinite(metrics[name])
    return metrics["step"][measured], metrics[name][measured]


def count(number: float) -> str:
    """Three digits and the English letter: 983k, 33.6M, 2.5B."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def stepping_share(metrics: Columns) -> float:
    """The fraction of a run's time that its training steps took, without evaluations and saves; nan if unknown."""
    if len(metrics["seconds"]) == 0 or metrics["seconds"][-1] <= 0:
        return math.nan
    tokens, rates = np.diff(metrics["tokens"], prepend=0), metrics["tokens_per_second"]
    stepping = np.sum(tokens[rates > 0] / rates[rates > 0])
    return float(min(stepping / metrics["seconds"][-1], 1.0))


def median_rate(metrics: Columns) -> float:
    """The median of a run's tokens per second; nan if it is unknown."""
    _, rates = measured(metrics, "tokens_per_second")
    return float(np.median(rates)) if len(rates) else math.nan


def facts(run: Figures) -> dict[str, str]:
    """The figures of a finished run as texts, by name, without those that are not known.

    The final training loss is the smoothed one.
    """
    last = {name: values[-1] if len(values) else 0.0 for name, values in run.metrics.items()}
    rate, share, memory = median_rate(run.metrics), stepping_share(run.metrics), ""
    if run.peak_memory is not None:
        of = f" of {run.memory / 2**30:.0f} GiB" if math.isfinite(run.memory) else ""
        memory = f"{run.peak_memory / 2**30:.2f} GiB{of}"
    rows = {
        "steps": f"{last['step']:,.0f}",
        "tokens": count(last["tokens"]),
        "time": str(timedelta(seconds=round(last["seconds"]))),
        "of it in training steps": "" if math.isnan(share) else f"{share:.0%}",
        "tokens/s (median)": "-" if math.isnan(rate) else f"{rate:,.0f}",
        "model FLOPs utilization": f"{run.mfu:.1%}" if run.mfu is not None else "",
        "peak memory": memory,
        "skipped updates": f"{run.skipped:,} (loss or gradient not finite)" if run.skipped else "0",
        **_loss_rows(run.metrics, run.characters_per_token),
    }
    return {name: value for name, value in rows.items() if value}


def run_report(title: str, facts: dict[str, str], advice: Sequence[str] = (), sample: str | None = None) -> str:
    """A summary of a finished run in Markdown that is also readable in a terminal."""
    cells = [("", ""), *facts.items()]
    width, value_width = (max(map(len, column)) for column in zip(*cells, strict=True))
    table = [f"| {name:{width}} | {value:{value_width}} |" for name, value in cells]
    table.insert(1, f"|{'-' * (width + 2)}|{'-' * (value_width + 2)}|")
    parts = [f"# {title}", "\n".join(table)]
    if advice:
        parts += ["## What to do next", "\n".join(f"- {each}" for each in advice)]
    if sample is not None:
        fence = "`" * max([3, *(len(ticks) + 1 for ticks in re.findall("`+", sample))])
        parts += ["## Sample", f"{fence}text\n{sample.rstrip()}\n{fence}"]
    return "\n\n".join(parts) + "\n"


def _loss_rows(metrics: Columns, characters_per_token: float | None) -> dict[str, str]:
    (_, train), (steps, val) = measured(metrics, "train_loss"), measured(metrics, "val_loss")
    rows = {"final training loss": f"{smooth(train)[-1]:.4f}"} if len(train) else {}
    if len(val) == 0:
        return rows
    best = int(np.argmin(val))
    rows["best validation loss"] = f"{val[best]:.4f} at step {int(steps[best]):,}"
    rows["perplexity there"] = f"{math.exp(min(val[best], 700)):.2f}"
    if characters_per_token is not None:
        nats = val[best] / characters_per_token
        rows["bits per character there"] = f"{nats / math.log(2):.4f} ({nats:.4f} nats)"
    return rows


def peak_memory_bytes(devices: Sequence[jax.Device]) -> int:
    """The most memory that these devices together have held, in bytes.

    CPU devices do not count it; for them it is the process's largest resident set.
    """
    stats = [device.memory_stats() or {} for device in devices]
    peaks = [stat["peak_bytes_in_use"] for stat in stats if "peak_bytes_in_use" in stat]
    return sum(peaks) if peaks else peak_host_memory()
