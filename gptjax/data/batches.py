"""Batch = f(tokens, seed, step): the same on every host and after a resume, with nothing to save.

B is the batch size, T the block size; a window is T + 1 tokens, inputs and targets one place apart.
"""

import functools
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal, TypeVar

import numpy as np
from jaxtyping import Int32, Int64, UInt64

from gptjax.data.token_files import Tokens
from gptjax.errors import UserError

PADDING = -1  # an id after the end of the tokens; as a target, the loss ignores it
_WINDOW, _SHUFFLE = 0, 1  # what random numbers are for: separate streams of one seed

Result = TypeVar("Result")


def starts(
    n_tokens: int,
    *,
    block_size: int,
    batch_size: int,
    seed: int,
    step: int,
    order: Literal["random", "epoch"] = "random",
) -> Int64[np.ndarray, " B"]:
    """Where the windows of batch `step` start.

    'random': uniform over every start, with replacement, as in nanoGPT. 'epoch': the n windows that start at multiples
    of `block_size`, each once in every n draws, in an order of that epoch's own; a batch may span two epochs.
    """
    if order == "random":
        raw_B = _random_bits(seed, step, _WINDOW, batch_size)
        return (raw_B % np.uint64(n_tokens - block_size)).astype(np.int64)  # bias below n_tokens / 2**64
    n_windows = (n_tokens - 1) // block_size
    epoch_B, place_B = np.divmod(step * batch_size + np.arange(batch_size), n_windows)
    pairs = zip(epoch_B.tolist(), place_B.tolist(), strict=True)
    windows_B = [_shuffled(n_windows, seed, epoch)[place] for epoch, place in pairs]
    return np.array(windows_B, np.int64) * block_size


def sequential_starts(n_tokens: int, block_size: int) -> Int64[np.ndarray, " W"]:
    """The windows in which every token after the first is a target exactly once; the last may be padded."""
    return np.arange(0, n_tokens - 1, block_size, dtype=np.int64)


def windows(
    tokens: Tokens, starts_B: Int64[np.ndarray, " B"], block_size: int, vocab_size: int | None = None
) -> Int32[np.ndarray, "B {block_size}+1"]:
    """The tokens of each window, `PADDING` past their end.

    Raises `UserError` where an id does not fit `vocab_size`: the files were made with another tokenizer.
    """
    ids_BT = np.full((len(starts_B), block_size + 1), PADDING, np.int32)
    for ids_T, window in zip(ids_BT, tokens.windows(starts_B.tolist(), block_size + 1), strict=True):
        ids_T[: len(window)] = window
    if vocab_size is not None and ids_BT.size and (largest := int(ids_BT.max())) >= vocab_size:
        raise UserError(
            f"{tokens.paths[0]} and its like hold token {largest}, but the tokenizer's vocab_size={vocab_size}: they "
            "were made with another tokenizer; name that one with --data.tokenizer"
        )
    return ids_BT


def prefetch(function: Callable[[int], Result], steps: Iterable[int], depth: int = 2) -> Generator[Result, None, None]:
    """Yield `function(step)` for each step in order, computed up to `depth` ahead in a background thread."""
    executor = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
    pending: deque[Future[Result]] = deque()
    try:
        for step in steps:
            pending.append(executor.submit(function, step))
            if len(pending) > depth:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        executor.shutdown(cancel_futures=True)


def _random_bits(seed: int, position: int, use: int, n: int) -> UInt64[np.ndarray, " n"]:
    """Raw Philox output, which NumPy keeps the same in every version, as it does not for `Generator` (NEP 19).

    The counter's lowest word counts the draws, so no two positions or uses overlap.
    """
    return np.random.Philox(key=seed, counter=[0, position, 0, use]).random_raw(n)


@functools.lru_cache(maxsize=4)
def _shuffled(n: int, seed: int, epoch: int) -> Int64[np.ndarray, " n"]:
    return np.argsort(_random_bits(seed, epoch, _SHUFFLE, n), kind="stable")
