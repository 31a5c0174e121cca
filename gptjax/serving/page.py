"""The page at /: one HTML file that may load nothing from elsewhere, and what it shows of the models."""

import base64
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.files import PROMPTS
from gptjax.reporting.report import loss_limits, measured, read_metrics, smooth
from gptjax.serving.served import Served

PAGE = Path(__file__).with_name("page.html")
POINTS = 300  # of a curve at most


def page_headers(html: bytes) -> dict[str, str]:
    """The headers of the page: its own script and style, named by their hashes, are all that may be loaded or run."""

    def hashes(tag: bytes) -> str:
        parts = re.findall(rb"<%s>(.*?)</%s>" % (tag, tag), html, re.S)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(part).digest()).decode()}'" for part in parts)

    policy = {
        "default-src": "'none'",
        "script-src": hashes(b"script"),
        "style-src": hashes(b"style"),
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return {
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "Content-Type": "text/html; charset=utf-8",
        "Cache-Control": "no-cache",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }


def page_data(models: Sequence[Served]) -> dict[str, Any]:
    """The models' names, cards and loss curves, and the study's prompts."""
    prompts = PROMPTS.read_text(encoding="utf-8").splitlines() if PROMPTS.exists() else []
    return {
        "models": [
            {
                "name": served.name,
                "chat": served.model.template is not None,
                "card": served.card,
                "loss": _losses(served.model.folder / "metrics.csv"),
                "rules": _rules(served),
            }
            for served in models
        ],
        "prompts": [prompt for prompt in prompts if prompt],
    }


def _rules(served: Served) -> dict[str, float]:
    sampling = served.model.sampling()
    return {"temperature": float(sampling.temperature), "top_p": float(sampling.top_p)}


def _losses(metrics_csv: Path) -> dict[str, Any] | None:
    """A run's training and validation loss as points (step, loss), and the range of losses to draw."""
    if not metrics_csv.exists():
        return None
    metrics = read_metrics(metrics_csv)
    (steps, train), (val_steps, val) = measured(metrics, "train_loss"), measured(metrics, "val_loss")
    if not len(train) + len(val):
        return None
    return {
        "train": _points(steps, smooth(train)),
        "val": _points(val_steps, val),
        "range": [round(limit, 4) for limit in loss_limits(metrics)],
    }


def _points(steps: np.ndarray, losses: np.ndarray) -> list[list[float]]:
    if not len(steps):
        return []
    kept = np.unique(np.linspace(0, len(steps) - 1, min(POINTS, len(steps))).round().astype(int))
    return [[float(steps[i]), round(float(losses[i]), 4)] for i in kept]
