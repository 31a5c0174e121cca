"""What leaves a run beside metrics.csv: TensorBoard's events, a profile, and a run of Weights & Biases."""

import os
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import pytest
from tensorboardX import proto

from gptjax.config import Config, DataConfig, MeshConfig, ModelConfig, TrainConfig
from gptjax.errors import UserError
from gptjax.loop import train
from gptjax.reporting.trackers import TensorBoard, require_trackers

ROOT = Path(__file__).parents[2]


def events(folder):
    """The tags and contents in TensorBoard's records: length, checksum, event, checksum."""
    [file] = folder.iterdir()
    data, found = file.read_bytes(), []
    while data:
        [length] = struct.unpack("<Q", data[:8])
        event = proto.event_pb2.Event.FromString(data[12 : 12 + length])
        found += [(event.step, value.tag, value) for value in event.summary.value]
        data = data[16 + length :]
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of six steps on one device, whose steps 3 and 4 were profiled."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.txt").write_text("to be or not to be that is the question\n" * 60)
    config = Config(
        data=DataConfig(source=str(folder / "text.txt"), dir=str(folder / "data")),
        model=ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=16, dtype="float32"),
        train=TrainConfig(max_steps=6, batch_size=8, eval_interval=3, log_interval=1, profile="3:4"),
        mesh=MeshConfig(data=1),
    )
    assert train(config, folder / "run", resume=False, sample=lambda _, step: f"text of\nstep {step}") == 0
    return folder / "run"


def test_tensorboard_has_the_curves_the_picture_of_the_losses_and_the_samples(run):
    found = events(run / "tensorboard")
    assert [step for step, tag, _ in found if tag == "train_loss"] == [1, 2, 3, 4, 5, 6]
    pictures = {step: value.image.encoded_image_string for step, tag, value in found if tag == "loss"}
    assert list(pictures) == [6] and pictures[6] == (run / "loss.png").read_bytes()
    texts = {step: value.tensor.string_val[0] for step, tag, value in found if tag.startswith("sample")}
    assert texts[6] == b"    text of\n    step 6"


def test_a_profile_holds_the_steps_that_were_asked_for_and_names_the_parts_of_the_model(run):
    [file] = (run / "profile").rglob("*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(file)).planes
    steps = {
        dict(event.stats)["step_num"]
        for plane in planes
        for line in plane.lines
        for event in line.events
        if event.name == "train"
    }
    assert steps == {3, 4}
    data = file.read_bytes()
    assert all(
        scope in data for scope in (b"layers/attention/", b"/query/dot", b"layers/mlp/up/", b"(loss)", b"/optimizer/")
    )


@pytest.mark.parametrize("steps", ["3", "0:2", "4:3", "a:b", "3:"])
def test_a_range_of_steps_that_is_none_is_refused(steps):
    with pytest.raises(UserError, match="train.profile=.* is not A:B"):
        TrainConfig(profile=steps)


def test_wandb_is_asked_for_before_anything_is_prepared(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"train.wandb='plays' needs the package wandb: pip install 'gptjax\[wandb\]'"):
        require_trackers(replace(Config(), train=TrainConfig(wandb="plays")))


def test_a_tensorboard_folder_that_is_resumed_drops_what_came_later(tmp_path):
    log = TensorBoard(tmp_path, start=7)
    log.close()
    [file] = tmp_path.iterdir()
    assert proto.event_pb2.SessionLog.START == 1 and b"brain.Event" in file.read_bytes()


def records_of(log):
    """The records of a .wandb file: behind 7 bytes, blocks of 32 KiB of parts (checksum, length, 1 to 4, content)."""
    data, at, record = log.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if at % 32768 > 32768 - 7:
            at += -at % 32768
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


@pytest.mark.slow
def test_a_run_of_weights_and_biases_is_kept_offline_and_continued_when_the_run_resumes(tmp_path):
    wandb = pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    (tmp_path / "text.txt").write_text("to be or not to be that is the question\n" * 60)
    small = "--model.n_layer 1 --model.n_head 2 --model.n_embd 16 --model.block_size 16 --train.batch_size 8"
    options = [*small.split(), "--data.source", "text.txt", "--out_dir", "run", "--train.wandb", "plays"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "WANDB_MODE": "offline"}
    for more in (["--train.max_steps", "4"], ["--resume", "--train.max_steps", "6", "--optimizer.decay_steps", "4"]):
        logged = ["--train.log_interval", "1", "--train.eval_interval", "2", *more]
        command = [sys.executable, str(ROOT / "train.py"), *options, *logged]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0 and "wandb:   " in done.stdout, done.stderr
    name = (tmp_path / "run" / "wandb" / "id").read_text()
    logs = sorted((tmp_path / "run" / "wandb").glob(f"offline-run-*-{name}/run-{name}.wandb"))
    steps, keys = [], set()
    for log in logs:
        for data in records_of(log):
            record = wandb_internal_pb2.Record.FromString(data)
            row = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
            keys |= {name.partition(".")[0] for name in row}
            if "train_loss" in row:
                steps.append(int(row["step"]))
    assert len(logs) == 2 and steps == [1, 2, 3, 4, 5, 6] and {"val_loss", "loss", "samples"} <= keys, (wandb, keys)
