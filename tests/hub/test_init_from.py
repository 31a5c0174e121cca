"""Runs that start from other weights: they begin with the same loss, keep the side files, and are self-contained."""

import json
import re
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest

import gptjax.train
from gptjax import host, loop
from gptjax.config import Config, ModelConfig
from gptjax.data.prepare import load_dataset
from gptjax.errors import UserError
from gptjax.hub.export import export
from gptjax.hub.init_from import open_pretrained
from gptjax.hub.weights import SIDE_FILES
from gptjax.inference.evaluation import text_loss
from gptjax.inference.language_model import LanguageModel
from gptjax.reporting import report
from gptjax.reporting.report import read_metrics
from gptjax.tokenizer import Tokenizer

# The text has fewer letters, and in another order, which tells its own tokenizer from that of the weights.
LETTERS = "tobeaniqus \nxyz"
CONFIG = ModelConfig(vocab_size=len(LETTERS), block_size=16, n_layer=1, n_head=2, n_embd=16, bias=True, dtype="float32")
SIDE = {
    "tokenizer_config.json": '{"eos_token": "\\n"}',
    "special_tokens_map.json": "{}",
    "chat_template.jinja": "{{ messages[0].content }}:",
    "generation_config.json": '{"eos_token_id": [11], "top_k": 7}',
}
STEPS = ["--train.batch_size", "4", "--train.eval_interval", "2", "--mesh.data", "1", "--optimizer.decay_steps", "4"]
STEPS += ["--optimizer.warmup_steps", "0", "--optimizer.learning_rate", "0.01", "--train.log_interval", "1"]
STEPS += ["--model.dtype", "float32", "--model.dropout", "0.1", "--num_processes", "1"]


def tokenizer_of(letters):
    return Tokenizer.from_characters({letter: i for i, letter in enumerate(letters)})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A text of 970 characters, of which 97 validate: 12 windows of 8."""
    path = tmp_path_factory.mktemp("work")
    words = np.random.default_rng(0).choice(["to", "be", "on", "not", "question\n"], 1000)
    (path / "text.txt").write_text(" ".join(words)[:970])
    return path


@pytest.fixture(scope="module", autouse=True)
def compile_quickly():
    """Half of this file's time would be XLA's optimizations."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def train(folder):
    """train.py's main on the text, without what takes time and has tests of its own; all runs share compiled steps."""
    compiled = cache(loop.compile_steps)

    def compile_steps(config, *arguments, **options):
        config = replace(config, init_from=None, data=Config().data, train=replace(config.train, max_steps=4))
        return compiled(config, *arguments, **options)

    data = ["--data.source", folder / "text.txt", "--data.dir", folder / "data"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "use_cores", lambda *arguments: None)  # conftest.py has set the devices
        patch.setattr(gptjax.train, "sample", lambda *arguments: "")
        patch.setattr(loop, "compile_steps", compile_steps)
        patch.setattr(report, "plot_losses", lambda *arguments, **options: None)
        yield lambda *arguments: gptjax.train.main([*map(str, [*STEPS, *data, *arguments])])


@pytest.fixture(scope="module")
def origin(folder, scramble):
    """A Hugging Face folder with every side file."""
    path = folder / "origin"
    path.mkdir()
    export(path, CONFIG, scramble(CONFIG), "float32")
    tokenizer_of(LETTERS).save(path / "tokenizer.json")
    for name, text in SIDE.items():
        (path / name).write_text(text)
    assert set(SIDE) == set(SIDE_FILES)
    return path


@pytest.fixture(scope="module")
def run(train, folder, origin):
    """Four steps from the folder on, with half its positions; beside it "half", the same run with two steps."""
    for name, steps in (("half", 2), ("run", 4)):
        arguments = ["--init_from", origin, "--model.block_size", "8", "--train.max_steps", steps, "--mesh.data", "1"]
        assert train(*arguments, "--out_dir", folder / name) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def second(train, folder, run):
    """One step from the run on, with the default block_size and a tokenizer that is named: a copy of its own."""
    tokenizer_of(LETTERS).save(folder / "same.json")
    named = ["--data.tokenizer", folder / "same.json", "--train.max_steps", "1", "--mesh.data", "1"]
    assert train(*named, "--init_from", run, "--out_dir", folder / "second") == 0
    return folder / "second"


def test_a_run_begins_with_the_loss_that_its_origin_has(run, origin, second):
    """Mean of the same float32 losses, to six digits in metrics.csv."""
    for run_dir, start in ((run, origin), (second, run)):
        tokens = load_dataset(Config.from_json(run_dir / "config.json").data).val
        ids = tokens.window(0, len(tokens)).astype(np.int32)
        expected = text_loss(LanguageModel.load(str(start)), ids, 8)["nats_per_token"]
        assert len(ids) == 97
        np.testing.assert_allclose(read_metrics(run_dir / "metrics.csv")["val_loss"][0], expected, rtol=2e-5)
    losses = read_metrics(run / "metrics.csv")["val_loss"]
    assert losses[np.isfinite(losses)][-1] < losses[0] - 0.1  # and it does train


def test_a_run_has_its_origins_architecture_side_files_and_tokenizer(run, second, origin, folder):
    for out in (run, second):
        assert Config.from_json(out / "config.json").model == replace(CONFIG, block_size=8, dropout=0.1)
        assert {name: (out / name).read_text() for name in SIDE} == SIDE
        assert (out / "tokenizer.json").read_text() == (origin / "tokenizer.json").read_text()
    model = LanguageModel.load(str(second))
    assert model.template == SIDE["chat_template.jinja"] and model.defaults == {"top_k": 7}
    assert model.stop_tokens == {model.tokenizer.token_id("\n"), 11}
    assert Config.from_json(run / "config.json").data.tokenizer == str(origin)
    assert Config.from_json(second / "config.json").data.tokenizer == str(folder / "same.json")
    assert open_pretrained(str(run)).adapt(Config()).data.tokenizer == str(run / "tokenizer.json")


def test_stop_ids_of_an_origins_config_come_along(origin, tmp_path):
    """A run has a config.json of its own."""
    shutil.copytree(origin, tmp_path / "origin")
    config = json.loads((tmp_path / "origin" / "config.json").read_text()) | {"eos_token_id": [3, 5]}
    (tmp_path / "origin" / "config.json").write_text(json.dumps(config))
    for rules, copied in (('{"top_k": 7}', {"top_k": 7, "eos_token_id": [3, 5]}), ('{"eos_token_id": 2}',) * 2):
        (tmp_path / "origin" / "generation_config.json").write_text(rules)
        open_pretrained(str(tmp_path / "origin")).copy_side_files(tmp_path)
        made = json.loads((tmp_path / "generation_config.json").read_text())
        assert made == (json.loads(copied) if isinstance(copied, str) else copied)


def test_a_run_resumes_bit_for_bit_without_its_origin(train, folder, origin, run, state_of):
    shutil.copytree(folder / "half", folder / "resumed")
    resume = ["--resume", "--out_dir", folder / "resumed", "--train.max_steps", "4"]
    gone = origin.rename(folder / "gone")
    try:
        assert train(*resume) == 0
    finally:
        gone.rename(origin)
    (step, trees), (other_step, other_trees) = state_of(folder / "resumed"), state_of(run)
    assert step == other_step == 4
    jax.tree.map(np.testing.assert_array_equal, trees, other_trees)
    metrics, others = read_metrics(folder / "resumed" / "metrics.csv"), read_metrics(run / "metrics.csv")
    for name in ("step", "train_loss", "val_loss", "grad_norm"):
        np.testing.assert_array_equal(metrics[name], others[name])


def test_a_resumed_run_keeps_its_architecture(train, folder, run):
    half = folder / "half"
    for arguments in (["--model.n_layer", "3"], ["--model.block_size", "4"], ["--init_from", half]):
        with pytest.raises(UserError, match="checkpoint has|cannot resume with"):
            train("--resume", "--out_dir", half, "--train.max_steps", "4", *arguments)


def test_fields_of_a_checkpoint_are_its_own_and_all_others_the_runs(origin):
    weights = open_pretrained(str(origin))
    own = {"dropout": 0.2, "dtype": "bfloat16", "lora_rank": 3, "lora_alpha": 5.0, "lora_layers": "query,up"}
    same = {"bias": True, "vocab_size": len(LETTERS), "n_layer": 1}
    adapted = weights.adapt(Config(model=ModelConfig(block_size=9, **own, **same))).model
    assert adapted == replace(CONFIG, block_size=9, **own)
    for field, value in {"n_layer": 3, "position": "rope", "vocab_size": 9, "norm_eps": 1e-3, "qk_norm": True}.items():
        there = getattr(CONFIG, field)
        with pytest.raises(UserError, match=re.escape(f"is not what the checkpoint has ({there}); leave it out")):
            weights.adapt(Config(model=ModelConfig(**{field: value})))
    assert weights.adapt(Config()).model.block_size == 16 < ModelConfig().block_size
    with pytest.raises(UserError, match="block_size=17 is longer than .* 16 positions; pass .* 16 or less"):
        weights.adapt(Config(model=ModelConfig(block_size=17)))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model.n_layer", "3"], "model.n_layer=3 is not what the checkpoint has (1)"),
        (["--data.tokenizer", "other.json"], "was made with another tokenizer than the weights of"),
        (["--init_from", "no such model"], "'no such model' does not exist"),
        (["--out_dir", "origin"], "origin holds another program's config.json, which a run would replace"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_no_run(train, folder, origin, monkeypatch, arguments, words):
    monkeypatch.chdir(folder)
    tokenizer_of(LETTERS[::-1]).save(Path("other.json"))
    with pytest.raises(UserError, match=re.escape(words)) as raised:
        train("--init_from", origin, "--out_dir", "new", *arguments)
    assert "\n" not in str(raised.value) and not Path("new").exists()
