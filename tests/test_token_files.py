"""Token files: nanoGPT's and llm.c's, written whole or not at all, read as one sequence."""

import errno

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptjax.data.token_files import UINT16, UINT32, Tokens, dtype_for, open_split, replacing, write_split, write_tokens
from gptjax.errors import UserError

anywhere = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
dtypes = pytest.mark.parametrize("dtype", [UINT16, UINT32], ids=str)


def split_of(folder, split="train"):
    return open_split(folder, split)


@dtypes
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    size=st.integers(1, 30),
    start=st.integers(0, 200),
    length=st.integers(0, 60),
)
@anywhere
def test_shards_read_as_one_sequence(tmp_path_factory, dtype, lengths, size, start, length):
    folder = tmp_path_factory.mktemp("shards")
    ids = np.arange(sum(lengths), dtype=np.int32) * (1000 if dtype == UINT32 else 100)
    arrays = np.split(ids, np.cumsum(lengths)[:-1])
    assert write_split(folder, "train", arrays, dtype, "llmc", shard_tokens=size) == len(ids)
    if not len(ids):
        return
    tokens = split_of(folder)
    assert len(tokens.paths) == -(-len(ids) // size) and len(tokens) == len(ids) and tokens.dtype == dtype
    assert tokens.window(start, length).tolist() == ids[start : start + length].tolist()


def test_a_flat_file_is_nanogpts_bytes_and_nothing_else(tmp_path):
    ids = np.array([0, 65535, 50256], np.int32)
    assert write_tokens(tmp_path / "train.bin", iter([ids[:1], ids[1:]]), UINT16) == 3
    assert (tmp_path / "train.bin").read_bytes() == np.array(ids, "<u2").tobytes()
    assert split_of(tmp_path).window(0, 9).tolist() == ids.tolist()


@pytest.mark.parametrize("dtype, magic", [(UINT16, [20240520, 1]), (UINT32, [20240801, 7])], ids=str)
def test_a_shard_is_llm_cs_header_and_tokens(tmp_path, dtype, magic):
    write_split(tmp_path, "val", [np.arange(5)], dtype, "llmc")
    data = (tmp_path / "val_000000.bin").read_bytes()
    assert np.frombuffer(data[:1024], "<i4").tolist() == [*magic, 5] + [0] * 253
    assert data[1024:] == np.arange(5).astype(dtype).tobytes()


def test_the_manifest_says_that_a_flat_file_is_wide(tmp_path):
    write_tokens(tmp_path / "train.bin", [np.array([70_000, 1])], UINT32)
    assert split_of(tmp_path).window(0, 9).tolist() == [70_000 - 65_536, 1, 1, 0]
    (tmp_path / "data.json").write_text('{"dtype": "uint32"}')
    assert split_of(tmp_path).window(0, 9).tolist() == [70_000, 1]


def test_the_dtype_is_wide_only_where_it_must_be():
    assert [dtype_for(n) for n in (65, 50257, 65536, 65537)] == [UINT16, UINT16, UINT16, UINT32]


def damaged(header, n_bytes):
    return np.array(header + [0] * (256 - len(header)), "<i4").tobytes() + bytes(n_bytes)


@pytest.mark.parametrize(
    "data",
    [b"abc", damaged([20240520, 1, 9], 17), damaged([20240520, 1, 9], 20), damaged([20240801, 7, 9], 18),
     damaged([20240520, 1, -1], 0), damaged([20240520, 1, 9], 0)[:500]],
    ids=["odd", "short", "long", "narrow", "negative", "no header"],
)  # fmt: skip
def test_damaged_files_are_named(tmp_path, data):
    (tmp_path / "train.bin").write_bytes(data)
    with pytest.raises(UserError, match=r"train\.bin .*copy it again"):
        split_of(tmp_path)


def test_files_that_are_missing_or_mixed_are_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*train\.bin"):
        Tokens([tmp_path / "train.bin"])
    write_tokens(tmp_path / "a.bin", [np.arange(3)], UINT16, header=True)
    write_tokens(tmp_path / "b.bin", [np.arange(3)], UINT32, header=True)
    with pytest.raises(UserError, match="two folders"):
        Tokens([tmp_path / "a.bin", tmp_path / "b.bin"])


def test_tokens_cannot_be_written_to(tmp_path):
    write_tokens(tmp_path / "train.bin", [np.arange(9)], UINT16)
    with pytest.raises(ValueError, match="read-only"):
        split_of(tmp_path).window(0, 3)[0] = 1


def test_the_fingerprint_is_of_the_tokens_not_of_their_place(tmp_path):
    prints = []
    for name, ids in {"a": [1, 2, 3], "b": [1, 2, 3], "c": [1, 2, 4], "d": [1, 2], "e": [9, 2, 3]}.items():
        (tmp_path / name).mkdir()
        write_tokens(tmp_path / name / "train.bin", [np.array(ids)], UINT16)
        prints.append(split_of(tmp_path / name).fingerprint())
    assert prints[0] == prints[1] and len(set(prints)) == 4


@pytest.mark.parametrize("place", [0, 1_999_999])
def test_the_fingerprint_of_a_large_file_is_of_its_ends(tmp_path, place):
    ids = np.zeros(2_000_000, np.uint16)
    write_tokens(tmp_path / "train.bin", [ids], UINT16)
    before = split_of(tmp_path).fingerprint()
    ids[place] = 1
    write_tokens(tmp_path / "train.bin", [ids], UINT16)
    assert split_of(tmp_path).fingerprint() != before


@pytest.mark.parametrize("form", ["nanogpt", "llmc"])
def test_a_full_disk_leaves_no_half_file(tmp_path, form):
    def arrays():
        yield np.arange(100_000)
        raise OSError(errno.ENOSPC, "No space left on device")

    write_split(tmp_path, "train", [np.arange(5)], UINT16, form)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(OSError, match="No space left") as error:
        write_split(tmp_path, "train", arrays(), UINT16, form)
    assert error.value.errno == errno.ENOSPC
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_real_write_error_keeps_its_number(tmp_path, monkeypatch):
    resource = pytest.importorskip("resource")
    signal = pytest.importorskip("signal")
    monkeypatch.setattr(signal, "ignored", signal.signal(signal.SIGXFSZ, signal.SIG_IGN), raising=False)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(OSError) as error:
            write_tokens(tmp_path / "train.bin", [np.arange(100_000)], UINT16)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.value.errno == errno.EFBIG and list(tmp_path.iterdir()) == []


def test_replacing_keeps_the_old_file_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        temporary.write_text("ha")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]
