"""The report of a run: the plot of its losses and a summary in Markdown."""

import contextlib
import math
import re
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float, Real
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from gptjax.files import replacing
from gptjax.host import peak_host_memory

Columns = dict[str, Float[np.ndarray, " R"]]  # a column's name -> its R rows

TRAIN, VAL, INK, GRID = "#3b6fb6", "#d1495b", "#3a3a3a", "#e6e6e6"


def read_metrics(path: str | Path) -> Columns:
    """The columns of a run's metrics.csv as float64 arrays, nan where nothing was measured.

    An incomplete or damaged line is left out, so the file can be read while the run writes it, and after a crash.
    """
    text = Path(path).read_text(encoding="utf-8", errors="replace")
    header, *lines = text[: text.rfind("\n") + 1].splitlines() or [""]
    names = header.split(",")
    rows = []
    for line in lines:
        with contextlib.suppress(ValueError):
            rows.append([float(cell or "nan") for cell in line.split(",")])
    table = np.array([row for row in rows if len(row) == len(names)]).reshape(-1, len(names))
    return {name: table[:, i] for i, name in enumerate(names)}


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
    _fit_axes(axes, metrics)
    tokens_per_step = metrics["tokens"][-1:].sum() / max(metrics["step"][-1:].sum(), 1)

    def step_and_tokens(step: float, _: int) -> str:
        return f"{step:,.0f}\n{_count(step * tokens_per_step)} tokens" if tokens_per_step else f"{step:,.0f}"

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
    (steps, train), (val_steps, val) = _finite(metrics, "train_loss"), _finite(metrics, "val_loss")
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


def _fit_axes(axes: Axes, metrics: Columns) -> None:
    """Fit the axes to the run without its first 5%, whose high losses would flatten the rest."""
    (train_steps, train), (val_steps, val) = _finite(metrics, "train_loss"), _finite(metrics, "val_loss")
    steps, losses = np.concatenate([train_steps, val_steps]), np.concatenate([smooth(train), val])
    if len(losses) == 0:
        return
    first, last = metrics["step"][[0, -1]]
    late = losses[steps > first + 0.05 * (last - first)]
    if len(losses) < 20 or len(late) < 2 or np.ptp(losses) < 1.5 * np.ptp(late):
        late = losses
    noise = np.std((train - smooth(train))[len(train) // 20 :]) if len(train) else 0.0
    room = max(0.06 * np.ptp(late), 2.5 * noise) or 0.1
    axes.set_ylim(late.min() - room, late.max() + room)
    margin = 0.015 * (last - first) or 1
    axes.set_xlim(first - margin, last + margin)


def _finite(metrics: Columns, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The steps at which a metric was measured and is finite, and its values there."""
    measured = np.isfinite(metrics[name])
    return metrics["step"][measured], metrics[name][measured]


def _count(number: float) -> str:
    """Three digits and the English letter: 983k, 33.6M, 2.5B."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def run_report(
    metrics: Columns,
    *,
    title: str,
    characters_per_token: float | None = None,
    mfu: float | None = None,
    peak_memory: int | None = None,
    skipped: int = 0,
    sample: str | None = None,
) -> str:
    """A summary of a finished run in Markdown that is also readable in a terminal.

    `characters_per_token`, of the validation text, makes losses of different tokenizers comparable. `mfu` is a
    fraction and `peak_memory` is in bytes. The final training loss is the smoothed one.
    """
    last = {name: values[-1] if len(values) else 0.0 for name, values in metrics.items()}
    rates = metrics["tokens_per_second"][np.isfinite(metrics["tokens_per_second"])]
    rows = {
        "steps": f"{last['step']:,.0f}",
        "tokens": _count(last["tokens"]),
        "time": str(timedelta(seconds=round(last["seconds"]))),
        "tokens/s (median)": f"{np.median(rates):,.0f}" if len(rates) else "-",
        "model FLOPs utilization": f"{mfu:.1%}" if mfu is not None else "",
        "peak memory": f"{peak_memory / 2**30:.2f} GiB" if peak_memory is not None else "",
        "skipped updates": f"{skipped:,} (loss or gradient not finite)" if skipped else "",
        **_loss_rows(metrics, characters_per_token),
    }
    cells = [("", ""), *[row for row in rows.items() if row[1]]]
    width, value_width = (max(map(len, column)) for column in zip(*cells, strict=True))
    table = [f"| {name:{width}} | {value:{value_width}} |" for name, value in cells]
    table.insert(1, f"|{'-' * (width + 2)}|{'-' * (value_width + 2)}|")
    parts = [f"# {title}", "\n".join(table), _verdict(metrics)]
    if sample is not None:
        fence = "`" * max([3, *(len(ticks) + 1 for ticks in re.findall("`+", sample))])
        parts += ["## Sample", f"{fence}text\n{sample.rstrip()}\n{fence}"]
    return "\n\n".join(part for part in parts if part) + "\n"


def _loss_rows(metrics: Columns, characters_per_token: float | None) -> dict[str, str]:
    (_, train), (steps, val) = _finite(metrics, "train_loss"), _finite(metrics, "val_loss")
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


def _verdict(metrics: Columns) -> str:
    steps, val = _finite(metrics, "val_loss")
    onset = overfitting_onset(steps, val)
    if onset is not None:
        rise = val[-1] / val.min() - 1
        return (
            f"Overfitting: validation loss was best at step {onset:,} and has risen {rise:.1%} since. "
            "The checkpoint of the best step is the one to use; more data, more dropout or a smaller model would help."
        )
    if len(val) >= 2 and val[-1] == val.min():
        return "Validation loss was lowest at the very end: a longer run may do better."
    return ""


def peak_memory_bytes(devices: Sequence[jax.Device]) -> int:
    """The most memory that these devices together have held, in bytes.

    CPU devices do not count it; for them it is the process's largest resident set.
    """
    stats = [device.memory_stats() or {} for device in devices]
    peaks = [stat["peak_bytes_in_use"] for stat in stats if "peak_bytes_in_use" in stat]
    return sum(peaks) if peaks else peak_host_memory()
