"""The picture and the closing words of a run survive whatever a run can leave behind."""

import gc
import math
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import jax
import numpy as np
import pytest
from matplotlib.figure import Figure

from gptjax.report import (
    _draw_val,
    _set_limits,
    overfitting_onset,
    peak_memory_bytes,
    plot_losses,
    read_metrics,
    run_report,
    smooth,
)

COLUMNS = "step,tokens,seconds,train_loss,val_loss,learning_rate,grad_norm,tokens_per_second"


def write_csv(path, rows):
    """Rows are (step, train_loss, val_loss), the losses as they stand in the file."""
    lines = [f"{step},{step * 100},{step / 2},{train},{val},1e-3,0.5,200" for step, train, val in rows]
    path.write_text("".join(f"{line}\n" for line in [COLUMNS, *lines]))
    return path


def u_shape(n=11):
    """Steps 0, 100, ... and losses with their minimum, 1.5, at step 400."""
    steps = np.arange(n) * 100.0
    return steps, 1.5 + 0.02 * (np.arange(n) - 4.0) ** 2


def test_read_metrics_has_nan_where_nothing_was_measured(tmp_path):
    metrics = read_metrics(write_csv(tmp_path / "m.csv", [(0, 4.2, ""), (10, 3.5, 3.75), (20, "nan", "inf")]))
    assert list(metrics) == COLUMNS.split(",")
    np.testing.assert_array_equal(metrics["step"], [0, 10, 20])
    np.testing.assert_array_equal(metrics["train_loss"], [4.2, 3.5, np.nan])
    np.testing.assert_array_equal(metrics["val_loss"], [np.nan, 3.75, np.inf])


@pytest.mark.parametrize("tail", ["2", "20,2000,10.0", "20,2000,10.0,3.1,,1e-3,0.5,20", "20,2000,10.0\n"])
def test_read_metrics_leaves_out_a_half_written_line(tmp_path, tail):
    path = write_csv(tmp_path / "m.csv", [(0, 4.2, ""), (10, 3.5, "")])
    path.write_text(path.read_text() + tail)
    np.testing.assert_array_equal(read_metrics(path)["step"], [0, 10])


@pytest.mark.parametrize("text", ["", "step,tok", COLUMNS + "\n"])
def test_read_metrics_of_a_run_that_has_just_begun(tmp_path, text):
    path = tmp_path / "m.csv"
    path.write_text(text)
    assert all(len(column) == 0 for column in read_metrics(path).values())


def test_read_metrics_takes_a_resumed_runs_lines_for_the_steps_it_repeats(tmp_path):
    rows = [(0, 9, ""), (10, 8, ""), (20, 7, ""), (30, 6, ""), (10, 3, ""), (20, 2, "")]
    metrics = read_metrics(write_csv(tmp_path / "m.csv", rows))
    np.testing.assert_array_equal(metrics["step"], [0, 10, 20])
    np.testing.assert_array_equal(metrics["train_loss"], [9, 3, 2])


def test_overfitting_begins_at_the_minimum_of_a_u_shape():
    assert overfitting_onset(*u_shape()) == 400


def test_overfitting_of_a_loss_that_only_rises_begins_at_the_first_evaluation():
    assert overfitting_onset(np.array([0, 10, 20]), np.array([2.0, 2.1, 2.2])) == 0


@pytest.mark.parametrize("seed", range(20))
def test_no_overfitting_on_a_noisy_plateau(seed):
    noise = np.random.default_rng(seed).normal(scale=0.002, size=40)
    losses = (1.5 + 3 * np.exp(-np.arange(40) / 3)) * (1 + noise)
    assert overfitting_onset(np.arange(40), losses) is None


@pytest.mark.parametrize(
    "losses",
    [
        [],
        [2.0],
        [2.0, 3.0],  # one evaluation after the best can be an accident
        [4.0, 3.0, 2.5, 2.2, 2.1],
        [4.0, 3.0, 2.0, 2.5],
        [4.0, 2.0, 2.5, 2.5, 2.01],  # on its way back
        [4.0, 2.0, 2.5, 2.01, 2.5],
        [2.0, 2.01, 2.015, 2.019],  # within 1%
        [math.nan] * 5,
    ],
)
def test_no_overfitting(losses):
    assert overfitting_onset(np.arange(len(losses)), np.array(losses, dtype=float)) is None


def test_overfitting_ignores_steps_without_an_evaluation():
    steps, losses = u_shape()
    gaps = np.full(3 * len(losses), math.nan)
    gaps[::3] = losses
    assert overfitting_onset(np.repeat(steps, 3), gaps) == 400


def test_smoothing_does_not_lag_and_keeps_the_slope_at_the_beginning():
    line = np.linspace(5.0, 1.0, 500)
    np.testing.assert_allclose(smooth(line)[:480], line[:480], atol=1e-12)  # the last 10 see the mirrored end
    edge = np.where(np.arange(500) < 250, 1.0, 0.0)
    assert smooth(edge)[249] == pytest.approx(1 - smooth(edge)[250])


def test_smoothing_calms_noise():
    noise = np.random.default_rng(0).normal(size=2000)
    assert smooth(noise).std() < 0.25 * noise.std()


@pytest.mark.parametrize("n", [0, 1, 2, 49, 50, 51, 1000])
def test_smoothing_keeps_length_and_level(n):
    np.testing.assert_allclose(smooth(np.full(n, 3.0)), np.full(n, 3.0))


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [(0, 4.2, "")],
        [(0, "", 4.2)],
        [(0, 4.2, 4.3), (10, 3.0, "")],
        [(0, 4.2, 4.3), (10, 3.0, 3.1)],
        [(0, 4.2, 4.3), (10, "nan", "nan"), (20, "inf", "inf")],
        [(0, "nan", "inf")],
        [(step, 2.0, 2.0) for step in range(5)],
        [(step, "nan" if step > 60 else 4 - step / 50, step / 10 if step % 20 == 0 else "") for step in range(100)],
        [(step, 4 - step / 50 if step < 40 else "nan", "") for step in range(1000)],
    ],
    ids=[
        "empty",
        "one-row",
        "only-val",
        "one-eval",
        "two-evals",
        "not-finite",
        "nothing-finite",
        "constant",
        "long",
        "soon-nan",
    ],
)
def test_plot_copes_with(rows, tmp_path):
    csv = write_csv(tmp_path / "metrics.csv", rows)
    plot_losses(csv, tmp_path / "loss.png", title="$a_run")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.png", "metrics.csv"]


def count_figures():
    gc.collect()
    return sum(isinstance(thing, Figure) for thing in gc.get_objects())


def test_plots_leave_no_figure_behind(tmp_path):
    before = count_figures()
    csv = write_csv(tmp_path / "metrics.csv", [(0, 4.2, 4.3), (10, 3.0, 3.1)])
    for _ in range(2):
        plot_losses(csv, tmp_path / "loss.png", title="a run")
    assert count_figures() == before


def test_a_plot_that_fails_leaves_the_old_picture(tmp_path, monkeypatch):
    csv, png = write_csv(tmp_path / "metrics.csv", [(0, 4.2, "")]), tmp_path / "loss.png"
    png.write_bytes(b"old")

    def half_a_picture(figure, path, **options):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", half_a_picture)
    with pytest.raises(OSError, match="disk full"):
        plot_losses(csv, png, title="a run")
    assert png.read_bytes() == b"old"


def test_high_losses_of_the_first_steps_do_not_flatten_the_rest(tmp_path):
    rows = [(step, 3 + 8 * math.exp(-step / 10), 11 if step == 0 else "") for step in range(1000)]
    axes = Figure().add_subplot()
    _set_limits(axes, read_metrics(write_csv(tmp_path / "m.csv", rows)))
    bottom, top = axes.get_ylim()
    assert 2.5 < bottom < 3 and 3 < top < 3.5


@pytest.mark.parametrize(("n", "labels"), [(11, ["validation", "overfitting from step 400"]), (5, ["validation"])])
def test_overfitting_is_drawn_where_there_is_some(n, labels):
    axes = Figure().add_subplot()
    steps, losses = u_shape(n)
    _draw_val(axes, steps, losses, end=steps[-1])
    assert axes.get_legend_handles_labels()[1] == labels
    assert axes.texts[0].get_text() == "best 1.5000\nat step 400"


def overfitted_metrics(tmp_path):
    steps, losses = u_shape()
    return read_metrics(write_csv(tmp_path / "m.csv", [(s, 1.25, v) for s, v in zip(steps, losses, strict=True)]))


def test_report_says_what_happened(tmp_path):
    report = run_report(
        overfitted_metrics(tmp_path),
        title="shakespeare",
        characters_per_token=2.0,
        mfu=0.413,
        peak_memory=3 * 2**29,
        sample="To be\n",
    )
    rows = dict([cell.strip() for cell in line.split("|")[1:3]] for line in report.splitlines() if line[:1] == "|")
    assert report.startswith("# shakespeare\n")
    assert rows["steps"] == "1,000" and rows["tokens"] == "100k" and rows["time"] == "8 min 20 s"
    assert rows["tokens/s (median)"] == "200"
    assert rows["model FLOPs utilization"] == "41.3%" and rows["peak memory"] == "1.50 GiB"
    assert rows["final training loss"] == "1.2500" and rows["best validation loss"] == "1.5000 at step 400"
    assert rows["perplexity there"] == "4.48"  # e^1.5
    assert rows["bits per character there"] == "1.0820 (0.7500 nats)"  # 1.5 / ln 2 / 2
    assert "best at step 400 and has risen 48.0% since" in report
    assert report.endswith("```text\nTo be\n```\n")


def test_report_of_a_run_that_was_still_getting_better(tmp_path):
    report = run_report(read_metrics(write_csv(tmp_path / "m.csv", [(0, 4, 4), (10, 3, 3)])), title="a run")
    assert "a longer run may do better" in report and "Overfitting" not in report
    assert "Sample" not in report and "bits" not in report and "utilization" not in report


def test_report_of_a_run_without_a_step(tmp_path):
    report = run_report(read_metrics(write_csv(tmp_path / "m.csv", [])), title="a run")
    assert "nan" not in report and "validation" not in report


def test_report_fences_a_sample_that_has_fences_of_its_own(tmp_path):
    report = run_report(overfitted_metrics(tmp_path), title="a run", sample="```python\npass\n```")
    assert report.endswith("````text\n```python\npass\n```\n````\n")


def device_with(stats):
    return Mock(spec=jax.Device, memory_stats=lambda: stats)


def test_peak_memory_is_summed_over_accelerators():
    stats = [{"peak_bytes_in_use": 3}, {"peak_bytes_in_use": 4}, {}, None]
    assert peak_memory_bytes([device_with(stat) for stat in stats]) == 7


@pytest.mark.parametrize(("platform", "size"), [("linux", 5 * 1024), ("darwin", 5)])
def test_peak_memory_of_a_cpu_run_is_the_process_in_bytes(platform, size, monkeypatch):
    monkeypatch.setattr(sys, "platform", platform)
    usage = SimpleNamespace(ru_maxrss=5)
    monkeypatch.setitem(sys.modules, "resource", SimpleNamespace(getrusage=lambda who: usage, RUSAGE_SELF=0))
    assert peak_memory_bytes([device_with(None)]) == size
