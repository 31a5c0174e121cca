"""What a person watches."""

import csv
import math

import jax.numpy as jnp
import pytest

from gptjax.config import Config, ModelConfig, TrainConfig
from gptjax.errors import UserError
from gptjax.metrics import COLUMNS, Metrics

CONFIG = Config(
    model=ModelConfig(block_size=8),
    train=TrainConfig(max_steps=10, batch_size=4, log_interval=2, eval_interval=4),
)


def values(loss):
    return {"train_loss": jnp.float32(loss), "grad_norm": jnp.float32(1), "learning_rate": jnp.float32(0.5)}


def run(folder, steps, start=0, seconds=0.0, config=CONFIG):
    with Metrics(folder, config, start, seconds, flops=1.0, peak=math.nan) as metrics:
        for step in steps:
            metrics.add(step, values(step))
            if step % config.train.eval_interval == 0 or step == config.train.max_steps:
                metrics.flush()
                metrics.row(val_loss=step / 10)
        metrics.flush(last=True)


def read(folder):
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_rows_are_means_since_the_row_before_and_empty_where_nothing_was_measured(tmp_path):
    run(tmp_path, range(1, 11))
    rows = read(tmp_path)
    assert tuple(rows[0]) == COLUMNS
    assert [(row["step"], row["train_loss"], row["val_loss"]) for row in rows] == [
        ("2", "1.5", ""), ("4", "3.5", "0.4"), ("6", "5.5", ""), ("8", "7.5", "0.8"), ("10", "9.5", "1.0"),
    ]  # fmt: skip
    assert [row["tokens"] for row in rows] == ["64", "128", "192", "256", "320"]
    assert all(float(row["tokens_per_second"]) > 0 for row in rows)


def test_a_step_is_read_one_step_late(tmp_path):
    with Metrics(tmp_path, CONFIG, 0, 0.0, flops=1.0, peak=1.0) as metrics:
        for step in (1, 2, 3):
            metrics.add(step, values(step))
            assert metrics.step == step - 1


def test_a_resumed_run_drops_later_rows_and_goes_on_counting(tmp_path):
    run(tmp_path, range(1, 9))
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("9,2")  # killed while writing
    run(tmp_path, range(5, 11), start=4, seconds=100.0)
    rows = read(tmp_path)
    assert [row["step"] for row in rows] == ["2", "4", "6", "8", "10"]
    assert float(rows[1]["seconds"]) < 100 <= float(rows[2]["seconds"])


def test_stopping_between_rows_writes_what_was_seen(tmp_path):
    run(tmp_path, range(1, 8))
    assert (read(tmp_path)[-1]["step"], read(tmp_path)[-1]["train_loss"]) == ("7", "7.0")


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number_ends_the_run(tmp_path, loss):
    with Metrics(tmp_path, CONFIG, 0, 0.0, flops=1.0, peak=1.0) as metrics:
        metrics.add(1, values(loss))
        with pytest.raises(
            UserError, match=r"train_loss=(nan|inf) and grad_norm=1.0 at step 1: .*optimizer.learning_rate=0.001"
        ):
            metrics.add(2, values(1.0))


def test_lines_are_plain_where_output_is_no_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("gptjax.metrics.SECONDS_BETWEEN_LINES", 0.0)
    run(tmp_path, range(1, 4))
    out = capsys.readouterr().out
    assert "step 2/10  loss 1.5000  " in out and " tokens/s" in out and "ETA" in out and "\x1b" not in out


def test_tensorboard_gets_the_curves(tmp_path):
    run(tmp_path, range(1, 11))
    (events,) = (tmp_path / "tensorboard").iterdir()
    data = events.read_bytes()
    assert all(name.encode() in data for name in COLUMNS[3:])
