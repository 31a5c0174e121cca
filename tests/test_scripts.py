"""train.py and sample.py as a user runs them, in processes of their own."""

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from gptjax.checkpoint import Checkpoints

ROOT = Path(__file__).parent.parent
TINY = """--model.n_layer 2 --model.n_head 2 --model.n_embd 16 --model.block_size 16 --train.batch_size 4
--train.max_steps 24 --train.eval_interval 12 --train.save_interval 8 --train.log_interval 4 --optimizer.warmup_steps 4
--data.source text.txt""".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("work")
    rng = np.random.default_rng(0)
    words = ["ROMEO:", "what", "light", "through", "yonder", "window", "breaks?", "\n", "\n\n"]
    (path / "text.txt").write_text(" ".join(rng.choice(words, 4000)))
    return path


def start(script, *arguments, cwd, **options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
    environment.pop("XLA_FLAGS", None)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(
        [sys.executable, str(ROOT / script), *map(str, arguments)], cwd=cwd, env=environment, **pipes, **options
    )


def run(script, *arguments, cwd, stdin=None, **options):
    process = start(script, *arguments, cwd=cwd, stdin=subprocess.PIPE, **options)
    out, err = process.communicate(stdin, timeout=600)
    return process.returncode, out, err


def assert_bit_equal(one, other):
    (step, trees), (other_step, other_trees) = one, other
    assert step == other_step
    assert jax.tree.all(jax.tree.map(np.array_equal, trees, other_trees))


@pytest.fixture(scope="module")
def trained(folder):
    """A finished run with dropout on two devices."""
    code, out, err = run("train.py", *TINY, "--model.dropout", "0.1", "--cpu_devices", "2", cwd=folder)
    assert (code, err) == (0, "")
    return out


def test_a_run_says_what_it_does_and_leaves_everything_in_its_folder(trained, folder):
    assert "devices: 2 x cpu" in trained and "parameters" in trained and "TFLOP" in trained
    assert "step 24: validation loss" in trained and "## Sample" in trained and "peak memory" in trained
    names = {"config.json", "tokenizer.json", "checkpoints", "metrics.csv", "loss.png", "report.md", "tensorboard"}
    assert {path.name for path in (folder / "out" / "default").iterdir()} == names
    with (folder / "out" / "default" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["0", "4", "8", "12", "16", "20", "24"]
    validation = [float(row["val_loss"]) for row in rows if row["val_loss"]]
    assert len(validation) == 3 and validation[2] < validation[1] < validation[0]


def test_sampling_needs_nothing_but_the_run(trained, folder, tmp_path):
    shutil.copytree(folder / "out", tmp_path / "out")  # no text, no prepared data, no config file
    code, out, err = run("sample.py", "--prompt", "ROMEO:", "--max_new_tokens", "40", cwd=tmp_path)
    assert (code, err) == (0, "") and out.startswith("ROMEO:") and len(out) == len("ROMEO:") + 40 + 1
    again = run("sample.py", "--prompt", "ROMEO:", "--max_new_tokens", "40", cwd=tmp_path)
    assert again == (code, out, err)
    other = run("sample.py", "--prompt", "ROMEO:", "--max_new_tokens", "40", "--seed", "2", cwd=tmp_path)
    assert other != again


def test_sampling_several_from_standard_input(trained, folder):
    options = ["--prompt_file", "-", "--num_samples", "3", "--max_new_tokens", "20", "--run", "out/default"]
    code, out, err = run("sample.py", *options, "--checkpoint", "latest", cwd=folder, stdin="light ")
    assert (code, err) == (0, "") and len(out.split("\n---------------\n")) == 3
    assert all(text.startswith("light ") for text in out.split("\n---------------\n"))


SPEEDRUN = """--model.activation relu2 --model.norm nonparametric_rmsnorm --model.position rope --model.qk_norm
--model.embedding_norm --model.logit_cap 15 --model.tied_head false --optimizer.matrix_optimizer muon
--optimizer.schedule linear --optimizer.muon_weight_decay 0.1""".split()


@pytest.mark.parametrize(
    ("devices", "number", "fields"),
    [
        (2, signal.SIGTERM, []),
        pytest.param(1, signal.SIGINT, [], marks=pytest.mark.slow),
        pytest.param(2, signal.SIGTERM, SPEEDRUN, marks=pytest.mark.slow),
    ],
    ids=["two", "one", "speedrun"],
)
def test_a_stopped_run_resumes_bit_for_bit(folder, devices, number, fields, state_of):
    """With dropout, accumulation and evaluations at other steps than checkpoints."""
    options = [*TINY, *fields, "--model.dropout", "0.1", "--train.accumulate", "2", "--train.max_steps", "200"]
    options += ["--train.log_interval", "1", "--train.eval_interval", "60", "--train.save_interval", "50"]
    options += ["--cpu_devices", devices]
    whole, parts = folder / f"whole{devices}{bool(fields)}", folder / f"parts{devices}{bool(fields)}"
    assert run("train.py", *options, "--out_dir", whole, cwd=folder)[0] == 0
    process = start("train.py", *options, "--out_dir", parts, cwd=folder)
    metrics = parts / "metrics.csv"
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 20):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number and err == "" and "--resume" in out
    assert 18 <= state_of(parts)[0] < 200
    code, out, err = run("train.py", "--resume", "--out_dir", parts, "--cpu_devices", devices, cwd=folder)
    assert (code, err) == (0, "") and "resumed at step" in out
    assert_bit_equal(state_of(parts), state_of(whole))
    for name in ("val_loss", "learning_rate", "step"):
        columns = []
        for run_dir in (parts, whole):
            with (run_dir / "metrics.csv").open() as file:
                columns.append([row[name] for row in csv.DictReader(file)])
        assert columns[0] == columns[1]


def test_resuming_a_finished_run_changes_nothing(trained, folder, state_of):
    before = state_of(folder / "out" / "default")
    code, _, err = run("train.py", "--resume", cwd=folder)
    assert (code, err) == (0, "")
    assert_bit_equal(before, state_of(folder / "out" / "default"))


def text_file(name, data):
    def make(folder):
        (folder / name).write_bytes(data)
        return [*TINY, "--data.source", name]

    return make


def truncated_checkpoint(folder):
    shutil.copytree(folder / "out" / "default", folder / "damaged", dirs_exist_ok=True)
    for path in (folder / "damaged").glob("checkpoints/best/*/params/*/d/*"):
        path.write_bytes(path.read_bytes()[:100])
    return ["--run", "damaged"]


@pytest.mark.parametrize(
    ("script", "arguments", "words"),
    [
        ("train.py", ["--model.n_layers", "3"], ["did you mean --model.n_layer?"]),
        ("train.py", ["--train.max_steps", "x"], ["--train.max_steps", "'x' is not an integer"]),
        ("train.py", ["--config", "nowhere.py"], ["no config file nowhere.py"]),
        ("train.py", ["--data.source", "nowhere.txt"], ["nowhere.txt"]),
        ("train.py", text_file("empty.txt", b""), ["empty.txt", "empty"]),
        ("train.py", text_file("latin.txt", "Straße\n".encode("latin1") * 100), ["latin.txt", "UTF-8", "iconv"]),
        ("train.py", text_file("short.txt", b"to be"), ["block_size=16"]),
        ("train.py", [*TINY, "--model.n_embd", "15"], ["model.n_embd=15", "model.n_head=2"]),
        ("train.py", [*TINY, "--cpu_devices", "3"], ["train.batch_size", "multiple of 3"]),
        ("train.py", [*TINY, "--mesh.tensor", "5"], ["mesh.tensor=5"]),
        ("train.py", [*TINY, "--out_dir", "out/default"], ["already holds a run", "--resume"]),
        ("train.py", [*TINY, "--resume", "--out_dir", "nowhere"], ["nowhere holds no run"]),
        ("train.py", ["--resume", "--out_dir", "out/default", "--model.n_layer", "3"], ["model.n_layer=3", "has 2"]),
        ("train.py", ["--resume", "--out_dir", "out/default", "--train.max_steps", "30"], ["decay_steps 24"]),
        ("train.py", ["--resume", "--out_dir", "out/default", "--data.source", "other.txt"], ["data.source=other.txt"]),
        ("sample.py", ["--prompt", "ROMEO: é"], ["'é'", "U+00E9"]),
        ("sample.py", ["--run", "nowhere"], ["nowhere"]),
        ("sample.py", ["--temperature", "-1"], ["temperature=-1.0 is negative"]),
        ("sample.py", ["--prompt_file", "nowhere.txt"], ["prompt_file=nowhere.txt"]),
        ("sample.py", truncated_checkpoint, ["damaged", "not loaded"]),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(trained, folder, script, arguments, words):
    (folder / "other.txt").write_text("never seen before " * 100)
    arguments = arguments(folder) if callable(arguments) else arguments
    code, _, err = run(script, *arguments, cwd=folder)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    assert all(word in err for word in words), err


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_keeps_the_checkpoint_before(folder, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", small], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"needs a small file system, and mounting one failed: {mounted.stderr.decode().strip()}")
    try:
        code, _, err = run("train.py", *TINY, "--model.n_embd", "128", "--out_dir", small / "run", cwd=folder)
        left = Checkpoints(small / "run" / "checkpoints" / "latest", read_only=True).step
    finally:
        subprocess.run(["umount", small], check=True)
    assert code == 2 and err.startswith(f"error: cannot write a checkpoint in {small}") and err.count("\n") == 1, err
    assert "the disk is full" in err and left == 8


def test_help_is_help(folder):
    for script in ("train.py", "sample.py"):
        code, out, err = run(script, "--help", cwd=folder)
        assert (code, err) == (0, "") and out.startswith("usage")
