"""Line charts as SVG inside HTML: they follow the page's width and colours, and their text keeps its size."""

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float
from matplotlib.ticker import MaxNLocator

_BINS = 400  # a longer line is drawn by its lowest and highest point in each of so many parts
STYLE = """
figure { margin: 0; } figcaption { font-weight: 600; }
.key { color: var(--c); font-weight: 400; font-size: .875rem; white-space: nowrap; margin-left: .6rem; }
.key.plain::before { content: "\\2014\\a0"; } .key.dots::before { content: "\\25cf\\a0"; }
.key.dashed::before { content: "\\2013\\a0\\2013\\a0"; } .key.area::before { content: "\\25a8\\a0"; }
.plot { position: relative; height: var(--h, 11rem); margin: .8rem .6rem 1.8rem 3.4rem; }
.plot svg { position: absolute; width: 100%; height: 100%; overflow: hidden; }
.plot path { fill: none; stroke: var(--c); stroke-width: 2; vector-effect: non-scaling-stroke; stroke-linejoin: round; }
.plot .grid { stroke: var(--line); stroke-width: 1; } .plot .faint { opacity: .3; stroke-width: 1; }
.plot .dots { stroke-width: 7; stroke-linecap: round; } .plot .dashed { stroke-width: 1.5; stroke-dasharray: 5 4; }
.plot rect { fill: var(--c); opacity: .09; }
.plot span { position: absolute; color: var(--soft); font-size: .8rem; font-variant-numeric: tabular-nums;
  white-space: nowrap; }
.plot .y { right: calc(100% + .5rem); transform: translateY(50%); }
.plot .x { top: calc(100% + .3rem); transform: translateX(-50%); }
"""


@dataclass(frozen=True)
class Line:
    """A line through finite points; one with a name is in the legend. "area" fills the chart from its first x on."""

    x: Float[np.ndarray, " N"]
    y: Float[np.ndarray, " N"]
    name: str = ""
    color: str = "var(--accent)"
    style: Literal["plain", "faint", "dots", "dashed", "area"] = "plain"


def chart(
    title: str,
    lines: Sequence[Line],
    x_limits: tuple[float, float],
    y_limits: tuple[float, float],
    number: Callable[[float], str] | None = None,
    height: str = "11rem",
) -> str:
    """A card with the lines between these limits, empty without a point; `number` writes the labels of the y axis."""
    lines = [line for line in lines if len(line.x)]
    if not lines:
        return ""
    (left, right), (low, high) = x_limits, y_limits

    def across(x: np.ndarray | float) -> np.ndarray:
        return np.asarray((np.asarray(x) - left) / (right - left))

    def up(y: np.ndarray | float) -> np.ndarray:
        return np.asarray((np.asarray(y) - low) / (high - low))

    labels = "".join(
        f'<span class="x" style="left: {across(tick):.2%}">{tick:,.0f}</span>'
        for tick in _ticks(left, right, integer=True)
    )
    grid = ""
    for tick in _ticks(low, high):
        grid += f"M0 {1000 * (1 - up(tick)):.1f}h1000"
        labels += f'<span class="y" style="bottom: {up(tick):.2%}">{(number or _short)(tick)}</span>'
    drawn = "".join(_draw(line, across(line.x), up(line.y)) for line in lines)
    keys = " ".join(
        f'<span class="key {line.style}" style="--c: {line.color}">{html.escape(line.name)}</span>'
        for line in lines
        if line.name
    )
    return (
        f'<figure class="card"><figcaption>{html.escape(title)} {keys}</figcaption><div class="plot" '
        f'style="--h: {height}"><svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" '
        f'aria-label="{html.escape(title)}"><path class="grid" d="{grid}"/>{drawn}</svg>{labels}</div></figure>\n'
    )


def _short(value: float) -> str:
    return f"{value:.1e}".replace("e-0", "e-") if 0 < abs(value) < 1e-3 else f"{value:.4g}"


def _ticks(low: float, high: float, integer: bool = False) -> list[float]:
    locator = MaxNLocator(5, steps=[1, 2, 2.5, 5, 10], integer=integer)
    return [float(tick) for tick in locator.tick_values(low, high) if low <= tick <= high]


def _draw(line: Line, across: np.ndarray, up: np.ndarray) -> str:
    """A line whose points are fractions of the chart's width and height."""
    if line.style == "area":
        x = 1000 * across[0]
        return f'<rect style="--c: {line.color}" x="{x:.1f}" y="0" width="{1000 - x:.1f}" height="1000"/>'
    points = [f"{1000 * x:.1f} {1000 * (1 - y):.1f}" for x, y in zip(*_thin(across, up), strict=True)]
    path = "".join(f"M{point}h0" for point in points) if line.style == "dots" else "M" + "L".join(points)
    return f'<path class="{line.style}" style="--c: {line.color}" d="{path}"/>'


def _thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The lowest and the highest point of each part of a long line, so that no spike is lost."""
    if len(x) <= 2 * _BINS:
        return x, y
    parts = np.array_split(np.arange(len(x)), _BINS)
    kept = np.unique([part[pick(y[part])] for part in parts for pick in (np.argmin, np.argmax)])
    return x[kept], y[kept]
