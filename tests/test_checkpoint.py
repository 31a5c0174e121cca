"""Checkpoints: complete or absent, restored whole or not at all."""

import shutil

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


@pytest.fixture
def saved(tmp_path):
    checkpoints = Checkpoints(tmp_path / "latest")
    for step in (1, 2):
        params = jax.tree.map(lambda leaf, n=step: jnp.asarray(leaf * n), PARAMS)
        checkpoints.save(step, {"seconds": 0.5 * step}, params=params, opt_state={"count": jnp.int32(step)})
    checkpoints.wait()
    checkpoints.close()
    return tmp_path / "latest"


def test_the_newest_is_kept_alone_and_restored_bit_for_bit(saved):
    assert [path.name for path in saved.iterdir()] == ["2"]
    checkpoints = Checkpoints(saved, read_only=True)
    trees, meta = checkpoints.restore(params=abstract(PARAMS), opt_state=abstract({"count": np.int32(0)}))
    assert checkpoints.step == 2 and meta == {"seconds": 1.0} and trees["opt_state"]["count"] == 2
    assert jax.tree.all(jax.tree.map(lambda x, y: np.array_equal(x, 2 * y), trees["params"], PARAMS))


def test_one_tree_can_be_restored_without_the_other(saved):
    trees, _ = Checkpoints(saved, read_only=True).restore(params=abstract(PARAMS))
    assert list(trees) == ["params"]


@pytest.mark.parametrize("damage", ["half", "empty", "gone", "one bit"])
def test_every_damaged_file_is_refused_in_one_line(saved, tmp_path, damage, capfd):
    files = [path.relative_to(saved) for path in saved.glob("2/*/**/*") if path.is_file()]
    assert len(files) > 15
    for name in files:
        copy = tmp_path / "copy"
        shutil.copytree(saved, copy)
        data = bytearray((copy / name).read_bytes())
        data[len(data) // 2] ^= 1
        if damage == "gone":
            (copy / name).unlink()
        else:
            kept = {"half": data[: len(data) // 2], "empty": b"", "one bit": data}[damage]
            (copy / name).write_bytes(kept)
        with pytest.raises(UserError, match=r"2 is damaged and was not loaded") as error:
            Checkpoints(copy, read_only=True).restore(params=abstract(PARAMS))
        assert "\n" not in str(error.value)
        shutil.rmtree(copy)
    assert capfd.readouterr().err == ""


def test_a_missing_checksum_file_is_damage_too(saved):
    (saved / "2" / "sha256.json").unlink()
    with pytest.raises(UserError, match="damaged"):
        Checkpoints(saved, read_only=True).restore(params=abstract(PARAMS))


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
def test_another_model_is_refused_by_the_parameters_name_and_shapes(saved, model, words):
    with pytest.raises(UserError) as error:
        Checkpoints(saved, read_only=True).restore(params=abstract(model))
    assert words in str(error.value)


def test_a_folder_that_is_a_pattern_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"a\[1\] has '\[' in its name"):
        Checkpoints(tmp_path / "a[1]")


def test_no_checkpoint_is_said_to_be_none(tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint"):
        Checkpoints(tmp_path / "none").restore(params=abstract(PARAMS))


def test_a_later_checkpoint_is_dropped_when_a_run_resumes_before_it(saved):
    checkpoints = Checkpoints(saved)
    checkpoints.drop_after(2)
    assert checkpoints.step == 2
    checkpoints.drop_after(1)
    assert checkpoints.step is None


def test_a_failed_write_says_what_is_left(saved, monkeypatch):
    checkpoints = Checkpoints(saved)

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints._manager, "save", full)
    with pytest.raises(UserError, match=r"the disk is full; step 2 is the last one that is whole"):
        checkpoints.save(3, {}, params=PARAMS)
