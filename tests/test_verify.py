"""gptjax.verify passes an honest run, and names what was changed in a dishonest or damaged one."""

import hashlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gptjax import verify
from gptjax.checkpoint import CHECKSUMS, Checkpoints
from gptjax.config import Config, DataConfig, MeshConfig, ModelConfig, TrainConfig
from gptjax.errors import UserError
from gptjax.loop import train
from gptjax.sharding import one_device, with_shardings
from gptjax.training import state_shapes

MODEL = ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, dtype="float32", dropout=0.1)
TRAIN = TrainConfig(max_steps=7, batch_size=4, eval_interval=5, save_interval=4, log_interval=3, keep_every=2)


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    """A run of 5 steps that was continued from step 4, between two rows of metrics.csv, to step 7."""
    folder = tmp_path_factory.mktemp("honest")
    words = np.random.default_rng(0).choice(["to", "be", "or", "not", "that", "is", "the", "question"], 1000)
    (folder / "text.txt").write_text(" ".join(words))
    data = DataConfig(source=str(folder / "text.txt"), dir=str(folder / "data"))
    config = Config(data=data, model=MODEL, train=TRAIN, mesh=MeshConfig(data=1))
    decay = replace(config.optimizer, decay_steps=7)
    train(replace(config, optimizer=decay, train=replace(TRAIN, max_steps=5)), folder / "run", resume=False)
    train(replace(config, optimizer=decay), folder / "run", resume=True, from_step=4)
    return folder / "run"


@pytest.fixture
def run(honest, tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "use_cores", lambda *arguments: None)  # conftest.py has set the devices
    return shutil.copytree(honest, tmp_path / "run")


def edit(path, pattern, new):
    text, n = re.subn(pattern, new, path.read_text())
    assert n, f"no {pattern} in {path}"
    path.write_text(text)


def sign(step):
    """Write the checksums of a checkpoint that was changed."""
    files = [path for path in step.glob("*/**/*") if path.is_file()]
    sums = {str(path.relative_to(step)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    (step / CHECKSUMS).write_text(json.dumps(sums))


def flip_a_bit(run):
    path = max((run / "checkpoints/latest/7").rglob("d/*"), key=lambda path: path.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def change_a_parameter(run):
    """And sign the checkpoint again, as one who wants to hide it would."""
    checkpoints = Checkpoints(run / "checkpoints/latest", keep=3)
    config = Config.from_json(run / "config.json")
    abstract = with_shardings(one_device(), state_shapes(config))
    trees, meta = checkpoints.restore(7, params=abstract.params, opt_state=abstract.opt_state)
    trees["params"]["final_norm"]["scale"] = trees["params"]["final_norm"]["scale"].at[3].add(0.25)
    checkpoints.drop_after(5)
    checkpoints.save(7, meta, **trees)
    checkpoints.close()


def change_the_batches(run):
    """Of all that names the seed of the batches, as if the run had drawn others than it says."""
    for path in [run / "config.json", run / "environment.json", *run.glob("checkpoints/*/*/meta/metadata")]:
        edit(path, '"seed": null', '"seed": 8')
    for step in run.glob("checkpoints/*/*"):
        sign(step)


def change_the_config(run):
    edit(run / "config.json", '"beta2": 0.99', '"beta2": 0.95')


def change_a_checkpoints_config(run):
    edit(run / "checkpoints/latest/7/meta/metadata", '"seed": 1337', '"seed": 1338')
    sign(run / "checkpoints/latest/7")


def change_a_metric(run):
    edit(run / "metrics.csv", r"(\n7,[^,]*,[^,]*,\d.\d\d)", r"\g<1>9")


def shuffle_the_text(run):
    text = run.parent / "text.txt"
    words = Config.from_json(run / "config.json").data.source
    text.write_text(" ".join(sorted(Path(words).read_text().split())))
    for path in [run / "config.json", run / "environment.json", *run.glob("checkpoints/*/*/meta/metadata")]:
        edit(path, words, str(text))
    for step in run.glob("checkpoints/*/*"):
        sign(step)


@pytest.mark.parametrize("steps", [[], ["--steps", "0:7"]], ids=["from_a_state", "from_the_start"])
def test_an_honest_run_agrees_bit_for_bit(run, steps, capsys):
    assert verify.main([str(run), *steps]) == 0
    assert "everything agrees bit for bit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (flip_a_bit, r"latest/7: .* is not what was written"),
        (change_a_parameter, r"latest/7: 1 of \d+ arrays .* first params/final_norm/scale; .* 0.25, in params/final_n"),
        (change_the_batches, r"metrics.csv: train_loss of step 5 .*\n(.*\n)*DIFFERS: latest/7: .* first params/"),
        (change_the_config, r"config.json: optimizer.beta2 is 0.95 there, but the run had 0.99"),
        (change_a_checkpoints_config, r"latest/7: train.seed is 1338 there, but the run had 1337"),
        (change_a_metric, r"metrics.csv: train_loss of step 7 is \S+ there and \S+ when"),
        (shuffle_the_text, r"data: the tokens of .* are not those of the run"),
    ],
)
def test_a_change_is_found_and_named(run, change, said, capsys):
    change(run)
    assert verify.main([str(run)]) == 1
    output = capsys.readouterr().out
    assert re.search(f"DIFFERS: {said}", output), output


@pytest.mark.parametrize(("factor", "code"), [(1.0001, 0), (1.1, 1)])
def test_on_other_versions_the_difference_may_be_that_of_rounding(run, factor, code, capsys):
    edit(run / "environment.json", '"jax": "[^"]*"', '"jax": "0.1"')
    edit(run / "metrics.csv", r"(\n7,(?:[^,]*,){5})([^,]*)", lambda found: found[1] + str(float(found[2]) * factor))
    assert verify.main([str(run)]) == code
    output = capsys.readouterr().out
    assert "note: versions.jax was 0.1 and is" in output and "not equal bit for bit; differences: 1" in output
    assert ("not equal either within 1%" in output) == code


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "nowhere holds no run"),
        (["RUN", "--steps", "5"], "steps='5' is not A:B"),
        (["RUN", "--steps", "5:9"], "no steps to compare: .* 0:7 is the whole run"),
    ],
)
def test_a_mistake_is_one_line(run, arguments, said):
    with pytest.raises(UserError, match=said):
        verify.main([str(run) if each == "RUN" else each for each in arguments])
