"""Several processes on one machine train as one does, save and stop together, and name the one that is lost."""

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
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from gptjax import coordination
from gptjax.checkpoint import Checkpoints
from gptjax.distributed import Judge
from gptjax.errors import UserError

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
# train.py with shorter times, and with data that hang or fail after 100 batches if TROUBLE says so.
PROGRAM = f"""
import os, runpy, sys, time
from gptjax import distributed
from gptjax.data import batches
from gptjax.errors import UserError
distributed.BEAT_SECONDS, distributed.SILENT_SECONDS, distributed.BEHIND_SECONDS = 0.1, 10.0, 15.0
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
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
FOREVER = "--train.max_steps 1000000 --train.eval_interval 1000000 --train.save_interval 50".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("work")
    (path / "text.txt").write_text("ROMEO: what light through yonder window breaks?\n\n" * 500)
    (path / "small.py").write_text(CONFIG)
    return path


class Group:
    """Processes that train one model. The last one has the trouble; each works in its own `cwd` if that is a list."""

    def __init__(self, folder, n, *options, trouble=None, cwd=None, cpu_devices=1):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        self.processes = []
        for i in range(n):
            environment = ENVIRONMENT | ({"TROUBLE": trouble} if trouble and i == n - 1 else {})
            flags = ["--config", folder / "small.py", "--cpu_devices", cpu_devices, *options]
            if n > 1:
                flags += ["--coordinator", f"localhost:{port}", "--num_processes", n, "--process_id", i]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            command = [sys.executable, "-c", PROGRAM, *map(str, flags)]
            self.processes.append(subprocess.Popen(command, cwd=cwd[i] if cwd else folder, env=environment, **pipes))

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for process in self.processes:
            process.kill()
            process.communicate()

    def end(self, ids=None, seconds=300):
        """The exit codes and standard errors of all processes, or of some."""
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
    """The training losses of a run, then its validation losses."""
    with Group(folder, n, "--out_dir", name, *options, **more) as group:
        ends = group.end()
        assert [code for code, _ in ends] == [0] * n, ends
    with (folder / name / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [float(row[column]) for column in ("train_loss", "val_loss") for row in rows if row[column]]


@pytest.fixture(scope="module")
def alone(folder):
    """The losses of one process with one device."""
    return train(folder, 1, "alone")


@pytest.mark.parametrize(
    ("n", "options", "cpu_devices"),
    [
        pytest.param(1, [], 8, marks=pytest.mark.endurance),
        pytest.param(2, [], 1, marks=pytest.mark.endurance),
        pytest.param(2, ["--mesh.fsdp", "4", "--mesh.tensor", "2"], 4, marks=pytest.mark.slow),
        pytest.param(4, ["--mesh.fsdp", "2", "--mesh.tensor", "2"], 1, marks=pytest.mark.endurance),
        pytest.param(4, ["--train.accumulate", "2"], 1, marks=pytest.mark.slow),
    ],
)
def test_a_config_trains_alike_with_any_number_of_processes_and_devices(folder, alone, n, options, cpu_devices):
    name = f"{n}x{cpu_devices}{len(options)}"
    found = train(folder, n, name, *options, cpu_devices=cpu_devices)
    assert len(found) == 22 and found[0] - found[19] > 0.5
    np.testing.assert_allclose(found, alone, rtol=1e-5)
    assert {path.name for path in (folder / name).iterdir()} == {path.name for path in (folder / "alone").iterdir()}
    assert "## Sample" in (folder / name / "report.md").read_text()


@pytest.mark.parametrize(
    "asked", [pytest.param([0, 1], marks=pytest.mark.endurance), pytest.param([1], marks=pytest.mark.slow)]
)
def test_all_processes_stop_after_the_same_step_and_resume_bit_for_bit(folder, asked, state_of):
    options = "--train.max_steps 60 --train.save_interval 15 --model.dropout 0.1 --mesh.fsdp 2".split()
    whole, parts = [folder / f"{name}{sum(asked)}{len(asked)}" for name in ("whole", "parts")]
    train(folder, 2, whole.name, *options)
    with Group(folder, 2, "--out_dir", parts.name, *options) as group:
        group.wait_for_step(parts, 20)
        for i in asked:
            group.processes[i].send_signal(signal.SIGTERM)
        ends = group.end()
        assert [code for code, _ in ends] == [128 + signal.SIGTERM] * 2, ends
    assert 20 <= state_of(parts)[0] < 60
    train(folder, 2, parts.name, *options, "--resume")
    (step, trees), (other_step, other_trees) = state_of(parts), state_of(whole)
    assert step == other_step == 60
    assert jax.tree.all(jax.tree.map(np.array_equal, trees, other_trees))
    assert json.loads((parts / "config.json").read_text())["mesh"]["fsdp"] == 2


@pytest.mark.slow
def test_a_run_that_was_killed_before_its_first_save_begins_anew(folder):
    run_dir = folder / "early"
    train(folder, 1, "early", "--train.max_steps", "2")
    shutil.rmtree(run_dir / "checkpoints" / "latest")
    (run_dir / "checkpoints" / "best" / "2").rename(run_dir / "checkpoints" / "best" / "0")
    train(folder, 1, "early", "--auto_resume", "--train.max_steps", "3")
    assert Checkpoints(run_dir / "checkpoints" / "latest", read_only=True).step == 3


def test_processes_with_different_data_are_refused(folder, tmp_path):
    homes = [tmp_path / "a", tmp_path / "b"]
    for home in homes:
        shutil.copytree(folder, home)
    (homes[1] / "text.txt").write_text((folder / "text.txt").read_text() + "x")
    with Group(folder, 2, "--out_dir", "run", cwd=homes) as group:
        for code, error in group.end():
            words = r"error: process 1 \(.+\): data=[\w:]+ here, but data=[\w:]+ in process 0: start all"
            assert code != 0 and re.search(words, error), error


@pytest.mark.slow
def test_a_mesh_without_some_processes_is_refused(folder):
    with Group(folder, 2, "--out_dir", "partly", "--mesh.data", "1") as group:
        for code, error in group.end():
            assert code != 0 and "mesh.data=1" in error and "leaves whole processes without a device" in error


@pytest.mark.slow
@pytest.mark.parametrize(
    ("victim", "blow", "words"),
    [
        (0, signal.SIGKILL, r".*process 0 \(localhost:\d+\) is gone"),  # JAX may abort process 1 before or after that
        (0, signal.SIGSTOP, r"process 0 \(localhost:\d+\) has not answered for 10 s"),
        (1, signal.SIGKILL, r"process 1 \(.+\) has not answered for 10 s"),
        (1, signal.SIGSTOP, r"process 1 \(.+\) has not answered for 10 s"),
    ],
)
def test_a_process_that_dies_or_stops_is_named_and_the_last_checkpoint_is_kept(folder, victim, blow, words, state_of):
    name = f"blow{victim}{blow}"
    with Group(folder, 2, "--out_dir", name, *FOREVER) as group:
        group.wait_for_step(folder / name, 110)  # before the save at 100 begins, that at 50 is whole
        group.processes[victim].send_signal(blow)
        [(code, error)] = group.end([1 - victim], 60)
    assert code == 1 and re.search(f"error: {words}", error), error
    assert state_of(folder / name)[0] >= 50


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trouble", "words"),
    [("hang", r"process 2 \(.+\) hangs in step \d+ while the others"), ("fail", r"process 2 \(.+\): shard 7 is cut")],
)
def test_a_process_that_hangs_or_fails_is_named_by_all(folder, trouble, words):
    with Group(folder, 3, "--out_dir", trouble, "--train.batch_size", "9", *FOREVER, trouble=trouble) as group:
        for code, error in group.end(seconds=90):
            assert code != 0 and re.search(words, error), error


class Beats:
    """The judgement on three processes, whose heartbeats come some seconds after the last ones."""

    def __init__(self):
        self.now, self.beats, self.judge = 1000.0, {}, Judge(3, 1000.0)

    def __call__(self, seconds, *beats):
        self.now += seconds
        self.beats |= dict(enumerate(beats))
        return self.judge.lost(self.beats, self.now)


def test_a_silent_process_is_lost_after_30_seconds():
    lost = Beats()
    for i in range(1, 5):
        assert lost(2, f"{i} {i}", f"{i} {i}", f"{i} {i}") is None
    assert lost(20, "5 5", "5 5", "5 5") is None
    assert lost(29, "6 6", "6 6") is None
    process, complaint = lost(2, "7 7", "7 7")
    assert process == 2 and "has not answered for 30 s" in complaint


def test_a_process_that_stays_behind_is_lost_unless_it_is_in_its_first_steps():
    lost = Beats()
    for beat in range(1, 400):  # a process compiles, and the others had the program in their cache
        assert lost(4, f"{beat} 2", f"{beat} 2", f"{beat} 1") is None
    for step in range(2, 6):
        assert lost(2, *[f"{step}000 {step}"] * 3) is None
    found = [lost(4, f"{beat} 6", f"{beat} 6", f"{beat} 5") for beat in range(9000, 9020)]
    assert found[10] is None
    process, complaint = found[-1]
    assert process == 2 and "hangs in step 5" in complaint and "step 6" in complaint


def test_a_finished_process_need_not_answer_and_a_failed_one_is_quoted():
    lost = Beats()
    assert lost(2, "1 1", "done", "1 1") is None
    assert lost(20, "2 1", "done", "2 1") is None and lost(20, "3 1", "done", "3 1") is None
    assert lost(2, "4 1", "done", "failed shard 7 is cut short") == (2, ": shard 7 is cut short")


def test_flags_that_make_no_group_are_refused(folder):
    """In one new process, since JAX joins others only before its first computation."""
    program = """
from gptjax.errors import UserError
from gptjax.train import main
for flags in (["--num_processes", "2", "--process_id", "2", "--coordinator", "localhost:1"], ["--coordinator", "here"],
              ["--coordinator", "localhost:1234"], ["--num_processes", "2", "--process_id", "0"]):
    try:
        main(["--config", "small.py", *flags])
    except UserError as error:
        print(error)
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    first, second, third, fourth = done.stdout.splitlines()
    assert "process_id=2 is not in [0, " in first and "HOST:PORT" in second
    assert "--num_processes" in third and "--coordinator" in fourth


def test_a_jax_that_changes_its_private_state_is_named_with_those_that_work(monkeypatch):
    """The private state is that of jax 0.10 and 0.12, with which all tests of this file pass."""
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    for changed in (SimpleNamespace(), SimpleNamespace(client=object(), process_id=0)):
        monkeypatch.setattr("jax._src.distributed.global_state", changed)
        with pytest.raises(UserError, match=rf"jax 0.10 and 0.12, but not with jax {jax.__version__}"):
            coordination.index()
            coordination.read_all("host")


@pytest.mark.slow
def test_a_process_says_for_whom_it_waits_and_gives_up_in_one_line(tmp_path):
    program = PROGRAM.replace(
        "distributed.BEAT", "distributed.WAIT_SECONDS, distributed.JOIN_SECONDS = 1, 3; distributed.BEAT"
    )
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    flags = ["--coordinator", address, "--num_processes", "3", "--process_id", "0"]
    done = subprocess.run([sys.executable, "-c", program, *flags], cwd=tmp_path, env=ENVIRONMENT, capture_output=True)
    waiting = f"process 0: waiting for 2 other processes at {address}"
    first, last = done.stderr.decode().splitlines()
    assert done.returncode == 2 and first == waiting and last.startswith(f"error: {waiting} for 3 s")
