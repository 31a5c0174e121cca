"""train.py and sample.py, as a user runs them: mostly in processes of their own."""

import csv
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import gptjax.train
from gptjax.__main__ import COMMANDS
from gptjax.checkpoint import Checkpoints
from gptjax.config import Config, field_metadata, flat
from gptjax.errors import UserError

ROOT = Path(__file__).parent.parent
TINY = """--model.n_layer 2 --model.n_head 2 --model.n_embd 16 --model.block_size 16 --train.batch_size 16
--data.source text.txt""".split()
RUN = """--train.max_steps 24 --train.eval_interval 7 --train.save_interval 5 --train.log_interval 1
--train.accumulate 2 --optimizer.warmup_steps 4 --model.dropout 0.1 --cpu_devices""".split()
SPEEDRUN = """--model.activation relu2 --model.norm nonparametric_rmsnorm --model.position rope --model.qk_norm
--model.embedding_norm --model.logit_cap 15 --model.tied_head false --optimizer.matrix_optimizer muon
--optimizer.schedule linear --optimizer.muon_weight_decay 0.1""".split()
# A script that gets a signal when it makes the 10th batch of training.
SIGNALLED = """
import os, runpy, sys
from gptjax.data import batches
starts = batches.starts
def signalled_starts(*arguments, **options):
    if options["step"] == 10:
        os.kill(os.getpid(), {})
    return starts(*arguments, **options)
batches.starts = signalled_starts
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("work")
    (path / "text.txt").write_text("ROMEO: what light through yonder window breaks?\n\n" * 500)
    return path


def run(script, *arguments, cwd, stdin=None, send=None, program=SIGNALLED):
    """The exit code, standard output and standard error of a process that compiles as a user's does."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    environment.pop("XLA_FLAGS", None)
    code = ["-c", program.format(int(send))] if send else []
    command = [sys.executable, *code, str(ROOT / script), *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=environment, input=stdin, capture_output=True, text=True, timeout=600)
    return done.returncode, done.stdout, done.stderr


def rows(run_dir):
    with (run_dir / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def assert_bit_equal(one, other):
    (step, trees), (other_step, other_trees) = one, other
    assert step == other_step
    assert jax.tree.all(jax.tree.map(np.array_equal, trees, other_trees))


@pytest.fixture(scope="module")
def trained(folder):
    """The output of a finished run with dropout and accumulation on two devices, in out/default."""
    code, out, err = run("train.py", *TINY, *RUN, 2, cwd=folder)
    assert (code, err) == (0, "")
    return out


def test_a_run_prints_its_progress_and_leaves_everything_in_its_folder(trained, folder):
    words = ["devices: 2 x cpu", "parameters", "TFLOP", "step 24: validation loss", "## Sample", "peak memory"]
    assert all(word in trained for word in words)
    names = {
        ".lock",
        "config.json",
        "environment.json",
        "tokenizer.json",
        "checkpoints",
        "metrics.csv",
        "loss.png",
        "report.md",
        "report.html",
        "tensorboard",
    }
    assert {path.name for path in (folder / "out" / "default").iterdir()} == names
    kept, page = (folder / "out" / "default").glob("checkpoints/*/*"), folder / "out" / "default" / "report.html"
    assert all(f"<h3>step {step.name}</h3>" in page.read_text() for step in kept), "a sample of each checkpoint"
    table = rows(folder / "out" / "default")
    assert [int(row["step"]) for row in table] == list(range(25))
    validation = [float(row["val_loss"]) for row in table if row["val_loss"]]
    assert len(validation) == 5 and validation == sorted(validation, reverse=True)


def test_sampling_needs_only_the_run(trained, folder, tmp_path):
    shutil.copytree(folder / "out", tmp_path / "out")  # no text, no prepared data, no config file
    options = ["--prompt_file", "-", "--num_samples", "2", "--max_new_tokens", "20"]
    code, out, err = run("sample.py", *options, cwd=tmp_path, stdin="light ")
    one, two = out.removesuffix("\n").split("\n---------------\n")
    assert (code, err) == (0, "") and one != two
    assert all(text.startswith("light ") and len(text) == len("light ") + 20 for text in (one, two))


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
@pytest.mark.slow
def test_a_run_whose_terminal_is_lost_saves_and_its_report_is_made_later(folder, tmp_path):
    """Standard output was closed before it began: its number must not become that of a data file."""
    options = ["--out_dir", tmp_path / "run", "--optimizer.decay_steps", 24]
    lost = "import os; os.close(1);" + SIGNALLED
    code, out, err = run("train.py", *TINY, *RUN, 1, *options, cwd=folder, send=signal.SIGHUP, program=lost)
    assert (code, out, err) == (128 + signal.SIGHUP, "", "")
    n_saved = int(next((tmp_path / "run" / "checkpoints" / "latest").iterdir()).name)
    options += ["--resume", "--train.max_steps", n_saved]
    code, out, err = run("train.py", *TINY, *RUN, 1, *options, cwd=folder)
    assert (code, err) == (0, "") and "## Sample" in (tmp_path / "run" / "report.md").read_text()


@pytest.mark.parametrize(
    ("devices", "number", "fields"),
    [
        (2, signal.SIGTERM, []),
        pytest.param(1, signal.SIGINT, [], marks=pytest.mark.slow),
        pytest.param(2, signal.SIGTERM, SPEEDRUN, marks=pytest.mark.slow),
    ],
    ids=["two", "one", "speedrun"],
)
def test_a_stopped_run_resumes_bit_for_bit(trained, folder, devices, number, fields, state_of):
    name = f"{devices}{bool(fields)}"
    whole, parts = folder / f"whole{name}", folder / f"parts{name}"
    if devices == 2 and not fields:
        whole = folder / "out" / "default"
    else:
        assert run("train.py", *TINY, *fields, *RUN, devices, "--out_dir", whole, cwd=folder)[0] == 0
    stopped = run("train.py", *TINY, *fields, *RUN, devices, "--out_dir", parts, cwd=folder, send=number)
    assert stopped[0] == 128 + number and stopped[2] == "" and "--resume" in stopped[1]
    assert 8 <= state_of(parts)[0] < 12
    code, out, err = run("train.py", "--resume", "--out_dir", parts, "--cpu_devices", devices, cwd=folder)
    assert (code, err) == (0, "") and "resumed at step" in out
    assert_bit_equal(state_of(parts), state_of(whole))
    for column in ("step", "val_loss", "learning_rate"):
        assert [row[column] for row in rows(parts)] == [row[column] for row in rows(whole)]


@pytest.fixture
def train(folder, monkeypatch):
    """train.py's main in this process, with its 8 devices."""
    monkeypatch.chdir(folder)
    return lambda *arguments: gptjax.train.main([*map(str, arguments), "--cpu_devices", "8", "--num_processes", "1"])


def test_resuming_a_finished_run_changes_nothing(trained, folder, train, state_of, capsys):
    before = state_of(folder / "out" / "default")
    assert train("--resume") == 0 and "is at its last step, 24" in capsys.readouterr().out
    assert_bit_equal(before, state_of(folder / "out" / "default"))


def test_eval_only_prints_the_loss_of_the_best_parameters_and_writes_nothing(trained, folder, train, capsys):
    run_dir = folder / "out" / "default"
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    assert train("--eval_only", "--out_dir", run_dir) == 0
    best = min(float(row["val_loss"]) for row in rows(run_dir) if row["val_loss"])
    assert f"step 24: validation loss {best:.4f}" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before
    with pytest.raises(UserError, match="nothing to evaluate"):
        train("--eval_only", *TINY)


RESUME = ["--resume", "--out_dir", "out/default"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config", "nowhere.py"], ["no config file nowhere.py"]),
        (["--data.source", "nowhere.txt"], ["nowhere.txt"]),
        (["--data.source", "empty.txt"], ["empty.txt", "empty"]),
        (["--data.source", "latin.txt"], ["latin.txt", "UTF-8", "iconv"]),
        ([*TINY, "--data.source", "short.txt"], ["block_size=16"]),
        ([*TINY, "--train.batch_size", "12"], ["train.batch_size", "multiple of 8"]),
        ([*TINY, "--mesh.tensor", "5"], ["mesh.tensor=5"]),
        ([*TINY, "--out_dir", "out/default"], ["already holds a run", "--resume"]),
        ([*TINY, "--resume", "--out_dir", "nowhere"], ["nowhere holds no run"]),
        ([*RESUME, "--model.n_layer", "3"], ["model.n_layer=3", "has 2"]),
        ([*RESUME, "--train.max_steps", "30"], ["decay_steps 24"]),
        ([*RESUME, "--data.source", "other.txt"], ["data.source=other.txt"]),
    ],
)
def test_a_mistake_is_named_in_one_line(trained, folder, train, arguments, words):
    (folder / "other.txt").write_text("never seen before " * 100)
    (folder / "empty.txt").touch()
    (folder / "latin.txt").write_bytes("Straße\n".encode("latin1") * 100)
    (folder / "short.txt").write_text("to be")
    with pytest.raises(UserError) as error:
        train(*arguments)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value), str(error.value)


def test_a_mistake_is_one_line_on_stderr_and_exit_code_2(trained, folder):
    shutil.copytree(folder / "out" / "default", folder / "damaged")
    for path in (folder / "damaged").glob("checkpoints/best/*/params/*/d/*"):
        path.write_bytes(path.read_bytes()[:100])
    for script, argument, value, words in (
        ("train.py", "--model.n_layers", 3, "did you mean --model.n_layer?"),
        ("sample.py", "--run", "damaged", "damaged and was not loaded"),
    ):
        code, _, err = run(script, argument, value, cwd=folder)
        assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and words in err, err


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_keeps_the_checkpoint_before(folder, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", small], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"needs a small file system, and mounting one failed: {mounted.stderr.decode().strip()}")
    try:
        options = ["--model.n_embd", "128", "--train.save_interval", "8", "--train.max_steps", "24"]
        code, _, err = run("train.py", *TINY, *options, "--out_dir", small / "run", cwd=folder)
        left = Checkpoints(small / "run" / "checkpoints" / "latest", read_only=True).step
    finally:
        subprocess.run(["umount", small], check=True)
    assert code == 2 and err.startswith(f"error: cannot write a checkpoint in {small}") and err.count("\n") == 1, err
    assert "the disk is full" in err and left == 8


@pytest.mark.parametrize("command", COMMANDS)
def test_help_and_a_mistaken_option_do_not_wait_for_jax(command):
    """By `gptjax COMMAND`, and by `python -m gptjax.COMMAND`."""
    begin = "import atexit, runpy, sys\nfrom gptjax.__main__ import main\n"
    begin += "atexit.register(lambda: print('jax' in sys.modules, file=sys.stderr))\n"
    module = f"sys.argv[:2] = ['{command}']; runpy.run_module('gptjax.{command}', run_name='__main__')"
    wrong = "did you mean" if command in ("train", "sample", "plan") else "arguments are required"
    usage = f"usage: gptjax {command} [options]"
    for run_it, argument, code, words in (("main()", "--help", 0, usage), (module, "--sed", 2, "")):
        arguments = [sys.executable, "-c", begin + run_it, command, argument]
        done = subprocess.run(arguments, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
        assert done.returncode == code and done.stdout.startswith(words)
        assert done.stderr.endswith("False\n") and (wrong in done.stderr) == (code == 2), done.stderr


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("gptjax sa", {"sample"}),
        ("gptjax train --model.n_l", {"--model.n_layer"}),
        ("gptjax train --data.source a.txt --model.norm non", {"nonparametric_rmsnorm"}),
        ("gptjax data tokenize a.jsonl --val", {"--val_fraction"}),
    ],
)
def test_a_shell_completes_commands_options_and_choices(tmp_path, line, words):
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9"}
    asked |= {"_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "found")}
    environment = {**os.environ, **asked, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-m", "gptjax"], env=environment, check=True, capture_output=True)
    assert {word.strip() for word in (tmp_path / "found").read_text().split("\n")} == words


def test_help_shows_the_usual_options_and_help_all_the_others(capsys):
    texts = []
    for option in ("--help", "--help-all"):
        with pytest.raises(SystemExit) as end:
            gptjax.train.main([option])
        assert end.value.code == 0
        texts.append(capsys.readouterr().out)
    usual, everything = texts
    assert all("\n" + group + ":\n" in usual for group in "run cluster data model optimizer training mesh".split())
    assert [re.search(r" --\S+", group)[0] for group in usual.split(":\n")[2:5]] == [
        " --config", " --cpu_devices", " --data.source"
    ]  # fmt: skip
    assert "--train.seed N" in usual and "--config PATH" in usual and "{auto,float32,bfloat16,float16}" in usual
    hidden = {"--optimizer.beta1", "--model.rope_theta", "--train.max_skipped"}
    assert all(name not in usual and name in everything for name in hidden) and len(everything) > len(usual)
    named = set(re.findall(r"--([a-z]+\.\w+) ", usual))
    assert named == {name for name in flat(Config()) if field_metadata(name)["usual"]}
