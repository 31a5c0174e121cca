"""The run directory: which one, and whether a config may go on in it."""

import dataclasses
import os

import pytest

from gptjax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimizerConfig, TrainConfig
from gptjax.errors import UserError
from gptjax.run_dir import new_run_dir, newest_run, require_resumable


def make_run(path, seconds):
    (path / "checkpoints" / "latest" / "10").mkdir(parents=True)
    (path / "config.json").write_text("{}")
    os.utime(path / "checkpoints" / "latest", (seconds, seconds))


def test_a_new_run_never_overwrites_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = []
    for i in range(3):
        path = new_run_dir("x", None)
        names.append(str(path))
        make_run(path, i)
    assert names == ["out/x", "out/x-2", "out/x-3"]
    (tmp_path / "out/x-4").mkdir()  # a run that never saved is nobody's work
    assert str(new_run_dir("x", None)) == "out/x-4"
    assert str(new_run_dir("x", "elsewhere")) == "elsewhere"
    with pytest.raises(UserError, match=r"out/x already holds a run; .*--resume"):
        new_run_dir("x", "out/x")


def test_the_newest_run_is_the_one_that_saved_last(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no run in out"):
        newest_run()
    for name, seconds in (("a", 300), ("b", 100), ("b-2", 200)):
        make_run(tmp_path / "out" / name, seconds)
    assert str(newest_run()) == "out/a" and str(newest_run("b")) == "out/b-2"
    with pytest.raises(UserError, match="no run in out/c"):
        newest_run("c")


BASE = Config(data=DataConfig(tokenizer="bpe"))
SECTIONS = [DataConfig, ModelConfig, OptimizerConfig, TrainConfig, MeshConfig]
OTHER = {
    "data.source": "elsewhere.txt", "data.sha256": "ab", "data.dir": "elsewhere", "data.order": "epoch",
    "data.tokenizer": "char", "optimizer.beta1": 0.5, "optimizer.beta2": 0.5,
    "model.dtype": "float32", "model.bias": True, "model.dropout": 0.5, "model.attention_dropout": 0.5,
    "model.n_embd": 390, "model.n_head": 3, "model.activation": "swiglu", "model.norm": "rmsnorm",
    "model.position": "rope", "model.n_kv_head": 2, "model.qkv_bias": True, "model.tied_head": False,
    "model.lora_layers": "query", "model.qk_norm": True, "model.embedding_norm": True,
    "model.logit_cap": 15.0, "optimizer.schedule": "linear",
    "optimizer.matrix_optimizer": "muon", "optimizer.muon_weight_decay": 0.1, "model.separator": 3,
    "model.attention": "plain", "model.layers": "looped", "model.remat": "full",
    "optimizer.decay_steps": 2000, "mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2,
}  # fmt: skip
FREE = """model.attention model.layers model.remat data.tokenizer data.source data.sha256 data.dir
train.eval_interval train.eval_batches train.save_interval train.log_interval train.patience mesh.data mesh.fsdp
mesh.tensor optimizer.decay_steps""".split()


@pytest.mark.parametrize(
    "name", [f"{s.__name__[:-6].lower()}.{f.name}" for s in SECTIONS for f in dataclasses.fields(s)]
)
def test_every_field_that_would_change_the_run_is_refused_by_name(name):
    section, field = name.split(".")
    value = getattr(getattr(BASE, section), field)
    other = OTHER[name] if name in OTHER else value + (1 if isinstance(value, int) else value / 2)
    changed = dataclasses.replace(BASE, **{section: dataclasses.replace(getattr(BASE, section), **{field: other})})
    if name in FREE:
        require_resumable(BASE, changed)
        return
    with pytest.raises(UserError, match=f"cannot resume with {name}={other}"):
        require_resumable(BASE, changed)


def test_a_longer_run_must_keep_its_learning_rates():
    longer = dataclasses.replace(BASE, train=TrainConfig(max_steps=3000))
    with pytest.raises(UserError, match=r"train.max_steps=3000: .* pass --optimizer.decay_steps 2000"):
        require_resumable(BASE, longer)
    require_resumable(BASE, dataclasses.replace(longer, optimizer=OptimizerConfig(decay_steps=2000)))
