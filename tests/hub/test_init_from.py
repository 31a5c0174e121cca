"""Runs that start from other weights: they begin where those end, keep their manners, and then need them no more."""

import importlib.util
import shutil
import signal
from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest

from gptjax import flops, loop, report
from gptjax.checkpoint import Checkpoints
from gptjax.config import Config, DataConfig, ModelConfig
from gptjax.data.prepare import load_dataset
from gptjax.errors import UserError
from gptjax.evaluate import text_loss
from gptjax.hub.export import export
from gptjax.hub.families import draw_params
from gptjax.hub.init_from import open_pretrained
from gptjax.hub.weights import SIDE_FILES
from gptjax.inference.language_model import LanguageModel
from gptjax.metrics import Metrics
from gptjax.report import read_metrics
from gptjax.run_dir import load_run
from gptjax.sharding import one_device, with_shardings
from gptjax.tokenizer import Tokenizer
from gptjax.training import init_state

BLOCK = 16
# A text has the first of these; that the origin has more, and in this order, tells its tokenizer from the text's own.
LETTERS = "tobeaniqus \nxyz"
CONFIG = ModelConfig(
    vocab_size=len(LETTERS), block_size=BLOCK, n_layer=1, n_head=2, n_embd=16, bias=True, dtype="float32"
)
SIDE = {
    "tokenizer_config.json": '{"eos_token": "\\n"}',
    "special_tokens_map.json": "{}",
    "chat_template.jinja": "{{ messages[0].content }}:",
    "generation_config.json": '{"eos_token_id": [11], "top_k": 7}',
}
STEPS = ["--train.max_steps", "4", "--train.batch_size", "4", "--train.eval_interval", "2", "--mesh.data", "1"]
STEPS += ["--optimizer.warmup_steps", "0", "--optimizer.learning_rate", "0.01", "--train.log_interval", "1"]
STEPS += ["--model.dtype", "float32"]


@pytest.fixture(scope="module", autouse=True)
def compile_quickly():
    """Half of this file's time would be XLA's optimizations."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def train():
    """train.py's main without what takes time and has tests of its own: the picture, the report, the peak FLOP/s.

    Runs that differ in their data alone share their compiled steps.
    """
    path = Path(__file__).parents[2] / "train.py"
    spec = importlib.util.spec_from_file_location("train", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    steps = cache(loop.compile_steps)

    def compile_steps(config, mesh, ahead):
        return steps(replace(config, init_from=None, data=DataConfig()), mesh, ahead)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "use_cores", lambda *arguments: None)  # conftest.py has set the devices
        patch.setattr(loop, "_report", lambda *arguments: None)
        patch.setattr(loop, "compile_steps", compile_steps)
        patch.setattr(report, "plot_losses", lambda *arguments, **options: None)
        patch.setattr(flops, "measured_matmul_peak", lambda *arguments, **options: 1e12)
        yield lambda *arguments: script.main([*map(str, arguments), "--num_processes", "1"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A text of 970 characters, of which 97 validate: 6 windows of 16, or 12 of 8."""
    path = tmp_path_factory.mktemp("work")
    words = np.random.default_rng(0).choice(["to", "be", "or", "not", "question\n"], 1000)
    (path / "text.txt").write_text(" ".join(words).replace("r", "n")[:970])
    return path


@pytest.fixture(scope="module")
def origin(folder, scramble):
    """A Hugging Face folder with all that one may have beside its weights."""
    path = folder / "origin"
    path.mkdir()
    export(path, CONFIG, scramble(CONFIG), "float32")
    tokenizer_of(LETTERS).save(path / "tokenizer.json")
    for name, text in SIDE.items():
        (path / name).write_text(text)
    assert set(SIDE) == set(SIDE_FILES)
    return path


def tokenizer_of(letters):
    return Tokenizer.from_characters({letter: i for i, letter in enumerate(letters)})


@pytest.fixture(scope="module")
def options(folder):
    return [*STEPS, "--data.source", folder / "text.txt", "--data.dir", folder / "data"]


@pytest.fixture(scope="module")
def run(train, folder, origin, options):
    """Four steps from the folder on, with dropout and the default block_size, which is longer than the folder's."""
    out = folder / "run"
    assert train(*options, "--init_from", origin, "--out_dir", out, "--model.dropout", "0.1") == 0
    return out


@pytest.fixture(scope="module")
def stopped(train, folder, origin, options, run):
    """The same run, stopped after two steps."""
    out, add = folder / "stopped", Metrics.add

    def add_and_stop(self, step, metrics):
        add(self, step, metrics)
        if step == 2:
            signal.raise_signal(signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Metrics, "add", add_and_stop)
        code = train(*options, "--init_from", origin, "--out_dir", out, "--model.dropout", "0.1")
    assert code == 128 + signal.SIGINT and Checkpoints(out / "checkpoints" / "latest", read_only=True).step == 2
    return out


@pytest.fixture(scope="module")
def second(train, folder, options, run):
    """One step from the run on, with half its block and a tokenizer that is named: a copy of its own."""
    tokenizer_of(LETTERS).save(folder / "same.json")
    named = ["--data.tokenizer", folder / "same.json", "--model.block_size", "8", "--train.max_steps", "1"]
    assert train(*options, *named, "--init_from", run, "--out_dir", folder / "second") == 0
    return folder / "second"


def first_val_loss(run_dir):
    return read_metrics(run_dir / "metrics.csv")["val_loss"][0]


def loss_of(model, run_dir, block_size):
    """A model's on the tokens that the run validates on."""
    config = Config.from_json(run_dir / "config.json")
    tokens = load_dataset(config.data).val
    ids = tokens.window(0, len(tokens)).astype(np.int32)
    assert len(ids) == 97
    return text_loss(model, ids, block_size)["nats_per_token"]


def test_a_run_begins_with_the_loss_that_its_origin_has(run, origin, second):
    """Mean of the same float32 losses, to six digits in metrics.csv."""
    np.testing.assert_allclose(first_val_loss(run), loss_of(LanguageModel.load(str(origin)), run, BLOCK), rtol=2e-5)
    of_run = loss_of(LanguageModel.load(str(run), "best"), second, 8)
    np.testing.assert_allclose(first_val_loss(second), of_run, rtol=2e-5)
    losses = read_metrics(run / "metrics.csv")["val_loss"]
    assert losses[np.isfinite(losses)][-1] < losses[0] - 0.1  # and it does train


def test_a_run_has_its_origins_architecture_and_as_many_positions_as_asked_for(run, second):
    assert Config.from_json(run / "config.json").model == replace(CONFIG, dropout=0.1)
    assert Config.from_json(second / "config.json").model == replace(CONFIG, block_size=8)


def test_a_run_keeps_what_stood_beside_the_weights(run, second, origin):
    for folder in (run, second):
        for name, text in SIDE.items():
            assert (folder / name).read_text() == text
        model = LanguageModel.load(str(folder))
        assert model.template == SIDE["chat_template.jinja"] and model.defaults == {"top_k": 7}
        assert model.stop_tokens == {LanguageModel.load(str(folder)).tokenizer.token_id("\n"), 11}


def test_the_origins_tokenizer_is_used_unless_one_is_named(run, second, origin, folder):
    assert (run / "tokenizer.json").read_text() == (origin / "tokenizer.json").read_text()
    assert Config.from_json(run / "config.json").data.tokenizer == str(origin)
    assert Config.from_json(second / "config.json").data.tokenizer == str(folder / "same.json")
    assert open_pretrained(str(run)).adapt(Config()).data.tokenizer == str(run / "tokenizer.json")
    assert open_pretrained(str(origin)).adapt(Config()).data.tokenizer == str(origin)
    named = Config(data=DataConfig(tokenizer=str(folder / "same.json")))
    assert open_pretrained(str(origin)).adapt(named).data.tokenizer == str(folder / "same.json")


def state_of(run_dir):
    """Every array of a run's latest checkpoint, its step, and every loss but their times."""
    config, device = Config.from_json(run_dir / "config.json"), jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
        jax.eval_shape(lambda: init_state(config)),
    )
    checkpoints = Checkpoints(run_dir / "checkpoints" / "latest", read_only=True)
    trees, _ = checkpoints.restore(params=abstract.params, opt_state=abstract.opt_state)
    metrics = read_metrics(run_dir / "metrics.csv")
    return checkpoints.step, trees, [metrics[name] for name in ("step", "train_loss", "val_loss", "grad_norm")]


def assert_same_run(one, other):
    (step, trees, metrics), (other_step, other_trees, other_metrics) = state_of(one), state_of(other)
    assert step == other_step == 4
    jax.tree.map(np.testing.assert_array_equal, trees, other_trees)
    np.testing.assert_array_equal(metrics, other_metrics)


def test_a_run_resumes_bit_for_bit(train, folder, run, stopped):
    shutil.copytree(stopped, folder / "resumed")
    assert train("--resume", "--out_dir", folder / "resumed") == 0
    assert_same_run(folder / "resumed", run)


def test_a_run_resumes_without_its_origin(train, folder, origin, run, stopped):
    shutil.copytree(stopped, folder / "orphan")
    gone = origin.rename(folder / "gone")
    try:
        assert train("--resume", "--out_dir", folder / "orphan") == 0
    finally:
        gone.rename(origin)
    assert_same_run(folder / "orphan", run)


def arrays(tree):
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in tree}


@pytest.mark.parametrize("block_size", [BLOCK, 5])
def test_of_more_positions_the_first_ones_are_taken_and_all_else_as_it_is(run, origin, scramble, block_size):
    for path, whole in ((origin, scramble(CONFIG)), (run, load_run(run, "best")[1])):
        source = open_pretrained(str(path))
        config = source.adapt(Config(model=ModelConfig(block_size=block_size))).model
        abstract = with_shardings(one_device(), jax.eval_shape(lambda config=config: draw_params(config, 0)))
        loaded, wanted = [
            arrays(jax.tree_util.tree_leaves_with_path(tree)) for tree in (source.load(config, abstract, 0), whole)
        ]
        wanted["position_embedding"] = wanted["position_embedding"][:block_size]
        assert loaded.keys() == wanted.keys()
        for name in wanted:
            np.testing.assert_array_equal(loaded[name], wanted[name], err_msg=name)


def test_what_training_alone_needs_is_the_runs_own(origin):
    own = {"dropout": 0.2, "dtype": "bfloat16", "lora_rank": 3, "lora_alpha": 5.0, "lora_layers": "query,up"}
    same = {"bias": True, "vocab_size": len(LETTERS)}
    adapted = open_pretrained(str(origin)).adapt(Config(model=ModelConfig(block_size=9, **own, **same))).model
    assert adapted == replace(CONFIG, block_size=9, **own)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model.block_size", BLOCK + 1], f"model.block_size=17 is longer than this checkpoint's {BLOCK} positions"),
        (["--model.n_layer", "3"], "model.n_layer=3 is not what the checkpoint has (1); leave it out"),
        (["--model.position", "rope"], "model.position=rope is not what the checkpoint has (learned)"),
        (["--model.vocab_size", "9"], f"model.vocab_size=9 is not what the checkpoint has ({len(LETTERS)})"),
        (["--data.tokenizer", "other.json"], "was made with another tokenizer than the weights of"),
        (["--data.tokenizer", "large.json"], "was made with another tokenizer than the weights of"),
        (["--init_from", "no such model"], "'no such model' does not exist"),
        (["--init_from", "empty"], "empty has no config.json"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_no_run(train, folder, origin, options, monkeypatch, arguments, words):
    monkeypatch.chdir(folder)
    Path("empty").mkdir(exist_ok=True)
    tokenizer_of(LETTERS[::-1]).save(Path("other.json"))
    tokenizer_of(LETTERS + "".join(map(chr, range(0x100, 0x100 + 64 - len(LETTERS))))).save(Path("large.json"))
    with pytest.raises(UserError) as raised:
        train(*options, "--init_from", origin, "--out_dir", "new", *arguments)
    assert words in str(raised.value) and "\n" not in str(raised.value)
    assert not Path("new").exists()


def test_a_resumed_run_keeps_its_architecture(train, stopped):
    for arguments in (["--model.n_layer", "3"], ["--model.block_size", "8"], ["--init_from", stopped]):
        with pytest.raises(UserError, match="checkpoint has|cannot resume with"):
            train("--resume", "--out_dir", stopped, *arguments)
