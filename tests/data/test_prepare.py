"""From a text, or the token files of others, to a data set; and the command line that does it by hand."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptjax.config import DataConfig
from gptjax.data import Dataset, corpora, load_dataset
from gptjax.data.__main__ import main
from gptjax.data.token_files import UINT16, write_tokens
from gptjax.errors import UserError
from gptjax.files import LOCK, locked
from gptjax.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
TEXT = "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak. Naïve 😀!\n\n" * 40


@pytest.fixture
def config(tmp_path) -> DataConfig:
    (tmp_path / "input.txt").write_text(TEXT, encoding="utf-8")
    return DataConfig(source=str(tmp_path / "input.txt"), dir=str(tmp_path / "data"), vocab_size=300)


def with_(config: DataConfig, **fields: object) -> DataConfig:
    return DataConfig(**(vars(config) | fields))


def text_of(dataset: Dataset, split: str) -> str:
    tokens = getattr(dataset, split)
    return dataset.tokenizer.decode(tokens.window(0, len(tokens)))


@pytest.mark.parametrize("tokenizer, val_fraction", [("char", 0.1), ("char", 0.5), ("bpe", 0.05)])
def test_the_splits_are_the_text_cut_by_characters(config, monkeypatch, tokenizer, val_fraction):
    monkeypatch.setattr(corpora, "_CHUNK", 64)  # so that a split begins inside a chunk, and ends inside another
    dataset = load_dataset(with_(config, tokenizer=tokenizer, val_fraction=val_fraction))
    n = int(len(TEXT) * (1 - val_fraction))
    assert text_of(dataset, "train") == TEXT[:n] and text_of(dataset, "val") == TEXT[n:]
    if tokenizer == "bpe":  # trained on the training split only
        Path(config.source).write_text(TEXT[:n] + "zyx " * ((len(TEXT) - n) // 4), encoding="utf-8")
        tokenizer = load_dataset(with_(config, tokenizer="bpe", val_fraction=val_fraction)).tokenizer
        assert len(tokenizer.encode("zyx")) == 3 and len(tokenizer.encode("Citizen")) < 4


def test_tiny_shakespeare_is_nanogpts_to_the_bit(tmp_path):
    path = Path(os.environ.get("GPTJAX_TEST_DATA", ROOT.parent / "shared" / "data"), "tinyshakespeare.txt")
    if not path.exists():
        pytest.skip(f"{path} does not exist; GPTJAX_TEST_DATA names the folder of it")
    dataset = load_dataset(DataConfig(source=str(path), dir=str(tmp_path)))
    assert (len(dataset.train), len(dataset.val), dataset.tokenizer.vocab_size) == (1_003_854, 111_540, 65)
    data = path.read_text(encoding="utf-8")
    stoi = {character: i for i, character in enumerate(sorted(set(data)))}
    ids = np.array([stoi[character] for character in data], np.uint16)
    assert (dataset.folder / "train.bin").read_bytes() == ids[: int(len(data) * 0.9)].tobytes()
    assert (dataset.folder / "val.bin").read_bytes() == ids[int(len(data) * 0.9) :].tobytes()


def test_what_is_prepared_is_used_again_until_its_text_changes(config, tmp_path, capsys):
    first = load_dataset(config)
    assert "prepared" in capsys.readouterr().out
    again = load_dataset(config)
    assert "reused" in capsys.readouterr().out and again.folder == first.folder
    assert again.fingerprint() == first.fingerprint()
    (tmp_path / "input.txt").write_text(TEXT + "More.", encoding="utf-8")
    changed = load_dataset(config)
    assert changed.folder == first.folder and changed.fingerprint() != first.fingerprint()
    assert text_of(changed, "train") + text_of(changed, "val") == TEXT + "More."
    assert text_of(first, "train") + text_of(first, "val") == TEXT  # open files outlive their folder
    assert sorted(path.name for path in Path(config.dir).iterdir()) == [first.folder.name]


def test_other_settings_have_other_folders_and_a_changed_tokenizer_prepares_again(config, tmp_path):
    Tokenizer.characters(TEXT).save(tmp_path / "tokenizer.json")
    own = with_(config, tokenizer=str(tmp_path / "tokenizer.json"))
    variants = [
        config,
        with_(config, val_fraction=0.2),
        with_(config, tokenizer="bpe"),
        with_(config, tokenizer="bpe", vocab_size=310),
        own,
    ]
    before = [load_dataset(variant) for variant in variants]
    assert len({dataset.folder for dataset in before}) == len(variants)
    assert load_dataset(with_(config, vocab_size=310)).folder == before[0].folder  # no matter for characters
    Tokenizer.characters(TEXT + "0123").save(tmp_path / "tokenizer.json")
    after = load_dataset(own)
    assert after.tokenizer.vocab_size == before[-1].tokenizer.vocab_size + 4
    assert after.fingerprint() != before[-1].fingerprint() and text_of(after, "train") == text_of(before[-1], "train")


def test_a_preparation_that_fails_leaves_nothing(config, tmp_path):
    Tokenizer.characters("abc").save(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match=r"'F' \(U\+0046\)"):
        load_dataset(with_(config, tokenizer=str(tmp_path / "tokenizer.json")))
    assert list(Path(config.dir).iterdir()) == []


@pytest.mark.parametrize("name, size", [("train.bin", 1000), ("val.bin", 0), ("tokenizer.json", 0), ("train.bin", -2)])
def test_a_prepared_file_that_changed_is_named(config, name, size):
    path = load_dataset(config).folder / name
    data = path.read_bytes()
    path.write_bytes(data[:size] if size >= 0 else data[::-1])
    for source in (config.source, str(path.parent)):
        with pytest.raises(UserError, match=rf"{path.parent}.* delete {path.parent} to make it again"):
            load_dataset(with_(config, source=source))
    shutil.rmtree(path.parent)
    load_dataset(config)


def test_what_a_killed_preparation_left_is_removed_but_nothing_of_a_live_one(config):
    dead, live = (Path(config.dir, f".{name}-0123abcd-0123abcd") for name in "xy")
    others = Path(config.dir, ".others-0123abcd")
    for each in (dead, others):
        each.mkdir(parents=True)
        (each / LOCK).touch()
    with locked(live):
        folder = load_dataset(config).folder
        assert set(Path(config.dir).iterdir()) == {live, others, folder}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda each: st.lists(each) | st.dictionaries(st.text(), each),
)


@given(st.dictionaries(st.sampled_from(["dtype", "parts", "made_from", "digests", "train_tokens", "characters"]), JSON))
@settings(deadline=None, max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_data_json_of_any_shape_is_made_again_or_refused_in_a_line(config, fields):
    folder = load_dataset(config).folder
    whole = (folder / "data.json").read_text()
    (folder / "data.json").write_text(json.dumps(json.loads(whole) | fields))
    for source in (config.source, str(folder)):
        with contextlib.suppress(UserError):
            load_dataset(with_(config, source=source))
    (folder / "data.json").write_text(whole)


def test_the_other_preparation_may_be_first_at_the_last_moment(config, monkeypatch):
    rename = os.rename

    def late(made, folder):
        shutil.copytree(made, folder)
        rename(made, folder)

    monkeypatch.setattr(os, "rename", late)
    dataset = load_dataset(config)
    assert text_of(dataset, "train") + text_of(dataset, "val") == TEXT
    assert [path.name for path in Path(config.dir).iterdir()] == [dataset.folder.name]


def test_a_text_too_short_to_split_and_a_dir_that_is_a_file_are_refused(config, tmp_path):
    for folder in (config.source, config.source + "/below"):
        with pytest.raises(UserError, match="--data.dir"):
            load_dataset(with_(config, dir=folder))
    for text in ("", "a"):
        (tmp_path / "input.txt").write_text(text)
        with pytest.raises(UserError, match="empty"):
            load_dataset(config)


def test_a_split_shorter_than_a_block_is_named_with_the_fix(config, tmp_path):
    (tmp_path / "input.txt").write_text("abcdefghij" * 10)
    dataset = load_dataset(config)
    dataset.require(89)
    with pytest.raises(UserError, match=r"train split .* 90 tokens; block_size=90 needs 91: .*--model.block_size"):
        dataset.require(90)
    with pytest.raises(UserError, match="val split .* 1 tokens"):
        load_dataset(with_(config, val_fraction=0.01)).require(8)


def test_memory_stays_bounded_on_a_large_text(tmp_path):
    path = tmp_path / "large.txt"
    path.write_text("Speak, speak. Naïve and long enough to count.\n" * 350_000, encoding="utf-8")
    tracemalloc.start()
    dataset = load_dataset(DataConfig(source=str(path), dir=str(tmp_path)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(dataset.train) > 14_000_000 and peak < 4_000_000
    shutil.rmtree(tmp_path)  # pytest would keep 50 MB


def test_nanogpts_token_files_take_the_tokenizer_that_is_named(tmp_path):
    write_tokens(tmp_path / "train.bin", [np.array([0, 1, 2, 3, 0])], UINT16)
    write_tokens(tmp_path / "val.bin", [np.array([1, 1])], UINT16)
    config = DataConfig(source=str(tmp_path))
    with pytest.raises(UserError, match="--data.tokenizer gpt2"):
        load_dataset(config)
    Tokenizer.characters("wxyz").save(tmp_path / "other.json")
    assert text_of(load_dataset(with_(config, tokenizer=str(tmp_path / "other.json"))), "val") == "xx"
    (tmp_path / "meta.pkl").touch()
    with pytest.raises(UserError, match="--data.source .*input.txt"):
        load_dataset(config)


def test_llm_cs_shards_are_used_as_they_are_and_a_damaged_data_json_is_named(tmp_path):
    for split, n in (("fineweb_train", 25), ("fineweb_val", 7)):
        for i in range(0, n, 10):
            write_tokens(tmp_path / f"{split}_{i:06}.bin", [np.arange(i, min(i + 10, n))], UINT16, header=True)
    Tokenizer.characters("ab").save(tmp_path / "tokenizer.json")
    dataset = load_dataset(DataConfig(source=str(tmp_path)))
    assert len(dataset.train.paths) == 3 and dataset.train.window(0, 99).tolist() == list(range(25))
    assert dataset.val.window(0, 99).tolist() == list(range(7))
    for damage in (b"{", b"\xff", b"[]", b'{"dtype": "float32"}', b'{"dtype": []}', b'{"parts": "3"}'):
        (tmp_path / "data.json").write_bytes(damage)
        with pytest.raises(UserError, match="data.json"):
            load_dataset(DataConfig(source=str(tmp_path)))


def test_the_command_prepares_and_says_what_it_made(config, capsys):
    main([config.source, "--tokenizer", "bpe", "--vocab_size", "280", "--dir", config.dir])
    output = capsys.readouterr().out
    (folder,) = Path(config.dir).iterdir()
    for part in (str(folder), f"{len(TEXT):,} characters", "vocabulary 280", "train ", "val "):
        assert part in output
    assert json.loads((folder / "data.json").read_text())["format"] == "nanogpt"
    dataset = load_dataset(DataConfig(source=str(folder)))
    assert text_of(dataset, "train") + text_of(dataset, "val") == TEXT
    with pytest.raises(UserError, match="token files already"):
        main([str(folder)])


def test_mistakes_are_one_line_and_exit_code_2_and_help_is_for_every_command(tmp_path, capsys):
    for arguments in ("", "none.txt", "x --vocab_size many", "x --vocab_size 3", "x --what"):
        with pytest.raises(UserError):
            main(arguments.split())
    command = [sys.executable, "-m", "gptjax.data", "no"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: text file 'no'") and done.stderr.count("\n") == 1
    for command in (["--help"], ["tokenize", "--help"]):
        with pytest.raises(SystemExit, match="0"):
            main(command)
        assert f"gptjax data {' '.join(command[:-1])}".strip() in capsys.readouterr().out
