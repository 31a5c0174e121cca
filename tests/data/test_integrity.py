"""Token files are read whole once, and no change of them passes unnoticed."""

import json
import os

import numpy as np
import pytest

from gptjax.config import DataConfig
from gptjax.data import integrity, load_dataset
from gptjax.data.integrity import RECORD, contents
from gptjax.data.token_files import UINT16, UINT32, open_split, write_tokens
from gptjax.errors import UserError
from gptjax.tokenizer import Tokenizer


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Token files of others: a hundred thousand ids below 4, in blocks of a thousand, and their tokenizer."""
    monkeypatch.setattr(integrity, "_BLOCK", 1000)
    for name, n in (("train.bin", 100_000), ("val.bin", 100)):
        write_tokens(tmp_path / name, [np.arange(n) % 4], UINT16)
    Tokenizer.characters("abcd").save(tmp_path / "tokenizer.json")
    return tmp_path


def load(folder):
    return load_dataset(DataConfig(source=str(folder)))


def change(path, place, token):
    """Write one id, and set the file's time back."""
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    with open(path, "r+b") as file:
        file.seek(2 * place)
        file.write(np.array(token, "<u2").tobytes())
    os.utime(path, ns=times)


def test_any_change_of_tokens_or_vocabulary_changes_the_fingerprint_and_old_ones_still_match(folder):
    before = load(folder)
    assert before.matches(before.fingerprint()) and before.matches(before.fingerprint().split(":")[0])
    original = (folder / "train.bin").read_bytes()
    change(folder / "train.bin", 50_001, 3)
    assert not load(folder).matches(before.fingerprint())
    (folder / "train.bin").write_bytes(original)
    assert load(folder).fingerprint() == before.fingerprint()
    Tokenizer.characters("abce").save(folder / "tokenizer.json")
    assert not load(folder).matches(before.fingerprint())


@pytest.mark.parametrize("token", [4, 60_000, 2**31, 2**32 - 1])
def test_one_id_past_the_vocabulary_is_found_and_its_place_named(folder, token):
    ids = np.arange(100_000) % 4
    ids[70_123] = token
    write_tokens(folder / "train.bin", [ids], UINT32 if token > 2**16 else UINT16, header=True)
    dataset = load(folder)
    with pytest.raises(UserError, match=rf"train\.bin holds id {token} as token 70,123, but the vocabulary has 4"):
        dataset.require(8)
    dataset.require(8, vocab_size=token + 1)


def test_a_file_is_read_again_only_after_it_changed_and_a_damaged_record_is_no_matter(folder, monkeypatch):
    tokens = open_split(folder, "train")
    first = contents(tokens.files())
    for damage in (None, "", "[]", "{}", json.dumps({"train.bin": [1, 2]}), json.dumps({"train.bin": [[], 1, 2]})):
        if damage is not None:
            (folder / RECORD).write_text(damage)
            assert contents(tokens.files()) == first
        with monkeypatch.context() as patch:
            patch.setattr(integrity, "_part", lambda ids: pytest.fail("read again"))
            assert contents(tokens.files()) == first


def test_a_large_vocabulary_has_wide_tokens(folder):
    Tokenizer.from_characters({chr(0x10000 + i): i for i in range(70_000)}).save(folder / "tokenizer.json")
    for name in ("train.bin", "val.bin"):
        (folder / name).write_bytes(np.arange(69_000, 70_000, dtype="<u4").tobytes())
    assert load(folder).train.window(0, 3).tolist() == [69_000, 69_001, 69_002]
