"""Batches: a function of tokens, seed and step, that leaves nothing out."""

import functools
import itertools
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.data.batches import PADDING, prefetch, sequential_starts, starts, windows
from gptjax.data.token_files import UINT16, Tokens, write_tokens
from gptjax.errors import UserError

small = st.integers(1, 12)
quick = settings(deadline=None, max_examples=50)
GOLDEN_RANDOM = [7415, 5070, 7552, 8178, 6856, 8980, 4507, 6447]
GOLDEN_EPOCH = [9541, 8400, 8519, 6363, 5215, 7210, 3927, 5516]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Tokens:
    """The numbers 0 to 999 in three shards."""
    folder = tmp_path_factory.mktemp("tokens")
    for i, ids in enumerate(np.split(np.arange(1000), [400, 800])):
        write_tokens(folder / f"train_{i:06}.bin", [ids], UINT16, header=True)
    return Tokens(sorted(folder.iterdir()))


@pytest.mark.parametrize("order, golden", [("random", GOLDEN_RANDOM), ("epoch", GOLDEN_EPOCH)])
def test_a_batch_depends_on_seed_and_step_alone_and_is_the_same_in_every_version(order, golden):
    """A change of the golden values is a change of every run: a resumed one would train on other windows."""

    def draw(step: int, seed: int) -> list[int]:
        return starts(10_000, block_size=7, batch_size=8, seed=seed, step=step, order=order).tolist()

    assert draw(3, 1) == golden
    for other in (draw(4, 1), draw(3, 2)):
        assert not set(zip(other[::2], other[1::2], strict=True)) & set(zip(golden[::2], golden[1::2], strict=True))
    assert draw(3, 1) == golden


def test_random_windows_are_uniform_over_every_start():
    drawn = np.concatenate([starts(14, block_size=4, batch_size=500, seed=0, step=step) for step in range(20)])
    counts = np.bincount(drawn, minlength=10)
    assert len(counts) == 10  # 14 - 4 starts, the last window ends at the last token
    assert np.abs(counts - 1000).max() < 150  # five standard deviations, sqrt(10000 * 0.1 * 0.9) = 30 each


@given(n=st.integers(2, 200), block=small, batch=small, seed=st.integers(0, 2**64), step=st.integers(0, 2**40))
@quick
def test_every_window_lies_inside_the_tokens_and_comes_once_per_epoch(n, block, batch, seed, step):
    n += block
    n_windows, n_steps = (n - 1) // block, 2 + 3 * n // (block * batch)
    draw = functools.partial(starts, n, block_size=block, batch_size=batch, seed=seed)
    for drawn in (draw(step=step), draw(step=step, order="epoch")):
        assert drawn.shape == (batch,) and drawn.dtype == np.int64
        assert drawn.min() >= 0 and drawn.max() + block + 1 <= n
    drawn = np.concatenate([draw(step=step, order="epoch") for step in range(n_steps)])
    for epoch in range(len(drawn) // n_windows):
        assert sorted(drawn[epoch * n_windows : (epoch + 1) * n_windows]) == [k * block for k in range(n_windows)]


def test_epochs_have_orders_of_their_own():
    first, second = (starts(99, block_size=2, batch_size=49, seed=0, step=i, order="epoch").tolist() for i in (0, 1))
    assert sorted(first) == sorted(second) and first != second and first != sorted(first)


def test_sequential_windows_have_every_target_once(tmp_path):
    for n, block in itertools.product((2, 3, 8, 9, 50), (1, 3, 8, 70)):
        write_tokens(tmp_path / "train.bin", [np.arange(n)], UINT16)
        ids = windows(Tokens([tmp_path / "train.bin"]), sequential_starts(n, block), block)
        inputs, targets = ids[:, :-1], ids[:, 1:]
        assert ids.dtype == np.int32 and targets[targets != PADDING].tolist() == list(range(1, n))
        assert (targets != PADDING).any(axis=1).all()  # no window without a target
        assert (inputs[targets != PADDING] + 1 == targets[targets != PADDING]).all()


def test_ids_of_another_tokenizer_are_refused(tokens):
    assert windows(tokens, np.array([989, 395]), 10, vocab_size=1000)[:, -1].tolist() == [999, 405]
    with pytest.raises(UserError, match=r"train_000000.bin .*token 999.*vocab_size=999.*--data.tokenizer"):
        windows(tokens, np.array([0, 989]), 10, vocab_size=999)


def prefetching() -> bool:
    return any(thread.name.startswith("prefetch") for thread in threading.enumerate())


def test_prefetch_is_map_whose_error_arrives_at_its_step():
    def function(step: int) -> int:
        if step == 5:
            raise UserError("step 5")
        return step * 2

    for depth in range(4):
        assert list(prefetch(function, iter(range(5)), depth)) == [0, 2, 4, 6, 8]
        results = prefetch(function, range(9), depth)
        assert [next(results) for _ in range(5)] == [0, 2, 4, 6, 8]
        with pytest.raises(UserError, match="step 5"):
            next(results)
    assert not prefetching()


def test_prefetch_works_ahead_not_too_far_and_ends_its_thread():
    done: list[int] = []
    results = prefetch(lambda step: done.append(step) or step, range(100), depth=2)
    assert next(results) == 0
    deadline = time.monotonic() + 5
    while len(done) < 3 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.02)
    assert done == [0, 1, 2] and prefetching()
    results.close()
    assert not prefetching()
