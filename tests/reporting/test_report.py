"""The plot and the report of a run, whatever the run leaves behind."""

import gc
import json
import math
import sys
import weakref
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import Mock
from xml.etree import ElementTree

import jax
import numpy as np
import pytest

from gptjax.config import Config, MeshConfig
from gptjax.reporting.advice import advice
from gptjax.reporting.report import (
    Figures,
    facts,
    loss_figure,
    overfitting_onset,
    peak_memory_bytes,
    plot_losses,
    read_metrics,
    run_report,
    smooth,
)
from gptjax.reporting.report_page import write_page

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
    run = Figures(overfitted, Config(), characters_per_token=2.0, mfu=0.413, peak_memory=3 * 2**29, memory=2.0**33)
    text = run_report("shakespeare", facts(run), advice(run), "```python\npass\n```\n")
    rows = dict([cell.strip() for cell in line.split("|")[1:3]] for line in text.splitlines() if line[:1] == "|")
    assert text.startswith("# shakespeare\n")
    assert rows["steps"] == "1,000" and rows["tokens"] == "100k" and rows["time"] == "0:08:20"
    assert rows["tokens/s (median)"] == "200" and rows["of it in training steps"] == "100%"
    assert rows["model FLOPs utilization"] == "41.3%" and rows["peak memory"] == "1.50 GiB of 8 GiB"
    assert rows["final training loss"] == "1.2500" and rows["best validation loss"] == "1.5000 at step 400"
    assert rows["perplexity there"] == "4.48"  # e^1.5
    assert rows["bits per character there"] == "1.0820 (0.7500 nats)"  # 1.5 / ln 2 / 2
    assert "- Overfitting: validation loss was best at step 400 and has risen 48.0% since" in text
    assert text.endswith("````text\n```python\npass\n```\n````\n"), "a fence is longer than those inside"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "junk\n\0,1\n",
        COLUMNS + "\n",
        COLUMNS + "\n1e300,inf,1e300,1,1,1,1,1\n-1,nan,,,,,,\n",
        COLUMNS + "\n9,9,9,1e308,-1e308,inf,nan,0\n5,5,5,-1e308,1e308,1e-320,1e308,1e-320\n",
        "step,val_loss,tokens,seconds\n5,2.0,50,1\n",
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_damaged_table_still_has_a_report(text, tmp_path):
    (tmp_path / "metrics.csv").write_text(text)
    run = Figures(read_metrics(tmp_path / "metrics.csv"), Config())
    write_page(tmp_path, run, facts(run), advice(run), {})
    page, _ = page_of(tmp_path)
    assert "bits" not in run_report("a run", facts(run)) and "Samples" not in page
    assert ("<figure" in page) == bool(len(run.metrics["step"])), "no chart is empty"


RISING = {"train_loss": [1.0] * 60 + [9.0] * 2 + [1.0] * 38}
UNEVEN = {"tokens_per_second": [200] * 80 + [100] * 20}
CAUSES = {"mfu": 0.1, "memory": 100.0, "peak_memory": 20}
WIDE = replace(Config().model, n_embd=768, block_size=1024, dtype="bfloat16")


@pytest.mark.parametrize(
    ("columns", "figures", "words"),
    [
        ({}, {}, []),
        ({}, {"skipped": 2}, ["2 updates with", "learning_rate (now 0.001)", "warm up over more than 100 steps"]),
        (RISING, {}, ["training loss jumped at step 600"]),
        ({"val_loss": [3 - i / 100 for i in range(100)]}, {}, ["lowest at the very end, 2.0100"]),
        ({"learning_rate": [1e-3] * 70 + [1e-4] * 30}, {}, ["at its minimum, 0.0001, for the last 30%"]),
        ({"grad_norm": [0.5] * 40 + [1.5] * 60}, {}, ["grad_clip=1 at 67%", "grad_clip to about 3"]),
        ({"seconds": [20.0 * i for i in range(100)]}, {}, ["75% of the time", "100 evaluations of the whole split"]),
        (UNEVEN, {}, ["below 100 tokens/s, and the median is 200"]),
        ({}, {"mfu": 0.1}, ["utilization is low, 10.0%: its matrices are only 384 wide (model.n_embd). gptjax plan"]),
        ({}, CAUSES, ["384 wide", "only 768 tokens at a time", "20% of the devices' memory"]),
        ({}, {"mfu": 0.1, "config": Config(model=WIDE)}, ["the run's figures do not show why"]),
    ],
)
def test_advice_follows_from_the_figures_alone(columns, figures, words):
    """The first of these runs, which has none, is steady, even, and best before its end; each other differs once."""
    steps = 10.0 * np.arange(100)
    metrics = {"step": steps, "tokens": 100 * steps, "seconds": steps / 2}
    steady = {"train_loss": 1.0, "val_loss": 1.0, "learning_rate": 1e-3, "grad_norm": 0.5, "tokens_per_second": 200.0}
    metrics |= {name: np.full(100, value) for name, value in steady.items()}
    metrics["val_loss"][-1] = 1.001
    metrics |= {name: np.array(values, float) for name, values in columns.items()}
    config = Config(mesh=MeshConfig(data=4, fsdp=1), train=replace(Config().train, batch_size=12))
    texts = advice(Figures(metrics, **{"config": config} | figures))
    assert len(texts) == bool(words) and all(word in texts[0] for word in words)


def page_of(folder):
    """The text of a run's page, and the page as a tree."""
    text = (folder / "report.html").read_text()
    return text, ElementTree.fromstring(text)


def test_the_page_has_all_sections_and_needs_nothing_else(overfitted, tmp_path):
    folder = tmp_path / "<b>&'\""
    folder.mkdir()
    entry = {"step": 400, "time": "today", "hardware": {"devices": 2, "kind": "<i>"}, "code": {"diff": "+ <u>\n"}}
    entry |= {"versions": {}, "variables": {}, "config": {"secret": 1}}
    (folder / "environment.json").write_text(json.dumps({"starts": [entry, entry]}))
    run = Figures(overfitted, Config(), skipped=3)
    write_page(folder, run, facts(run), advice(run), {400: "early <script>", 1000: "late"})
    text, tree = page_of(folder)
    words = "".join(tree.itertext())
    for shown in (
        "skipped updates3",
        "best: 1.5000 at step 400",
        "overfitting from step 400",
        "Learning rate",
        "<b>&'",
        "Gradient norm",
        "Tokens per second",
        "step 400validation loss 1.5000early <script>",
        "+ <u>",
        "From step 400",
    ):
        assert shown in words
    assert "secret" not in words and words.index("step 400validation") < words.index("step 1,000validation")
    tags, values = {each.tag for each in tree.iter()}, [value for each in tree.iter() for value in each.attrib.values()]
    assert not tags & {"script", "link", "img", "iframe", "object", "b", "i", "u"}
    assert not any(
        word in value for value in [*values, tree.find(".//style").text] for word in ("//", "url(", "@import")
    )


@pytest.mark.parametrize(("platform", "size"), [("linux", 5 * 1024), ("darwin", 5)])
def test_peak_memory_is_that_of_the_accelerators_or_else_of_the_process(platform, size, monkeypatch):
    stats = [{"peak_bytes_in_use": 3}, {"peak_bytes_in_use": 4}, {}, None]
    devices = [Mock(spec=jax.Device, memory_stats=lambda stat=stat: stat) for stat in stats]
    assert peak_memory_bytes(devices) == 7
    monkeypatch.setattr(sys, "platform", platform)
    usage = SimpleNamespace(ru_maxrss=5)
    monkeypatch.setitem(sys.modules, "resource", SimpleNamespace(getrusage=lambda who: usage, RUSAGE_SELF=0))
    assert peak_memory_bytes(devices[3:]) == size
