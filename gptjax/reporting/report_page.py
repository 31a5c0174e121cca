"""The report of a run as a page: its figures, what to do next, curves, samples over time, environment and config."""

import contextlib
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.config import Config, flat
from gptjax.errors import UserError
from gptjax.files import write_atomically
from gptjax.page import definitions, page
from gptjax.reporting import chart, environment
from gptjax.reporting.chart import Line
from gptjax.reporting.report import (
    Columns,
    Figures,
    count,
    loss_limits,
    measured,
    overfitting_onset,
    smooth,
    step_limits,
)

WARM = "var(--warm)"
_STYLE = """
.advice { margin: 0; padding-left: 1.2rem; } .advice li { margin-bottom: .5rem; }
details { margin-top: .8rem; } summary { cursor: pointer; } details dl { margin-top: .6rem; }
dd { overflow-wrap: anywhere; min-width: 0; } dd dl { margin: 0; }
"""


def write_page(
    run_dir: Path,
    run: Figures,
    facts: Mapping[str, str],
    advice: Sequence[str],
    samples: Mapping[int, str],
) -> None:
    """Write report.html in a run's folder; `samples` are texts by the step of the checkpoint that wrote them.

    A damaged environment.json is left out.
    """
    starts: list[dict[str, Any]] = []
    with contextlib.suppress(UserError):
        starts = environment.read(run_dir)
    items = "".join(f"<li>{html.escape(text)}</li>" for text in advice or ["Nothing stands out in the run's figures."])
    body = (
        f'<div class="row" style="--n: 2"><div class="card"><h2>The run</h2>{definitions(facts)}</div>'
        f'<div class="card"><h2>What to do next</h2><ul class="advice">{items}</ul></div></div>\n'
        f"<section>{_charts(run.metrics, run.config)}</section>\n{_samples(samples, run.metrics)}"
        f'<section><div class="card"><h2>Environment and config</h2>{_environment(starts)}'
        f"<details><summary>Config</summary>{_shown(flat(run.config))}</details></div></section>\n"
        "<footer>Losses are in nats per token. Tokens per second are those of training steps, without evaluations and "
        "saves. Made by gptjax.</footer>\n"
    )
    write_atomically(run_dir / "report.html", page(run_dir.name, body, chart.STYLE + _STYLE))


def _charts(metrics: Columns, config: Config) -> str:
    x, (steps, norms) = step_limits(metrics), measured(metrics, "grad_norm")
    rates, speeds = measured(metrics, "learning_rate"), measured(metrics, "tokens_per_second")
    norm_lines = _smoothed(steps, norms)
    if config.optimizer.grad_clip and len(norms):
        clip = np.full(2, config.optimizer.grad_clip)
        norm_lines.append(Line(np.array(x), clip, f"clipped to {clip[0]:g}", WARM, "dashed"))
    top = max(float(np.quantile(norms, 0.98)) if len(norms) else 0.0, config.optimizer.grad_clip)
    small = [
        chart.chart("Learning rate", [Line(*rates)], x, _from_zero(rates[1])),
        chart.chart("Gradient norm", norm_lines, x, (0.0, 1.2 * top or 1.0)),
        chart.chart("Tokens per second", _smoothed(*speeds), x, _from_zero(speeds[1]), count),
    ]
    return f'{_losses(metrics)}<div class="row" style="--n: 3; margin-top: 1rem">{"".join(small)}</div>'


def _losses(metrics: Columns) -> str:
    (steps, train), (val_steps, val) = measured(metrics, "train_loss"), measured(metrics, "val_loss")
    lines = _smoothed(steps, train, "training")
    if len(val):
        best = int(np.argmin(val))
        name = f"best: {val[best]:.4f} at step {val_steps[best]:,.0f}"
        lines += [Line(val_steps, val, "validation", WARM), Line(val_steps[[best]], val[[best]], name, WARM, "dots")]
    if (onset := overfitting_onset(val_steps, val)) is not None:
        ends = np.array([onset, metrics["step"][-1]], float)
        lines.append(Line(ends, ends, f"overfitting from step {onset:,}", WARM, "area"))
    return chart.chart("Loss", lines, step_limits(metrics), loss_limits(metrics), height="22rem")


def _smoothed(steps: np.ndarray, values: np.ndarray, name: str = "") -> list[Line]:
    """A line and, behind it, the values themselves where they are enough to be smoothed."""
    return [Line(steps, values, style="faint")] * (len(values) >= 50) + [Line(steps, smooth(values), name)]


def _from_zero(values: np.ndarray) -> tuple[float, float]:
    return 0.0, 1.08 * float(values.max()) if len(values) and values.max() > 0 else 1.0


def _samples(samples: Mapping[int, str], metrics: Columns) -> str:
    if not samples:
        return ""
    losses = dict(zip(*measured(metrics, "val_loss"), strict=True))
    cards = ""
    for step, text in sorted(samples.items()):
        loss = f'<p class="small">validation loss {losses[step]:.4f}</p>' if step in losses else ""
        cards += f'<div class="card"><h3>step {step:,}</h3>{loss}<pre>{html.escape(text)}</pre></div>'
    return (
        '<section><h2>Samples over time</h2><p class="small" style="margin-bottom: .8rem">From the checkpoints that '
        "the run keeps, all with the same seed; train.keep_every keeps more of them.</p>"
        f'<div class="row" style="--n: {min(len(samples), 3)}">{cards}</div></section>\n'
    )


def _environment(starts: Sequence[dict[str, Any]]) -> str:
    """Each start of the run without its config, the newest open."""
    parts = ""
    for entry in starts:
        newest = ' open=""' if entry is starts[-1] else ""
        title = f"From step {entry['step']:,}, started {entry.get('time')}"
        shown = _shown({name: value for name, value in entry.items() if name not in ("step", "time", "config")})
        parts += f"<details{newest}><summary>{html.escape(title)}</summary>{shown}</details>"
    return parts


def _shown(value: Any) -> str:
    """A value from JSON: the names and values of an object, the items of a list, or a text."""
    if isinstance(value, dict) and value:
        return (
            "<dl>" + "".join(f"<dt>{html.escape(str(k))}</dt><dd>{_shown(v)}</dd>" for k, v in value.items()) + "</dl>"
        )
    if isinstance(value, list | tuple):
        return " ".join(map(_shown, value))
    text = html.escape("none" if value in (None, "", {}) else str(value))
    return f"<pre>{text}</pre>" if "\n" in text else text
