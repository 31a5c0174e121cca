"""The run directory: which one, and whether a config may continue in it."""

import dataclasses
import os
import typing
from contextlib import ExitStack

import jax
import jax.numpy as jnp
import pytest

from gptjax.checkpoint import Checkpoints
from gptjax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig, field_metadata, flat
from gptjax.errors import UserError
from gptjax.files import InUse
from gptjax.model import param_shapes
from gptjax.run_dir import load_run, new_run_dir, newest_run, require_resumable
from gptjax.tokenizer import Tokenizer


def make_run(path, seconds):
    (path / "checkpoints" / "latest" / "10").mkdir(parents=True)
    (path / "config.json").write_text("{}")
    os.utime(path / "checkpoints" / "latest", (seconds, seconds))


def claim(name, out_dir=None):
    """The folder of a new run, whose process has ended."""
    with ExitStack() as lock:
        return str(new_run_dir(name, out_dir, lock))


def test_a_new_run_never_overwrites_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = []
    for i in range(3):
        names.append(claim("x"))
        make_run(tmp_path / names[-1], i)
    assert names == ["out/x", "out/x-2", "out/x-3"]
    (tmp_path / "out/x-4").mkdir()  # a run that never saved
    assert claim("x") == "out/x-4"
    assert claim("x", "elsewhere") == "elsewhere"
    with pytest.raises(UserError, match=r"out/x already holds a run; .*--resume"):
        claim("x", "out/x")


def test_two_runs_that_start_at_once_get_two_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with ExitStack() as one, ExitStack() as other:
        assert [str(new_run_dir("x", None, lock)) for lock in (one, other)] == ["out/x", "out/x-2"]
        with pytest.raises(InUse, match="out/x is in use"):
            claim("x", "out/x")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["config.json"], "holds another program's config.json"),
        (["checkpoints/best/40/meta"], "holds .*best/40, but no state of a run to continue"),
        (["notes.txt"], None),
        ([".lock", "config.json", "metrics.csv", "checkpoints/best/0/meta"], None),  # killed before its first save
    ],
)
def test_a_folder_with_anything_of_worth_is_not_taken(tmp_path, files, words):
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    if words is None:
        assert claim("x", str(tmp_path)) == str(tmp_path)
        return
    with pytest.raises(UserError, match=words):
        claim("x", str(tmp_path))


def test_the_newest_run_is_the_one_that_saved_last(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no run in out"):
        newest_run()
    for name, seconds in (("a", 300), ("b", 100), ("b-2", 200)):
        make_run(tmp_path / "out" / name, seconds)
    assert str(newest_run()) == "out/a" and str(newest_run("b")) == "out/b-2"
    with pytest.raises(UserError, match="no run in out/c"):
        newest_run("c")


def test_a_checkpoint_that_training_replaces_is_read_again(tmp_path, monkeypatch):
    model = ModelConfig(vocab_size=3, n_layer=1, n_head=1, n_embd=2, block_size=2, dtype="float32")
    (tmp_path / "config.json").write_text(Config(model=model).to_json())
    (tmp_path / "tokenizer.json").write_text(Tokenizer.characters("abc").to_json())
    shapes = param_shapes(model)
    restore = Checkpoints.restore

    def save(step):
        checkpoints = Checkpoints(tmp_path / "checkpoints" / "best")
        checkpoints.save(step, {}, params=jax.tree.map(lambda leaf: jnp.full(leaf.shape, float(step)), shapes))
        checkpoints.close()

    def interrupted(self, **abstract):
        if self.step < 3:
            save(self.step + 1)
            raise UserError("damaged")
        return restore(self, **abstract)

    save(1)
    monkeypatch.setattr(Checkpoints, "restore", interrupted)
    assert jax.tree.leaves(load_run(tmp_path, "best")[1])[0].ravel()[0] == 3
    for file in (tmp_path / "checkpoints").rglob("sha256.json"):
        file.unlink()
    with pytest.raises(UserError, match="damaged"):
        load_run(tmp_path, "best")


BASE = Config(
    data=DataConfig(tokenizer="bpe"), model=ModelConfig(qk_norm=True), optimizer=OptimizerConfig(decay_steps=2000)
)


def with_another(name):
    """BASE with another valid value of a field, and that value."""
    section, _, field = name.rpartition(".")
    owner = getattr(BASE, section) if section else BASE
    hint = typing.get_type_hints(type(owner))[field]
    candidates = [*typing.get_args(hint), True, False, 1, 2, 6, 1000, 0.5, 2.0, 1e-5, "elsewhere", "query", "1:2"]
    for value in candidates:
        try:
            changed = dataclasses.replace(owner, **{field: value})
            if value != getattr(owner, field):
                return dataclasses.replace(BASE, **{section: changed}) if section else changed, value
        except UserError:
            pass
    raise AssertionError(f"no other value of {name} is valid")


def test_every_field_that_would_change_the_run_is_refused_by_name(capsys):
    """Remedies against divergence are taken where the command line names them."""
    for name in flat(BASE).keys() - {"optimizer.decay_steps"}:  # the next test's
        changed, value = with_another(name)
        if field_metadata(name)["free_on_resume"]:
            require_resumable(BASE, changed)
            continue
        if field_metadata(name)["remedy"]:
            require_resumable(BASE, changed, [name])
            assert f"note: {name} was" in capsys.readouterr().out
        with pytest.raises(UserError, match=f"cannot resume with {name}={value}"):
            require_resumable(BASE, changed)


def test_a_longer_run_must_keep_its_learning_rates():
    base, longer = Config(), Config(train=TrainConfig(max_steps=3000))
    with pytest.raises(UserError, match=r"train.max_steps=3000: .* pass --optimizer.decay_steps 2000"):
        require_resumable(base, longer)
    require_resumable(base, dataclasses.replace(longer, optimizer=OptimizerConfig(decay_steps=2000)))
