"""Several processes on loopback train as one does, save and stop together, and name the one that is lost."""

import csv
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from gptjax import distributed
from gptjax.checkpoint import Checkpoints

ROOT = Path(__file__).parent.parent
CONFIG = """
from gptjax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig

config = Config(
    data=DataConfig(source="text.txt"),
    model=ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=16, dtype="float32"),
    optimizer=OptimizerConfig(warmup_steps=2, decay_steps=20, learning_rate=1e-2),
    train=TrainConfig(batch_size=8, max_steps=20, eval_interval=20, eval_batches=4, save_interval=10, log_interval=1),
)
"""
# train.py as it is, but for shorter times, and a dataset that hangs or fails where a test asks for it.
PROGRAM = f"""
import os, runpy, sys, time
from gptjax import distributed
from gptjax.data import batches
from gptjax.errors import UserError
distributed.BEAT_SECONDS, distributed.SILENT_SECONDS, distributed.BEHIND_SECONDS = 0.5, 10.0, 15.0
read, calls = batches.windows, []
def windows(*arguments):
    calls.append(1)
    if len(calls) > 100 and os.environ.get("TROUBLE") == "hang":
        time.sleep(1000)
    if len(calls) > 100 and os.environ.get("TROUBLE") == "fail":
        raise UserError("shard 7 is cut short")
    return read(*arguments)
batches.windows = windows
sys.argv[0] = {str(ROOT / "train.py")!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""
FOREVER = "--train.max_steps 1000000 --train.eval_interval 1000000 --train.save_interval 50".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("work")
    words = ["ROMEO:", "what", "light", "through", "yonder", "window", "breaks?", "\n", "\n\n"]
    (path / "text.txt").write_text(" ".join(np.random.default_rng(0).choice(words, 4000)))
    (path / "small.py").write_text(CONFIG)
    return path


class Group:
    """Processes that train one model; `outputs` are their standard output and error once they have ended."""

    def __init__(self, folder, n, *options, trouble=None, cwd=None, cpu_devices=1):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        self.processes = []
        for i in range(n):
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
            environment |= {"TROUBLE": trouble} if trouble and i == n - 1 else {}
            environment.pop("XLA_FLAGS", None)
            flags = ["--config", folder / "small.py", "--cpu_devices", cpu_devices, *options]
            if n > 1:
                flags += ["--coordinator", f"localhost:{port}", "--num_processes", n, "--process_id", i]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            command = [sys.executable, "-c", PROGRAM, *map(str, flags)]
            where = cwd[i] if cwd else folder
            self.processes.append(subprocess.Popen(command, cwd=where, env=environment, **pipes))

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for process in self.processes:
            process.kill()
            process.wait()
            process.stdout.close()
            process.stderr.close()

    def end(self, ids=None, seconds=300):
        """Exit codes and standard errors of all processes, or of some."""
        found = []
        for process in self.processes if ids is None else [self.processes[i] for i in ids]:
            _, errors = process.communicate(timeout=seconds)
            found.append((process.returncode, errors))
        return found

    def wait_for_step(self, run_dir, step):
        metrics = run_dir / "metrics.csv"
        while not (metrics.exists() and len(metrics.read_text().splitlines()) > step + 1):
            for process in self.processes:
                assert process.poll() is None, process.communicate()
            time.sleep(0.05)


def train(folder, n, name, *options, **more):
    with Group(folder, n, "--out_dir", name, *options, **more) as group:
        ends = group.end()
        assert [code for code, _ in ends] == [0] * n, ends
    return losses(folder / name)


def losses(run_dir):
    with (run_dir / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [float(row["train_loss"]) for row in rows if row["train_loss"]] + [
        float(row["val_loss"]) for row in rows if row["val_loss"]
    ]


@pytest.fixture(scope="module")
def alone(folder):
    """The losses of one process with one device."""
    return train(folder, 1, "alone")


@pytest.mark.slow
def test_two_processes_train_as_one_does(folder, alone):
    found = train(folder, 2, "two")
    assert len(found) == 22 and found[0] - found[19] > 0.5
    np.testing.assert_allclose(found, alone, rtol=1e-5)
    assert {path.name for path in (folder / "two").iterdir()} == {path.name for path in (folder / "alone").iterdir()}
    assert "## Sample" in (folder / "two" / "report.md").read_text()


@pytest.mark.slow
def test_one_process_goes_on_where_two_stopped(folder):
    more = ["--train.max_steps", "40", "--optimizer.decay_steps", "20"]
    train(folder, 2, "first")
    whole, parts = train(folder, 1, "whole", *more), train(folder, 1, "first", *more, "--resume")
    np.testing.assert_allclose(parts[-1], whole[-1], rtol=1e-5)
    np.testing.assert_allclose(parts[:40], whole[:40], rtol=1e-5)


def test_processes_with_other_data_say_so(folder, tmp_path):
    homes = [tmp_path / "a", tmp_path / "b"]
    for home in homes:
        home.mkdir()
        (home / "text.txt").write_text((folder / "text.txt").read_text())
    (homes[1] / "text.txt").write_text((folder / "text.txt").read_text() + "x")
    with Group(folder, 2, "--out_dir", "run", cwd=homes) as group:
        (code, first), (other_code, second) = group.end()
    assert code != 0 and other_code != 0
    for error in (first, second):
        assert re.search(r"error: process 1 \(.+\): data=\w+ here, but data=\w+ in process 0: start all", error), error


@pytest.mark.slow
def test_a_process_that_is_killed_is_named_and_the_others_stop(folder):
    with Group(folder, 2, "--out_dir", "killed", *FOREVER) as group:
        group.wait_for_step(folder / "killed", 60)
        group.processes[1].kill()
        [(code, error)] = group.end([0], 60)
    assert code == 1 and re.search(r"error: process 1 \(.+\) has not answered for 10 s", error)


@pytest.mark.slow
def test_a_run_that_was_killed_before_its_first_save_begins_anew(folder):
    run_dir = folder / "early"
    train(folder, 1, "early", "--train.max_steps", "2")
    shutil.rmtree(run_dir / "checkpoints" / "latest")
    assert (run_dir / "checkpoints" / "best").exists()
    train(folder, 1, "early", "--auto_resume", "--train.max_steps", "3")
    assert Checkpoints(run_dir / "checkpoints" / "latest", read_only=True).step == 3


class Store:
    """The key-value store of three processes, of which the first judges."""

    def __init__(self, watch, clock):
        self.values, self.watch, self.clock = {}, watch, clock

    def key_value_dir_get(self, start):
        return [(key, value) for key, value in self.values.items() if key.startswith(start)]

    def verdict(self, seconds, **beats):
        self.clock[0] += seconds
        self.values |= {f"gptjax/beat/{name.removeprefix('p')}": beat for name, beat in beats.items()}
        return self.watch._judge()


@pytest.fixture
def store(monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(distributed.time, "monotonic", lambda: clock[0])
    watch = object.__new__(distributed._Watch)
    watch._seen = {i: distributed._Seen(at=clock[0], step_at=clock[0]) for i in range(3)}
    store = Store(watch, clock)
    monkeypatch.setattr(distributed, "_store", lambda: store)
    return store


def test_who_is_lost(store):
    for i in range(1, 5):
        assert store.verdict(2, p0=f"{i} {i}", p1=f"{i} {i}", p2=f"{i} {i}") == ""
    assert store.verdict(20, p0="5 5", p1="5 5", p2="5 5") == ""
    assert store.verdict(29, p0="6 6", p1="6 6") == ""
    assert "process 2 (unknown host) has not answered" in store.verdict(2, p0="7 7", p1="7 7")


def test_who_hangs_and_who_only_compiles(store):
    for beat in range(1, 400):  # a process that compiles while the others found the program compiled
        assert store.verdict(4, p0=f"{beat} 2", p1=f"{beat} 2", p2=f"{beat} 1") == ""
    for step in range(2, 6):
        assert store.verdict(2, p0=f"{step}a {step}", p1=f"{step}a {step}", p2=f"{step}a {step}") == ""
    said = [store.verdict(4, p0=f"{beat} 6", p1=f"{beat} 6", p2=f"{beat} 5") for beat in range(1000, 1020)]
    assert said[10] == "" and "process 2 (unknown host) hangs in step 5" in said[-1] and "step 6" in said[-1]


def test_who_is_done_or_failed(store):
    assert store.verdict(2, p0="1 1", p1="done", p2="1 1") == ""
    assert store.verdict(100, p0="2 1", p2="2 1") == "", "who is done need not answer"
    assert (
        store.verdict(2, p0="3 1", p2="failed shard 7 is cut short") == "process 2 (unknown host): shard 7 is cut short"
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--num_processes", "2", "--process_id", "2", "--coordinator", "localhost:1"], ["process_id=2", "[0, "]),
        pytest.param(["--coordinator", "localhost"], ["coordinator='localhost'", "HOST:PORT"], marks=pytest.mark.slow),
        pytest.param(["--coordinator", "localhost:1234"], ["--num_processes"], marks=pytest.mark.slow),
        (["--num_processes", "2", "--process_id", "0"], ["--coordinator"]),
    ],
)
def test_flags_that_make_no_group_are_said(folder, options, words):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(ROOT / "train.py"), "--config", "small.py", *options]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    for word in words:
        assert word in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n", "options", "cpu_devices"),
    [
        (1, [], 8),
        (2, ["--mesh.fsdp", "4", "--mesh.tensor", "2"], 4),
        (4, ["--mesh.fsdp", "2", "--mesh.tensor", "2"], 1),
        (4, ["--train.accumulate", "2"], 1),
    ],
)
def test_the_same_config_file_trains_alike_everywhere(folder, alone, n, options, cpu_devices):
    name = f"{n}x{cpu_devices}{len(options)}"
    np.testing.assert_allclose(train(folder, n, name, *options, cpu_devices=cpu_devices), alone, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("asked", [[0, 1], [1]])
def test_all_processes_stop_after_the_same_step_and_resume_bit_for_bit(folder, asked, state_of):
    options = "--train.max_steps 120 --train.save_interval 50 --model.dropout 0.1 --mesh.fsdp 2".split()
    whole, parts = [folder / f"{name}{sum(asked)}{len(asked)}" for name in ("whole", "parts")]
    train(folder, 2, whole.name, *options)
    with Group(folder, 2, "--out_dir", parts.name, *options) as group:
        group.wait_for_step(parts, 30)
        for i in asked:
            group.processes[i].send_signal(signal.SIGTERM)
        ends = group.end()
        assert [code for code, _ in ends] == [128 + signal.SIGTERM] * 2, ends
    step, _ = state_of(parts)
    assert 30 <= step < 120
    train(folder, 2, parts.name, *options, "--resume")
    (step, trees), (other_step, other_trees) = state_of(parts), state_of(whole)
    assert step == other_step == 120
    assert jax.tree.all(jax.tree.map(np.array_equal, trees, other_trees))
    assert json.loads((parts / "config.json").read_text())["mesh"]["fsdp"] == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("victim", "blow", "words"),
    [
        (
            0,
            signal.SIGKILL,
            r"error: process 1 ends: JAX aborted it, as it does when process 0 \(localhost:\d+\) is gone",
        ),
        (1, signal.SIGSTOP, r"error: process 1 \(.+\) has not answered for 10 s"),
        (0, signal.SIGSTOP, r"error: process 0 \(localhost:\d+\) has not answered for 10 s"),
    ],
)
def test_a_process_that_dies_or_stops_is_named(folder, victim, blow, words, state_of):
    name = f"blow{victim}{blow}"
    with Group(folder, 2, "--out_dir", name, *FOREVER) as group:
        group.wait_for_step(folder / name, 110)  # before the save at 100 begins, that at 50 is whole
        group.processes[victim].send_signal(blow)
        [(code, error)] = group.end([1 - victim], 60)
    assert code == 1 and re.search(words, error), error
    assert state_of(folder / name)[0] >= 50


@pytest.mark.slow
def test_a_mesh_without_some_processes_is_refused(folder):
    with Group(folder, 2, "--out_dir", "partly", "--mesh.data", "1") as group:
        for code, error in group.end():
            assert code != 0 and "mesh.data=1" in error and "leaves whole processes without a device" in error


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trouble", "words"),
    [("hang", r"process 2 \(.+\) hangs in step \d+ while the others"), ("fail", r"process 2 \(.+\): shard 7 is cut")],
)
def test_a_process_that_hangs_or_fails_is_named_by_all(folder, trouble, words):
    with Group(folder, 3, "--out_dir", trouble, "--train.batch_size", "9", *FOREVER, trouble=trouble) as group:
        ends = group.end(seconds=90)
    for code, error in ends:
        assert code != 0 and re.search(words, error), error
