"""Draw batches as a function of tokens, seed and step: the same on every host and after a resume, with no state.

B is the batch size and T the block size. A window is T + 1 tokens: T inputs, and T targets shifted by one.
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

PADDING = -1  # the id past the end of the tokens; the loss ignores it as a target
_WINDOW, _SHUFFLE = 0, 1  # separate random streams of one seed

Order = Literal["random", "epoch"]
Result = TypeVar("Result")


def starts(
    n_tokens: int, *, block_size: int, batch_size: int, seed: int, step: int, order: Order = "random"
) -> Int64[np.ndarray, " B"]:
    """Return where the windows of batch `step` start.

    'random': uniform over all starts, with replacement, as in nanoGPT. 'epoch': the n windows that start at multiples
    of `block_size`, each once per epoch of n draws, shuffled anew in every epoch; a batch may span two epochs.
    """
    if order == "random":
        raw_B = _random_bits(seed, step, _WINDOW, batch_size)
        return (raw_B % np.uint64(n_tokens - block_size)).astype(np.int64)  # its bias is below n_tokens / 2**64
    n_windows = (n_tokens - 1) // block_size
    epoch_B, place_B = np.divmod(step * batch_size + np.arange(batch_size), n_windows)
    pairs = zip(epoch_B.tolist(), place_B.tolist(), strict=True)
    windows_B = [_shuffled(n_windows, seed, epoch)[place] for epoch, place in pairs]
    return np.array(windows_B, np.int64) * block_size


def sequential_starts(n_tokens: int, block_size: int) -> Int64[np.ndarray, " W"]:
    """Return the starts of windows that have every token but the first as a target once; the last may be padded."""
    return np.arange(0, n_tokens - 1, block_size, dtype=np.int64)


def windows(
    tokens: Tokens, starts_B: Int64[np.ndarray, " B"], block_size: int, vocab_size: int | None = None
) -> Int32[np.ndarray, "B {block_size}+1"]:
    """Return the tokens of each window, with `PADDING` past the end of the tokens.

    Raises `UserError` if an id is not below `vocab_size`: the files were made with another tokenizer.
    """
    ids_BT = np.full((len(starts_B), block_size + 1), PADDING, np.int64)  # holds every uint32
    for ids_T, window in zip(ids_BT, tokens.windows(starts_B.tolist(), block_size + 1), strict=True):
        ids_T[: len(window)] = window
    if vocab_size is not None and ids_BT.size and (largest := int(ids_BT.max())) >= vocab_size:
        fix = "name the tokenizer that made them with --data.tokenizer"
        raise UserError(f"{tokens.paths[0]} and its like hold token {largest}, but vocab_size={vocab_size}: {fix}")
    return ids_BT.astype(np.int32)


def prefetch(function: Callable[[int], Result], steps: Iterable[int], depth: int = 2) -> Generator[Result, None, None]:
    """Yield `function(step)` for each step in order, computed in a background thread up to `depth` steps ahead."""
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
    """Return raw Philox output, which is the same in every version of NumPy, unlike `Generator`'s (NEP 19).

    The counter's lowest word counts the draws, so the streams of two positions or uses do not overlap.
    """
    return np.random.Philox(key=seed, counter=[0, position, 0, use]).random_raw(n)


@functools.lru_cache(maxsize=4)
def _shuffled(n: int, seed: int, epoch: int) -> Int64[np.ndarray, " n"]:
    return np.argsort(_random_bits(seed, epoch, _SHUFFLE, n), kind="stable")
