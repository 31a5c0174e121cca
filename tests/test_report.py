"""The plot and the report of a run, whatever the run leaves behind."""

import gc
import math
import sys
import weakref
from types import SimpleNamespace
from unittest.mock import Mock

import jax
import numpy as np
import pytest

from gptjax.report import (
    loss_figure,
    overfitting_onset,
    peak_memory_bytes,
    plot_losses,
    read_metrics,
    run_report,
    smooth,
)

COLUMNS = "step,tokens,seconds,train_loss,val_loss,learning_rate,grad_norm,tokens_per_second"
U_SHAPE = [1.5 + 0.02 * (i - 4) ** 2 for i in range(11)]  # its minimum is 1.5


@pytest.fixture
def write(tmp_path):
    """A metrics.csv of rows (step, train_loss, val_loss), with the losses as they are in the file."""

    def to_file(rows, tail=""):
        lines = [f"{step},{step * 100},{step / 2},{train},{val},1e-3,0.5,200" for step, train, val in rows]
        path = tmp_path / "metrics.csv"
        path.write_text("".join(f"{line}\n" for line in [COLUMNS, *lines]) + tail)
        return path

    return to_file


@pytest.fixture
def overfitted(write):
    """The metrics of a run whose best validation loss is 1.5, at step 400 of 1,000."""
    return read_metrics(write([(100 * i, 1.25, loss) for i, loss in enumerate(U_SHAPE)]))


@pytest.mark.parametrize("tail", ["", "2", "30,3000,15.0,3.1,,1e-3,0.5,20", "30,3000,15.0\n"])
def test_metrics_are_nan_where_nothing_was_measured_and_incomplete_lines_are_left_out(write, tail):
    metrics = read_metrics(write([(0, 4.2, ""), (10, 3.5, 3.75), (20, "nan", "inf")], tail))
    assert list(metrics) == COLUMNS.split(",")
    np.testing.assert_array_equal(metrics["step"], [0, 10, 20])
    np.testing.assert_array_equal(metrics["train_loss"], [4.2, 3.5, np.nan])
    np.testing.assert_array_equal(metrics["val_loss"], [np.nan, 3.75, np.inf])


@pytest.mark.parametrize("text", ["", "step,tok", COLUMNS + "\n"])
def test_the_metrics_of_a_run_that_has_just_begun_are_empty(tmp_path, text):
    path = tmp_path / "m.csv"
    path.write_text(text)
    assert all(len(column) == 0 for column in read_metrics(path).values())


@pytest.mark.parametrize(
    ("losses", "onset"),
    [
        (U_SHAPE, 4),
        ([2.0, 2.1, 2.2], 0),  # it only rises
        ([4.0, math.nan, 2.0, math.nan, 2.5, math.inf, 2.5], 2),  # steps without an evaluation do not count
        ([], None),
        ([2.0], None),
        ([2.0, 3.0], None),
        ([4.0, 3.0, 2.0, 2.5], None),  # one bad evaluation after the best
        ([4.0, 3.0, 2.5, 2.2, 2.1], None),
        ([4.0, 2.0, 2.5, 2.5, 2.01], None),  # it falls again
        ([4.0, 2.0, 2.5, 2.01, 2.5], None),
        ([2.0, 2.01, 2.015, 2.019], None),  # within 1%
        ([math.nan] * 5, None),
    ],
)
def test_overfitting_begins_at_the_best_evaluation_before_two_worse_ones(losses, onset):
    assert overfitting_onset(np.arange(len(losses)), np.array(losses, dtype=float)) == onset


def test_no_overfitting_on_a_noisy_plateau():
    for seed in range(20):
        noise = np.random.default_rng(seed).normal(scale=0.002, size=40)
        losses = (1.5 + 3 * np.exp(-np.arange(40) / 3)) * (1 + noise)
        assert overfitting_onset(np.arange(40), losses) is None


def test_smoothing_calms_noise_without_lag_and_keeps_level_and_slope():
    for n in (0, 1, 2, 49, 50, 51, 1000):
        np.testing.assert_allclose(smooth(np.full(n, 3.0)), np.full(n, 3.0))
    line = np.linspace(5.0, 1.0, 500)
    np.testing.assert_allclose(smooth(line)[:480], line[:480], atol=1e-12)  # the last 10 see the mirrored end
    edge = np.where(np.arange(500) < 250, 1.0, 0.0)
    assert smooth(edge)[249] == pytest.approx(1 - smooth(edge)[250])
    noise = np.random.default_rng(0).normal(size=2000)
    assert smooth(noise).std() < 0.25 * noise.std()


def test_every_run_has_a_picture(write, tmp_path):
    for rows in (
        [],
        [(0, 4.2, "")],
        [(0, "", 4.2)],
        [(0, 4.2, 4.3), (10, 3.0, "")],
        [(0, 4.2, 4.3), (10, "nan", "nan"), (20, "inf", "inf")],
        [(0, "nan", "inf")],
        [(step, 2.0, 2.0) for step in range(5)],
        [(step, "nan" if step > 60 else 4 - step / 50, step / 10 if step % 20 == 0 else "") for step in range(100)],
        [(step, 4 - step / 50 if step < 40 else "nan", "") for step in range(1000)],
    ):
        plot_losses(write(rows), tmp_path / "loss.png", title="$a_run")
        assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.png", "metrics.csv"]
        (tmp_path / "loss.png").unlink()


def test_the_picture_shows_the_best_step_and_overfitting_and_is_not_kept_in_memory(overfitted):
    for end, labels in ((11, ["overfitting from step 400"]), (5, [])):
        figure = loss_figure({name: values[:end] for name, values in overfitted.items()}, "a run")
        shown = figure.axes[0].get_legend_handles_labels()[1]
        assert shown == ["training", "validation", "best: 1.5000 at step 400", *labels]
    kept = weakref.ref(figure)
    del figure
    gc.collect()
    assert kept() is None


def test_high_losses_of_the_first_steps_do_not_flatten_the_rest(write):
    rows = [(step, 3 + 8 * math.exp(-step / 10), 11 if step == 0 else "") for step in range(1000)]
    bottom, top = loss_figure(read_metrics(write(rows)), "a run").axes[0].get_ylim()
    assert 2.5 < bottom < 3 and 3 < top < 3.5


def test_the_report_has_the_figures_of_the_run(overfitted):
    more = {"characters_per_token": 2.0, "mfu": 0.413, "peak_memory": 3 * 2**29, "sample": "```python\npass\n```\n"}
    text = run_report(overfitted, title="shakespeare", **more)
    rows = dict([cell.strip() for cell in line.split("|")[1:3]] for line in text.splitlines() if line[:1] == "|")
    assert text.startswith("# shakespeare\n")
    assert rows["steps"] == "1,000" and rows["tokens"] == "100k" and rows["time"] == "0:08:20"
    assert rows["tokens/s (median)"] == "200"
    assert rows["model FLOPs utilization"] == "41.3%" and rows["peak memory"] == "1.50 GiB"
    assert rows["final training loss"] == "1.2500" and rows["best validation loss"] == "1.5000 at step 400"
    assert rows["perplexity there"] == "4.48"  # e^1.5
    assert rows["bits per character there"] == "1.0820 (0.7500 nats)"  # 1.5 / ln 2 / 2
    assert "best at step 400 and has risen 48.0% since" in text
    assert text.endswith("````text\n```python\npass\n```\n````\n"), "a fence is longer than those inside"


def test_the_report_leaves_out_what_is_not_known(write):
    text = run_report(read_metrics(write([(0, 4, 4), (10, 3, 3)])), title="a run")
    assert "a longer run may do better" in text and "Overfitting" not in text
    assert "Sample" not in text and "bits" not in text and "utilization" not in text
    text = run_report(read_metrics(write([])), title="a run without a step")
    assert "nan" not in text and "validation" not in text


@pytest.mark.parametrize(("platform", "size"), [("linux", 5 * 1024), ("darwin", 5)])
def test_peak_memory_is_that_of_the_accelerators_or_else_of_the_process(platform, size, monkeypatch):
    stats = [{"peak_bytes_in_use": 3}, {"peak_bytes_in_use": 4}, {}, None]
    devices = [Mock(spec=jax.Device, memory_stats=lambda stat=stat: stat) for stat in stats]
    assert peak_memory_bytes(devices) == 7
    monkeypatch.setattr(sys, "platform", platform)
    usage = SimpleNamespace(ru_maxrss=5)
    monkeypatch.setitem(sys.modules, "resource", SimpleNamespace(getrusage=lambda who: usage, RUSAGE_SELF=0))
    assert peak_memory_bytes(devices[3:]) == size
