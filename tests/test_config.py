"""Config: types and values are checked where a config is built, and each mistake is one line that names the field."""

import contextlib
import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.cli import Parser, load_config_file
from gptjax.config import SECTIONS, Config, DataConfig, MeshConfig, ModelConfig, TrainConfig, flat
from gptjax.errors import UserError

PARSER = Parser("train.py", "")
PARSER.add_fields(Config())


def parse(*argv):
    return PARSER.parse(argv, Config())[0]


def require_error(call, *words):
    with pytest.raises(UserError) as error:
        call()
    message = str(error.value)
    assert all(word in message for word in words) and "\n" not in message, message


def test_the_command_line_overrides_fields_of_every_type():
    config = parse(
        "--train.max_steps", "30", "--model.bias", "true", "--optimizer.decay_steps=none", "--data.source", "a b.txt",
        "--optimizer.learning_rate", "3e-4", "--data.order", "epoch", "--mesh.fsdp", "-1", "--mesh.data", "2",
    )  # fmt: skip
    assert config.train.max_steps == 30 and config.model.bias is True and config.optimizer.decay_steps is None
    assert config.data.source == "a b.txt" and config.optimizer.learning_rate == 3e-4 and config.data.order == "epoch"
    assert (config.mesh.fsdp, config.mesh.data) == (-1, 2)
    assert config.train == dataclasses.replace(Config().train, max_steps=30)  # and nothing else


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--model.n_layers 3", ["--model.n_layers", "did you mean --model.n_layer?"]),
        ("--train.max-steps=3", ["--train.max-steps", "did you mean --train.max_steps?"]),
        ("--max_steps 3", ["--max_steps", "did you mean --train.max_steps?"]),
        ("--model.n_layer x", ["--model.n_layer", "'x'", "integer"]),
        ("--model.bias perhaps", ["--model.bias", "'perhaps'", "true or false"]),
        ("--data.order backwards", ["--data.order", "'backwards'", "random or epoch"]),
        ("--train.max_steps", ["--train.max_steps", "expected one argument"]),
        ("--model.n_embd 100", ["model.n_embd=100", "model.n_head=6", "96 or 102"]),
        ("--train.batch_size 10 --train.accumulate 4", ["train.batch_size=10", "train.accumulate=4"]),
        ("--optimizer.min_learning_rate 1", ["optimizer.min_learning_rate=1.0", "optimizer.learning_rate=0.001"]),
        ("--optimizer.decay_fraction 0", ["optimizer.decay_fraction=0.0", "(0, 1]"]),
        ("--optimizer.muon_learning_rate 0", ["optimizer.muon_learning_rate=0.0", "not positive"]),
        ("--optimizer.matrix_optimizer muon --model.lora_rank 4", ["matrix_optimizer='muon'", "LoRA", "adamw"]),
        ("--model.logit_cap -15", ["model.logit_cap=-15.0", "negative"]),
        ("--mesh.fsdp -1", ["mesh.", "second -1"]),
        ("--train.seed -3", ["train.seed=-3"]),
        ("--train.batch_size 999999999999", ["train.batch_size=999999999999", "[1, 16,777,216]"]),
        ("--model.n_layer 1000000000000", ["model.n_layer=1000000000000", "[1, 10,000]"]),
        ("--train.max_steps 99999999999999999999999", ["train.max_steps=99999999999999999999999"]),
        ("--optimizer.learning_rate inf", ["optimizer.learning_rate=inf", "float32"]),
        ("--optimizer.grad_clip nan", ["optimizer.grad_clip=nan", "float32"]),
        ("--data.dir ~nobody_of_this_name/x", ["data.dir='~nobody_of_this_name/x'", "home"]),
        ("stray", ["stray"]),
    ],
)
def test_mistakes_on_the_command_line_name_the_option(arguments, words):
    require_error(lambda: parse(*arguments.split()), *words)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: ModelConfig(n_layer="4"), ["model.n_layer='4'", "integer"]),
        (lambda: ModelConfig(n_layer=True), ["model.n_layer=True", "integer"]),
        (lambda: ModelConfig(dtype="int8"), ["model.dtype='int8'", "bfloat16"]),
        (lambda: ModelConfig(attention_dropout=-0.1), ["model.attention_dropout=-0.1"]),
        (lambda: ModelConfig(dropout=0.1, attention="blockwise"), ["model.attention=", "--model.attention_dropout 0"]),
        (lambda: DataConfig(val_fraction=1), ["data.val_fraction=1"]),
        (lambda: MeshConfig(data=0), ["mesh.data=0"]),
        (lambda: Config(model=DataConfig()), ["model="]),
    ],
)
def test_mistakes_in_python_name_the_field(build, words):
    require_error(build, *words)
    assert ModelConfig(dropout=0).dropout == 0, "an integer serves as a number"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("config = Config(model=ModelConfig(n_layers=4))", ["line 2", "ModelConfig", "did you mean n_layer?"]),
        ("config = Config(model=ModelConfig(n_layer='x'))", ["line 2", "model.n_layer='x'"]),
        ("config = 3", ["builds no"]),
        ("config = Config(", ["SyntaxError"]),
        ("import nonesuch", ["line 2", "nonesuch"]),
        ("raise SystemExit", ["line 2", "SystemExit"]),
        ("class Odd(BaseException):\n    def __str__(self): return 1 / 0\nraise Odd", ["line 4", "Odd"]),
        ("def f(): f()\nf()", ["RecursionError"]),
        ("\0", ["null bytes"]),
    ],
)
def test_mistakes_in_a_config_file_name_the_file_and_line(tmp_path, text, words):
    path = tmp_path / "mine.py"
    path.write_text(f"from gptjax.config import *\n{text}\n")
    require_error(lambda: load_config_file(path), str(path), *words)
    require_error(lambda: load_config_file(tmp_path / "min.py"), "no config file", "min.py; did you mean", "mine.py?")


def test_json_round_trip_and_its_mistakes(tmp_path):
    config, path = Config(model=ModelConfig(n_layer=3), data=DataConfig(sha256="ab")), tmp_path / "config.json"
    path.write_text(config.to_json())
    assert Config.from_json(path) == config
    for text in ("{", '{"model": {"depth": 3}}', '{"nonesuch": {}}', "[]", '{"model": 3}'):
        path.write_text(text)
        require_error(lambda: Config.from_json(path), str(path))
    require_error(lambda: Config.from_json(tmp_path / "nowhere.json"), "No such file")


def test_a_leading_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse("--data.source=~/a.txt").data.source == str(tmp_path / "a.txt")
    assert parse("--data.source=a~/~").data.source == "a~/~"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.sampled_from([*SECTIONS]), inner),
    max_leaves=4,
)
FIELDS = st.sampled_from([name.split(".") for name in flat(Config()) if "." in name])
VALUES = st.integers() | st.floats() | st.text() | st.sampled_from(["none", "true", "-1", "1e400", "~", "gpt2"])


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(FIELDS, JSON), max_size=3), JSON)
def test_any_config_json_is_a_config_or_one_line(tmp_path_factory, changes, other):
    path, sections = tmp_path_factory.getbasetemp() / "config.json", dataclasses.asdict(Config())
    for (section, field), value in changes:
        sections[section][field] = value
    for values in (sections, sections | {"model": other}, other):
        path.write_text(json.dumps(values))
        try:
            assert isinstance(Config.from_json(path), Config)
        except UserError as error:
            assert str(path) in str(error)


@settings(deadline=None)
@given(st.lists(st.tuples(FIELDS.map(".".join) | st.text(), VALUES | st.none())))
def test_any_command_line_is_a_config_or_one_line(arguments):
    argv = [word for name, value in arguments for word in (f"--{name}", value) if word is not None]
    with contextlib.suppress(UserError):
        assert isinstance(parse(*map(str, argv)), Config)


def test_every_shipped_config_loads_and_has_its_command():
    for path in sorted(Path(__file__).parent.parent.glob("configs/*.py")):
        load_config_file(path)
        docstring = path.read_text().split('"""')[1]
        assert f"python train.py --config configs/{path.name}" in docstring, path


def test_recipes_that_are_compared_have_one_budget(monkeypatch):
    root = Path(__file__).parent.parent
    monkeypatch.syspath_prepend(str(root))
    from benchmarks.recipes import BASELINE, MODERN, parameters, scaled

    recipes = [load_config_file(root / "configs" / f"{name}.py") for name in (BASELINE, MODERN)]
    assert recipes[0].data == recipes[1].data and recipes[0].train == recipes[1].train
    train, model = recipes[0].train, dataclasses.replace(recipes[0].model, vocab_size=50257)
    # FineWeb-Edu's sample/10BT has 9,953,989,344 of GPT-2's tokens, of which 0.05% are for validation.
    assert 0.99 < train.max_steps * train.batch_size * model.block_size / (0.9995 * 9_953_989_344) <= 1
    assert parameters(dataclasses.replace(recipes[0], model=model)) == 124_475_904  # GPT-2's, in 50,304 rows
    small = [scaled(config, 200, 8) for config in recipes]
    sizes = [parameters(config) for config in small]
    assert min(sizes) > 0.98 * max(sizes) > 1e7 and small[0].train == small[1].train and small[0].data == small[1].data
    for config, made in zip(recipes, small, strict=True):
        found, kept = flat(made), flat(config)
        changed = {name for name in found if name.startswith(("model.", "optimizer.")) and found[name] != kept[name]}
        halved = {f"model.{name}" for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "dtype")}
        assert changed - {"optimizer.warmup_steps"} == halved


def test_large_vocabularies_are_padded_to_multiples_of_128():
    for vocab_size, padded in ((65, 65), (1023, 1023), (1024, 1024), (1025, 1152), (50257, 50304)):
        assert ModelConfig(vocab_size=vocab_size).padded_vocab_size == padded


def test_the_run_evaluates_at_its_interval_and_at_its_end():
    train = TrainConfig(max_steps=10, eval_interval=4)
    assert [step for step in range(11) if train.evaluates(step)] == [0, 4, 8, 10]


def test_help_explains_every_field():
    parser = Parser("train.py", "")
    parser.add_fields(Config())
    text = parser.format_help()
    assert "--init_from " in text
    for name, section in SECTIONS.items():
        for field in dataclasses.fields(section):
            assert f"--{name}.{field.name} " in text and field.metadata["help"]
