"""What a run has to show for itself: the picture of its losses and its closing words."""

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float, Real
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, MaxNLocator

from gptjax.host import peak_host_memory

Columns = dict[str, Float[np.ndarray, " R"]]  # a column's name -> its R rows

TRAIN, VAL, INK, GRID = "#3b6fb6", "#d1495b", "#3a3a3a", "#e6e6e6"


def read_metrics(path: str | Path) -> Columns:
    """The columns of a run's metrics.csv as float64 arrays, nan where nothing was measured.

    Lines that are not whole are left out, so a run that is writing can be read, and where a resumed run repeats
    steps, its later lines count.
    """
    text = Path(path).read_text(encoding="utf-8")
    header, *lines = text[: text.rfind("\n") + 1].splitlines() or [""]
    names = header.split(",")
    rows = [cells for line in lines if len(cells := line.split(",")) == len(names)]
    table = np.array([[float(cell or "nan") for cell in row] for row in rows]).reshape(-1, len(names))
    steps = table[:, names.index("step")] if "step" in names else np.arange(len(table))
    lowest_from = np.minimum.accumulate(steps[::-1])[::-1]
    table = table[steps < np.append(lowest_from[1:], np.inf)]
    return {name: table[:, i] for i, name in enumerate(names)}


def overfitting_onset(
    steps: Real[np.ndarray, " E"], val_losses: Float[np.ndarray, " E"], *, margin: float = 0.01
) -> int | None:
    """The step of the best validation loss if validation has clearly risen since, otherwise None.

    Clearly: the last two evaluations both lie more than `margin` (a fraction, 1%) above the best one. One bad
    evaluation, a plateau whose noise is a few tenths of a percent and a loss on its way back down are not enough.
    """
    evaluated = np.isfinite(val_losses)
    steps, losses = steps[evaluated], val_losses[evaluated]
    if len(losses) < 3:
        return None
    best = int(np.argmin(losses))
    risen = losses[best + 1 :][-2:] > losses[best] * (1 + margin)
    return int(steps[best]) if len(risen) == 2 and risen.all() else None


def smooth(values: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """A centred moving average (Hann window over 4% of the values), which unlike an exponential one does not lag.

    Beyond the first value the curve goes on as steeply as it began, beyond the last it is mirrored.
    """
    half = len(values) // 50
    window = np.hanning(2 * half + 3)[1:-1]
    padded = np.concatenate([2 * values[:1] - values[half:0:-1], values, values[: -half - 1 : -1]])
    return np.convolve(padded, window / window.sum(), "valid") if len(values) else values


def plot_losses(metrics_csv: str | Path, png: str | Path, *, title: str) -> None:
    """Draw a run's training and validation loss over its steps, with the best step and where overfitting begins.

    Takes a fraction of a second; the file is replaced at once, so a viewer never sees half a picture. No pyplot,
    whose figures would pile up in a training loop.
    """
    metrics, png = read_metrics(metrics_csv), Path(png)
    figure = Figure(figsize=(9, 5), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _set_limits(axes, metrics)
    _draw_train(axes, *_finite(metrics, "train_loss"))
    _draw_val(axes, *_finite(metrics, "val_loss"), end=metrics["step"][-1:].sum())
    _style(axes, metrics, title)
    temporary = png.with_name(f".{png.name}.{os.getpid()}.tmp")
    figure.savefig(temporary, format="png")
    os.replace(temporary, png)


def _finite(metrics: Columns, name: str) -> tuple[np.ndarray, np.ndarray]:
    measured = np.isfinite(metrics[name])
    return metrics["step"][measured], metrics[name][measured]


def _draw_train(axes: Axes, steps: np.ndarray, losses: np.ndarray) -> None:
    if len(losses) >= 50:  # fewer are not smoothed
        axes.plot(steps, losses, color=TRAIN, alpha=0.22, linewidth=0.8)
    if len(losses):
        marker = "o" if len(losses) == 1 else None
        axes.plot(steps, smooth(losses), color=TRAIN, linewidth=1.8, marker=marker, markersize=4.5, label="training")


def _draw_val(axes: Axes, steps: np.ndarray, losses: np.ndarray, end: float) -> None:
    if len(losses) == 0:
        return
    markersize = 4.5 if len(losses) <= 50 else 0
    axes.plot(steps, losses, color=VAL, linewidth=1.8, marker="o", markersize=markersize, label="validation", zorder=3)
    onset = overfitting_onset(steps, losses)
    if onset is not None:
        axes.axvline(onset, color=VAL, linewidth=1, linestyle=(0, (4, 3)), alpha=0.8)
        axes.axvspan(onset, end, color=VAL, alpha=0.08, linewidth=0, label=f"overfitting from step {onset:,}")
    _mark_best(axes, steps, losses, end)


def _mark_best(axes: Axes, steps: np.ndarray, losses: np.ndarray, end: float) -> None:
    best = int(np.argmin(losses))
    step, loss = steps[best], losses[best]
    axes.plot(step, loss, "o", color=VAL, markersize=9, markeredgecolor="white", markeredgewidth=1.5, zorder=4)
    side = -1 if step > end / 2 else 1
    beside = np.interp(np.linspace(step, step + side * 0.14 * end, 20), steps, losses)  # what the text must clear
    bottom, top = axes.get_ylim()
    below = loss > top - 0.2 * (top - bottom)
    axes.annotate(
        f"best {loss:.4f}\nat step {int(step):,}",
        (step, loss if below else min(beside.max(), top - 0.2 * (top - bottom))),
        xytext=(side * -4, -12 if below else 12),
        textcoords="offset points",
        va="top" if below else "bottom",
        ha="right" if side < 0 else "left",
        color=VAL,
        fontweight="bold",
        path_effects=[withStroke(linewidth=4, foreground="white")],
        zorder=5,
    )


def _set_limits(axes: Axes, metrics: Columns) -> None:
    """Fit the axes to the run without its first 5%, whose high losses would flatten all the rest."""
    (train_steps, train), (val_steps, val) = _finite(metrics, "train_loss"), _finite(metrics, "val_loss")
    steps, losses = np.concatenate([train_steps, val_steps]), np.concatenate([smooth(train), val])
    if len(losses) == 0:
        return
    first, last = metrics["step"][[0, -1]]
    late = losses[steps > first + 0.05 * (last - first)]
    if len(losses) < 20 or len(late) < 2 or np.ptp(losses) < 1.5 * np.ptp(late):
        late = losses
    room = max(0.06 * np.ptp(late), 2.5 * np.std((train - smooth(train))[len(train) // 20 :] if len(train) else 0))
    axes.set_ylim(late.min() - (room or 0.1), late.max() + (room or 0.1))
    margin = 0.015 * (last - first) or 1
    axes.set_xlim(first - margin, last + margin)


def _style(axes: Axes, metrics: Columns, title: str) -> None:
    tokens_per_step = metrics["tokens"][-1:].sum() / max(metrics["step"][-1:].sum(), 1)

    def step_and_tokens(step: float, _: int) -> str:
        return f"{step:,.0f}\n{_count(step * tokens_per_step)} tokens" if tokens_per_step else f"{step:,.0f}"

    axes.set_title(title, loc="left", fontsize=14, fontweight="bold", color=INK, pad=30, parse_math=False)
    axes.set_xlabel("step", color=INK)
    axes.set_ylabel("loss (nats per token)", color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(step_and_tokens))
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, length=0, pad=6)
    axes.spines[:].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1), ncols=3, frameon=False, labelcolor=INK)


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
    sample: str | None = None,
) -> str:
    """A finished run in Markdown that also reads well in a terminal.

    `characters_per_token`, of the validation text, makes losses of different tokenizers comparable. `mfu` is a
    fraction, `peak_memory` in bytes. The final training loss is the smoothed one.
    """
    rows = _speed_rows(metrics, mfu, peak_memory) + _loss_rows(metrics, characters_per_token)
    width = max(len(name) for name, _ in rows)
    value_width = max(len(value) for _, value in rows)
    table = [f"| {name:{width}} | {value:{value_width}} |" for name, value in rows]
    rule = f"|{'-' * (width + 2)}|{'-' * (value_width + 2)}|"
    parts = [f"# {title}", "\n".join([f"| {'':{width}} | {'':{value_width}} |", rule, *table]), _verdict(metrics)]
    if sample is not None:
        fence = "`" * max([3, *(len(ticks) + 1 for ticks in re.findall("`+", sample))])
        parts += ["## Sample", f"{fence}text\n{sample.rstrip()}\n{fence}"]
    return "\n\n".join(part for part in parts if part) + "\n"


def _last(values: np.ndarray) -> float:
    return float(values[-1]) if len(values) else 0.0


def _speed_rows(metrics: Columns, mfu: float | None, peak_memory: int | None) -> list[tuple[str, str]]:
    seconds, rates = _last(metrics["seconds"]), metrics["tokens_per_second"]
    rates = rates[np.isfinite(rates)]
    rows = [("steps", f"{_last(metrics['step']):,.0f}"), ("tokens", _count(_last(metrics["tokens"])))]
    rows += [("time", _duration(seconds)), ("tokens/s (median)", f"{np.median(rates):,.0f}" if len(rates) else "-")]
    if mfu is not None:
        rows.append(("model FLOPs utilization", f"{mfu:.1%}"))
    if peak_memory is not None:
        rows.append(("peak memory", f"{peak_memory / 2**30:.2f} GiB"))
    return rows


def _loss_rows(metrics: Columns, characters_per_token: float | None) -> list[tuple[str, str]]:
    (_, train), (steps, val) = _finite(metrics, "train_loss"), _finite(metrics, "val_loss")
    rows = [("final training loss", f"{smooth(train)[-1]:.4f}")] if len(train) else []
    if len(val) == 0:
        return rows
    best = int(np.argmin(val))
    rows.append(("best validation loss", f"{val[best]:.4f} at step {int(steps[best]):,}"))
    rows.append(("perplexity there", f"{math.exp(min(val[best], 700)):.2f}"))
    if characters_per_token is not None:
        nats = val[best] / characters_per_token
        rows.append(("bits per character there", f"{nats / math.log(2):.4f} ({nats:.4f} nats)"))
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


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "-"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, hours = round(seconds) // 60, round(seconds) // 3600
    return f"{hours} h {minutes % 60} min" if hours else f"{minutes} min {round(seconds) % 60} s"


def peak_memory_bytes(devices: Sequence[jax.Device]) -> int:
    """The most memory this process's run has held, in bytes: on accelerators all of these devices together.

    CPU devices keep no such count; there it is the process's largest resident set.
    """
    stats = [device.memory_stats() or {} for device in devices]
    peaks = [stat["peak_bytes_in_use"] for stat in stats if "peak_bytes_in_use" in stat]
    return sum(peaks) if peaks else peak_host_memory()
