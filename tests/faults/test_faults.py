"""Runs that are killed, stopped or disturbed at random moments end with the state of a run that was not."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from gptjax.reporting.report import read_metrics

ROOT = Path(__file__).parents[2]
SAVE_INTERVAL = 5
OPTIONS = f"""--data.source text.txt --model.n_layer 1 --model.n_head 2 --model.n_embd 16 --model.block_size 16
--model.dropout 0.1 --train.batch_size 4 --train.log_interval 1 --train.save_interval {SAVE_INTERVAL}
--train.eval_interval 30 --train.eval_batches 2 --optimizer.decay_steps 1000 --cpu_devices 1 --auto_resume""".split()


class Runs:
    """Runs of one config in a folder, each a process that `starter.py` forks."""

    def __init__(self, folder, state_of):
        self.folder, self.state_of, self.wholes = folder, state_of, dict[int, str]()
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        command = [sys.executable, str(Path(__file__).with_name("starter.py"))]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
        self.starter = subprocess.Popen(command, cwd=folder, env=environment, **pipes)

    def begin(self, name, *options, output=None):
        """Start or continue a run; the number of its process."""
        arguments = [*OPTIONS, "--out_dir", name, *map(str, options)]
        output = output or str(self.folder / f"{name}.log")
        self.starter.stdin.write(json.dumps([output, arguments]) + "\n")
        return int(self.starter.stdout.readline())

    def end(self):
        return int(self.starter.stdout.readline())

    def wait_for(self, condition, seconds=120):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "what the test waits for has not happened"
            time.sleep(0.002)

    def steps(self, name):
        """The step of the last row of metrics.csv; cheap, as it is asked for all the time."""
        path = self.folder / name / "metrics.csv"
        rows = path.read_text().rpartition("\n")[0].splitlines() if path.exists() else []
        return int(rows[-1].partition(",")[0]) if len(rows) > 1 else 0

    def whole(self, n_steps):
        """The name of a run of so many steps without a fault, whose saves and evaluations change no result."""
        if n_steps not in self.wholes:
            self.wholes[n_steps] = name = f"whole{n_steps}"
            options = ["--train.save_interval", 10_000, "--train.eval_interval", 10_000]
            self.begin(name, "--train.max_steps", n_steps, *options)
            assert self.end() == 0
        return self.wholes[n_steps]

    def assert_same_state(self, name, other):
        (step, trees), (other_step, others) = [self.state_of(self.folder / run) for run in (name, other)]
        assert step == other_step and jax.tree.all(jax.tree.map(np.array_equal, trees, others))


@pytest.fixture(scope="module")
def runs(tmp_path_factory, state_of):
    folder = tmp_path_factory.mktemp("faults")
    (folder / "text.txt").write_text("ROMEO: what light through yonder window breaks?\n\n" * 500)
    runs = Runs(folder, state_of)
    with runs.starter:
        yield runs
        runs.starter.stdin.close()


MOMENTS = {  # what is there while a run does it
    "saving": "checkpoints/latest/*.orbax-checkpoint-tmp",
    "saving the best": "checkpoints/best/*.orbax-checkpoint-tmp",
    "drawing": "loss.png.*.part",
    "anything": "metrics.csv",
}


@pytest.mark.parametrize(
    ("n_kills", "n_steps"), [(8, 160), pytest.param(100, 1500, marks=pytest.mark.endurance)], ids=["8", "100"]
)
def test_kills_cost_no_more_than_the_steps_since_the_last_save(runs, n_kills, n_steps):
    """If the last save is under way, the last complete one is at most one more interval older."""
    name, chance, lost = f"killed{n_kills}", random.Random(n_kills), []
    reference, run_dir = runs.whole(n_steps), runs.folder / name
    for i in range(n_kills):
        process = runs.begin(name, "--train.max_steps", n_steps)
        before, moment = runs.steps(name), list(MOMENTS.values())[i % len(MOMENTS)]
        if i % 5:  # else while it starts
            runs.wait_for(lambda: runs.steps(name) > before and any(run_dir.glob(moment)))  # noqa: B023
        time.sleep(chance.random() * (0.05 if i % 5 else 2))
        os.kill(process, signal.SIGKILL)
        code = runs.end()
        assert code == -signal.SIGKILL, (i, code, (runs.folder / f"{name}.log").read_text()[-500:])
        complete = [int(path.name) for path in run_dir.glob("checkpoints/latest/*") if path.name.isdecimal()]
        lost.append(runs.steps(name) - max(complete, default=0))
    assert max(lost) <= 2 * SAVE_INTERVAL, lost
    runs.begin(name, "--train.max_steps", n_steps)
    assert runs.end() == 0
    runs.assert_same_state(name, reference)
    steps = read_metrics(run_dir / "metrics.csv")["step"]
    assert sorted(set(steps)) == list(range(n_steps + 1)), "metrics.csv lacks a step"
    left = [path.name for path in run_dir.rglob("*") if "tmp" in path.name or path.suffix == ".part"]
    assert not left, left


def remove(*names):
    def fault(run_dir, process):
        for name in names:  # at once, as a folder in use can't be deleted file by file
            (run_dir / name).rename(run_dir.with_name(f"{run_dir.name} {name}"))

    return fault


def block(name):
    def fault(run_dir, process):
        (run_dir / name).unlink()
        (run_dir / name / "in the way").mkdir(parents=True)

    return fault


def send(number):
    return lambda run_dir, process: os.kill(process, number)


NO_LOGS = "metrics.csv and TensorBoard's events are removed"
FAULTS = {
    "SIGTERM": (send(signal.SIGTERM), 128 + signal.SIGTERM),
    "SIGINT": (send(signal.SIGINT), 128 + signal.SIGINT),
    "SIGHUP": (send(signal.SIGHUP), 128 + signal.SIGHUP),
    NO_LOGS: (remove("metrics.csv", "tensorboard"), 0),
    "config.json and tokenizer.json are removed": (remove("config.json", "tokenizer.json"), 0),
    "the picture cannot be drawn": (block("loss.png"), 0),
    "all checkpoints are removed": (remove("checkpoints"), 2),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "output"), [*((fault, None) for fault in FAULTS), ("SIGTERM", "/dev/full"), (NO_LOGS, "/dev/full")]
)
def test_a_disturbed_run_goes_on_or_saves_and_ends_alike(runs, fault, output):
    disturb, code = FAULTS[fault]
    name = f"fault{list(FAULTS).index(fault)}{bool(output)}"
    run_dir, log = runs.folder / name, runs.folder / f"{name}.log"
    process = runs.begin(name, "--train.max_steps", 80, output=output)
    runs.wait_for(lambda: runs.steps(name) > 33)  # after the first evaluation
    disturb(run_dir, process)
    assert runs.end() == code, output or log.read_text()
    assert output or "Traceback" not in log.read_text()
    runs.begin(name, "--train.max_steps", 80)
    assert runs.end() == 0
    runs.assert_same_state(name, runs.whole(80))
