"""Token files: nanoGPT's and llm.c's, written whole or not at all, read as one sequence from a disk or a bucket."""

import errno
import itertools
import re
from pathlib import Path

import fsspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptjax.config import DataConfig
from gptjax.data import load_dataset
from gptjax.data.batches import windows
from gptjax.data.token_files import UINT16, UINT32, Tokens, dtype_for, open_split, write_tokens
from gptjax.errors import UserError
from gptjax.tokenizer import Tokenizer


@pytest.fixture
def bucket(monkeypatch):
    """An empty bucket; its filesystem, which notes every call of `cat_ranges` and fails as it is told."""
    files = fsspec.filesystem("memory")
    files.store.clear()
    files.calls, files.failures = [], []
    plain = type(files).cat_ranges

    def cat_ranges(paths, starts, ends, **options):
        files.calls.append(len(paths))
        change = files.failures.pop() if files.failures else lambda data: data
        if isinstance(change, Exception):
            raise change
        return [change(data) for data in plain(files, paths, starts, ends, **options)]

    monkeypatch.setattr(files, "cat_ranges", cat_ranges, raising=False)
    return files


def copy_to(bucket, folder: Path) -> str:
    for path in folder.iterdir():
        bucket.pipe_file(f"/bucket/run/{path.name}", path.read_bytes())
    return "memory://bucket/run"


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(any),
    starts=st.lists(st.integers(0, 260), max_size=5),
    length=st.integers(0, 60),
    header=st.booleans(),
    dtype=st.sampled_from([UINT16, UINT32]),
)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
def test_shards_read_as_one_sequence_from_a_disk_and_a_bucket(tmp_path, bucket, lengths, starts, length, header, dtype):
    for path in tmp_path.iterdir():
        path.unlink()
    bucket.store.clear()
    ids = np.arange(sum(lengths)) * (1000 if dtype == UINT32 else 100)
    for number, shard in enumerate(np.split(ids, np.cumsum(lengths)[:-1])):
        assert write_tokens(tmp_path / f"train_{number:06}.bin", [shard], dtype, header=header) == len(shard)
    (tmp_path / "data.json").write_text(f'{{"dtype": "{dtype.name}"}}')
    local, distant = open_split(tmp_path, "train"), open_split(copy_to(bucket, tmp_path), "train")
    assert len(local) == len(distant) == len(ids) and local.dtype == distant.dtype == dtype
    assert local.fingerprint() == distant.fingerprint()
    expected = [ids[start : start + length].tolist() for start in starts]
    bucket.calls.clear()
    for tokens in (local, distant):
        assert [window.tolist() for window in tokens.windows(starts, length)] == expected
    assert len(bucket.calls) <= 1  # however many windows
    for tokens, (start, window) in itertools.product((local, distant), zip(starts, expected, strict=True)):
        assert tokens.window(start, length).tolist() == window


def test_a_flat_file_is_nanogpts_bytes_and_nothing_else(tmp_path):
    ids = np.array([0, 65535, 50256], np.int32)
    assert write_tokens(tmp_path / "train.bin", iter([ids[:1], ids[1:]]), UINT16) == 3
    assert (tmp_path / "train.bin").read_bytes() == np.array(ids, "<u2").tobytes()
    window = open_split(tmp_path, "train").window(0, 9)
    assert window.tolist() == ids.tolist()
    with pytest.raises(ValueError, match="read-only"):
        window[0] = 1


@pytest.mark.parametrize("dtype, magic", [(UINT16, [20240520, 1]), (UINT32, [20240801, 7])], ids=str)
def test_a_shard_is_llm_cs_header_and_tokens(tmp_path, dtype, magic):
    assert write_tokens(tmp_path / "val.bin", [np.arange(3), np.arange(3, 12)], dtype, header=True) == 12
    data = (tmp_path / "val.bin").read_bytes()
    assert np.frombuffer(data[:1024], "<i4").tolist() == [*magic, 12] + [0] * 253
    assert data[1024:] == np.arange(12, dtype=dtype).tobytes()


def test_the_manifest_says_that_a_flat_file_is_wide(tmp_path):
    write_tokens(tmp_path / "train.bin", [np.array([70_000, 1])], UINT32)
    assert open_split(tmp_path, "train").window(0, 9).tolist() == [70_000 - 65_536, 1, 1, 0]
    (tmp_path / "data.json").write_text('{"dtype": "uint32"}')
    assert open_split(tmp_path, "train").window(0, 9).tolist() == [70_000, 1]
    assert [dtype_for(n) for n in (65, 50257, 65536, 65537)] == [UINT16, UINT16, UINT16, UINT32]


def test_damaged_files_are_named(tmp_path, bucket):
    def file(header: list[int], n_bytes: int) -> bytes:
        return np.array(header + [0] * (256 - len(header)), "<i4").tobytes() + bytes(n_bytes)

    narrow, wide = [20240520, 1, 9], [20240801, 7, 9]
    negative, no_header = file([20240520, 1, -1], 0), file([20240520, 1, 0], 0)[:500]
    for data in (b"abc", file(narrow, 17), file(narrow, 20), file(wide, 18), negative, no_header):
        (tmp_path / "train.bin").write_bytes(data)
        for folder in (tmp_path, copy_to(bucket, tmp_path)):
            with pytest.raises(UserError, match=rf"{folder}/train\.bin .*copy it again"):
                open_split(folder, "train")


@pytest.mark.parametrize(
    "data, complaint",
    {
        np.full(99, 7, "<u4").tobytes(): r'ids of 32 bits, not uint16: state it as {"dtype": "uint32"} in a data.json',
        np.full(99, 7, "<i8").tobytes(): "ids of 64 bits, not uint16: write it as uint16 or uint32",
        np.array([20240520, 3] + [0] * 256, "<i4").tobytes(): "header in version 3, not 1",
        b"\x93NUMPY\1\0": "no token file",
        b"version https://git-lfs.github.com/spec/v1\n": "no token file",
    }.items(),
    ids=["32 bits", "64 bits", "version", "NumPy", "LFS"],
)
def test_flat_files_of_something_else_are_named(tmp_path, data, complaint):
    (tmp_path / "train.bin").write_bytes(data)
    with pytest.raises(UserError, match=rf"train\.bin .*{re.escape(complaint)}"):
        open_split(tmp_path, "train")


def test_a_shard_belongs_to_one_split_and_hidden_ones_to_none(tmp_path):
    for name in ("x_train_0.bin", "x_val_0.bin", "._x_train_0.bin"):
        write_tokens(tmp_path / name, [np.arange(9)], UINT16, header=True)
    assert [path.name for path in open_split(tmp_path, "train").paths] == ["x_train_0.bin"]
    (tmp_path / "x_val_0.bin").rename(tmp_path / "trained_val_0.bin")
    for split in ("train", "val"):
        with pytest.raises(UserError, match="trained_val_0.bin fits both"):
            open_split(tmp_path, split)


def test_files_that_are_missing_or_mixed_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train\.bin"):
        Tokens([tmp_path / "train.bin"])
    write_tokens(tmp_path / "a.bin", [np.arange(3)], UINT16, header=True)
    write_tokens(tmp_path / "b.bin", [np.arange(3)], UINT32, header=True)
    with pytest.raises(UserError, match="two folders"):
        Tokens([tmp_path / "a.bin", tmp_path / "b.bin"])


def test_the_fingerprint_is_of_the_tokens_at_both_ends_wherever_they_lie(tmp_path):
    def fingerprint(ids: np.ndarray, name: str = "train.bin", n_shards: int = 1) -> str:
        write_tokens(tmp_path / name, [ids], UINT16)
        return Tokens([tmp_path / name] * n_shards).fingerprint()

    def one_at(place: int, n_shards: int = 1) -> str:
        return fingerprint(np.arange(2_000_000) == place, n_shards=n_shards)

    assert fingerprint(np.array([1, 2])) == fingerprint(np.array([1, 2]), "other") != fingerprint(np.array([1, 2, 0]))
    assert len({one_at(place) for place in (0, 1, 600_000, 1_999_999)}) == 4
    assert one_at(500_000) != one_at(600_000) == one_at(700_000)  # a MiB is 524,288 tokens
    assert one_at(500_000, 128) == one_at(600_000, 128) != one_at(200_000, 128)  # half as many


@pytest.mark.parametrize("header", [False, True])
def test_a_disk_that_is_full_leaves_the_old_file_and_an_error_with_its_number(tmp_path, header):
    resource = pytest.importorskip("resource")
    write_tokens(tmp_path / "train.bin", [np.arange(5)], UINT16, header=header)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(OSError) as error:
            write_tokens(tmp_path / "train.bin", [np.arange(100_000)], UINT16, header=header)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.value.errno == errno.EFBIG
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# In a bucket


def prepared(tmp_path: Path) -> Path:
    """A folder as it is copied to a bucket: shards, their tokenizer and a manifest."""
    folder = tmp_path / "prepared"
    folder.mkdir()
    for split, i in itertools.product(("train", "val"), range(3)):
        ids = np.arange(250)[100 * i : 100 * (i + 1)] % 7
        write_tokens(folder / f"{split}_{i:06}.bin", [ids], UINT16, header=True)
    Tokenizer.characters("abcdefg").save(folder / "tokenizer.json")
    (folder / "data.json").write_text('{"dtype": "uint16", "parts": 3}')
    return folder


@pytest.mark.parametrize("url", ["memory", "file"])
def test_a_data_set_opens_from_a_url_as_from_a_folder(tmp_path, bucket, url):
    folder = prepared(tmp_path)
    source = copy_to(bucket, folder) + "/" if url == "memory" else f"file://{folder}"
    local, distant = (load_dataset(DataConfig(source=str(each))) for each in (folder, source))
    assert distant.matches(local.fingerprint()) and local.matches(distant.fingerprint())
    assert distant.folder == source.rstrip("/")
    assert distant.tokenizer.to_json() == local.tokenizer.to_json()
    starts = np.array([0, 95, 249, 300, 240])
    assert (windows(distant.train, starts, 20, vocab_size=7) == windows(local.train, starts, 20, vocab_size=7)).all()
    with pytest.raises(UserError, match="train_000000.bin .*token 6.*vocab_size=6"):
        windows(distant.train, starts, 20, vocab_size=6)


def test_a_url_without_token_files_or_with_some_says_what_to_do(tmp_path, bucket):
    with pytest.raises(UserError, match="memory://nothing holds no token files: make some with"):
        load_dataset(DataConfig(source="memory://nothing"))
    source = copy_to(bucket, prepared(tmp_path))
    bucket.rm(f"{source}/train_000001.bin")
    with pytest.raises(UserError, match="2 of 3 train shards"):
        load_dataset(DataConfig(source=source))
    with pytest.raises(UserError, match=r"gs://bucket/x .*gcsfs.*pip install 'gptjax\[data\]'"):
        load_dataset(DataConfig(source="gs://bucket/x"))


@pytest.mark.parametrize(
    ("failure", "complaint"),
    [
        (lambda data: OSError("reset"), "OSError: reset"),
        (OSError("reset"), "OSError: reset"),
        (lambda data: data[:1], "1 bytes came of 6"),
    ],
)
def test_a_read_that_fails_is_named(tmp_path, bucket, failure, complaint):
    source = copy_to(bucket, prepared(tmp_path))
    tokens = open_split(source, "train")
    bucket.failures = [failure]
    with pytest.raises(UserError, match=rf"cannot read {source}/train_000000.bin: .*{complaint}"):
        tokens.window(0, 3)
