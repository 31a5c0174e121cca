"""Checkpoints: complete or absent, restored whole or refused."""

import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.checkpoint import Checkpoints
from gptjax.errors import UserError

PARAMS = {"a": {"kernel": np.arange(6000, dtype=np.float32).reshape(60, 100)}, "b": np.ones(7, np.float32)}


def abstract(tree):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    checkpoints = Checkpoints(tmp_path_factory.mktemp("run") / "latest")
    for step in (1, 2):
        params = jax.tree.map(lambda leaf, n=step: jnp.asarray(leaf * n), PARAMS)
        checkpoints.save(step, {"seconds": 0.5 * step}, params=params, opt_state={"count": jnp.int32(step)})
    checkpoints.close()
    return checkpoints.folder


@pytest.fixture
def saved(written, tmp_path):
    """The folder of a checkpoint of step 2."""
    return shutil.copytree(written, tmp_path / "latest")


def test_the_newest_is_kept_alone_and_restored_bit_for_bit(saved):
    assert [path.name for path in saved.iterdir()] == ["2"]
    checkpoints = Checkpoints(saved, read_only=True)
    trees, meta = checkpoints.restore(params=abstract(PARAMS), opt_state=abstract({"count": np.int32(0)}))
    assert checkpoints.step == 2 and meta == {"seconds": 1.0} and trees["opt_state"]["count"] == 2
    assert jax.tree.all(jax.tree.map(lambda x, y: np.array_equal(x, 2 * y), trees["params"], PARAMS))
    assert list(checkpoints.restore(params=abstract(PARAMS))[0]) == ["params"]


def test_every_damaged_file_is_refused_in_one_line(saved, capfd):
    """A file that is missing, empty, cut short or has one wrong bit, and a missing checksum file."""
    checkpoints = Checkpoints(saved, read_only=True)
    files = [path for path in saved.glob("2/*/**/*") if path.is_file()]
    assert len(files) > 15
    for path in [saved / "2" / "sha256.json", *files]:
        data = path.read_bytes()
        middle = len(data) // 2
        one_bit = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        for damaged in (None, b"", data[:middle], one_bit) if path in files else (None,):
            path.unlink()
            if damaged is not None:
                path.write_bytes(damaged)
            with pytest.raises(UserError, match=r"2 is damaged and was not loaded") as error:
                checkpoints.restore(params=abstract(PARAMS))
            assert "\n" not in str(error.value)
            path.write_bytes(data)
    checkpoints.restore(params=abstract(PARAMS))
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (
            {"a": {"kernel": np.ones((60, 50), np.float32)}, "b": PARAMS["b"]},
            "a/kernel is (60, 100) there and (60, 50)",
        ),
        ({"a": PARAMS["a"]}, "it has b (7,), which the model lacks"),
        ({**PARAMS, "c": PARAMS["b"]}, "it lacks c (7,)"),
    ],
)
def test_another_model_is_refused_by_the_parameters_name_and_shapes(written, model, words):
    with pytest.raises(UserError) as error:
        Checkpoints(written, read_only=True).restore(params=abstract(model))
    assert words in str(error.value)


def test_a_folder_that_is_a_pattern_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"a\[1\] has '\[' in its name"):
        Checkpoints(tmp_path / "a[1]")


def test_a_folder_without_a_checkpoint_is_an_error(tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint"):
        Checkpoints(tmp_path / "none").restore(params=abstract(PARAMS))


def test_a_full_disk_keeps_the_checkpoint_and_a_later_one_can_be_dropped(saved, monkeypatch):
    checkpoints = Checkpoints(saved)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 20))
    with pytest.raises(UserError, match=r"the disk is full; step 2 is the last complete one"):
        checkpoints.save(3, {}, params=PARAMS)
    checkpoints.drop_after(2)
    assert checkpoints.step == 2
    checkpoints.drop_after(1)
    assert checkpoints.step is None


def test_older_ones_are_kept_and_used_when_the_newest_is_damaged(tmp_path, capsys):
    checkpoints = Checkpoints(tmp_path / "latest", keep=2, keep_every=4)
    for step in range(1, 8):
        checkpoints.save(step, {}, params={"a": jnp.full(3, step)})
    checkpoints.wait()
    assert checkpoints.steps == [4, 6, 7] and checkpoints.newest_intact() == 7
    damaged = next(path for path in (checkpoints.folder / "7" / "params").rglob("*") if path.is_file())
    damaged.write_bytes(b"")
    assert checkpoints.newest_intact() == 6 and "latest/7 is damaged and not used" in capsys.readouterr().out
    checkpoints.drop_after(6, "unused")
    assert checkpoints.steps == [4, 6] and (checkpoints.folder / "7.unused").is_dir()
    checkpoints.save(7, {}, params={"a": jnp.full(3, 7)})
    checkpoints.close()
    again = Checkpoints(checkpoints.folder, read_only=True)
    assert again.steps == [4, 6, 7]
    assert again.restore(6, params=abstract({"a": np.zeros(3, np.int32)}))[0]["params"]["a"][0] == 6
