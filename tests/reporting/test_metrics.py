"""The metrics of a run: what is written, when, and what a resumed run does to it."""

import csv
import errno
import math
from dataclasses import replace

import jax.numpy as jnp
import pytest

from gptjax.config import Config, ModelConfig, TrainConfig
from gptjax.errors import UserError
from gptjax.reporting.metrics import COLUMNS, Metrics
from gptjax.reporting.report import read_metrics

CONFIG = Config(
    model=ModelConfig(block_size=8),
    train=TrainConfig(max_steps=10, batch_size=4, log_interval=2, eval_interval=4),
)


def values(loss):
    return {"train_loss": jnp.float32(loss), "grad_norm": jnp.float32(1), "learning_rate": jnp.float32(0.5)}


def run(folder, steps, start=0, seconds=0.0):
    with Metrics(folder, CONFIG, start, seconds, flops=1.0, peak=math.nan) as metrics:
        for step in steps:
            metrics.add(step, values(step))
            assert metrics.step == max(step - 1, start), "a step is read one step late"
            if CONFIG.train.evaluates(step):
                metrics.flush()
                metrics.row(val_loss=step / 10)
        metrics.flush(last=True)
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_rows_are_means_since_the_last_row_and_empty_where_nothing_was_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("gptjax.reporting.metrics.SECONDS_BETWEEN_LINES", 0.0)
    rows = run(tmp_path, range(1, 11))
    assert tuple(rows[0]) == COLUMNS
    assert [(row["step"], row["train_loss"], row["val_loss"]) for row in rows] == [
        ("2", "1.5", ""), ("4", "3.5", "0.4"), ("6", "5.5", ""), ("8", "7.5", "0.8"), ("10", "9.5", "1.0"),
    ]  # fmt: skip
    assert [row["tokens"] for row in rows] == ["64", "128", "192", "256", "320"]
    assert all(float(row["tokens_per_second"]) > 0 for row in rows)

    out = capsys.readouterr().out  # plain lines where the output is not a terminal
    assert "step 2/10  loss 1.5000  " in out and " tokens/s" in out and "ETA" in out and "\x1b" not in out
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert all(name.encode() in events.read_bytes() for name in COLUMNS[3:])


def test_a_resumed_run_drops_later_rows_and_continues_the_clock(tmp_path):
    run(tmp_path, range(1, 9))
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("9,2")  # killed while writing
    rows = run(tmp_path, range(5, 11), start=4, seconds=100.0)
    assert [row["step"] for row in rows] == ["2", "4", "6", "8", "10"]
    assert float(rows[1]["seconds"]) < 100 <= float(rows[2]["seconds"])


def test_a_run_that_stops_between_rows_writes_one_more(tmp_path):
    last = run(tmp_path, range(1, 8))[-1]
    assert (last["step"], last["train_loss"]) == ("7", "7.0")


def test_updates_that_are_not_finite_are_counted_and_too_many_end_the_run(tmp_path, capsys):
    config = replace(CONFIG, train=replace(CONFIG.train, max_skipped=2, max_steps=100))
    with Metrics(tmp_path, config, 0, 0.0, flops=1.0, peak=1.0) as metrics:
        losses = [1.0, math.nan, math.inf, 3.0, math.nan, math.nan, math.nan]
        for step, loss in enumerate(losses, 1):
            metrics.add(step, values(loss))
        assert metrics.skipped == 4
        with pytest.raises(
            UserError, match=r"diverged: train_loss=nan .* at step 7, after 2 .*learning_rate \(now 0.001"
        ):
            metrics.flush()
    assert "note: train_loss=inf and grad_norm=1.0 at step 3: its update is skipped" in capsys.readouterr().out
    assert read_metrics(tmp_path / "metrics.csv")["train_loss"].tolist() == [1.0, 3.0]  # of the steps that counted


def test_a_jump_of_the_loss_is_noted_once(tmp_path, capsys):
    config = replace(CONFIG, train=replace(CONFIG.train, max_steps=100, log_interval=1000))
    with Metrics(tmp_path, config, 0, 0.0, flops=1.0, peak=1.0) as metrics:
        for step in range(1, 100):
            metrics.add(step, values(9.0 if step in (80, 81, 82) else 3 + 2 / step + 0.1 * (step % 2)))
    assert capsys.readouterr().out.count("note:") == 1


def test_a_log_that_cannot_be_written_is_a_note_and_the_run_continues(tmp_path, capsys, monkeypatch):
    """As on a full disk; the other log is still written."""

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("gptjax.reporting.trackers.TensorBoard.write", full)
    rows = run(tmp_path, range(1, 11))
    assert [row["step"] for row in rows] == ["2", "4", "6", "8", "10"]
    assert capsys.readouterr().out.count("tensorboard log stopped at step 2: No space left on device") == 1
    (tmp_path / "metrics.csv").unlink()
    (tmp_path / "metrics.csv").mkdir()
    with pytest.raises(OSError, match="metrics.csv"):  # before the first step: nothing is lost
        run(tmp_path, [])


def test_a_damaged_metrics_csv_loses_its_damaged_lines_alone(tmp_path):
    run(tmp_path, range(1, 5))
    with (tmp_path / "metrics.csv").open("ab") as file:
        file.write(b"4,\xff\xfe\n9999999999999999999999,1,1,1,1,1,1,1\n3,x,y,z,a,b,c,d\n" + bytes(99))
    assert [row["step"] for row in run(tmp_path, range(5, 9), start=4)] == ["2", "4", "3", "6", "8"]
    steps = read_metrics(tmp_path / "metrics.csv")["step"]
    assert steps.tolist() == [2, 4, 6, 8]
