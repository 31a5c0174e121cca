"""Pack conversations into windows, each in one piece, and mark their tokens.

An entry of a token file of conversations is an id below 2**29, with the bit `FIRST` where a conversation begins and the
bit `CONTEXT` where the token is read and not predicted. The windows of a batch hold the same entries.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int, Int32, Integer, UInt32

from gptjax.data.token_files import Tokens
from gptjax.errors import UserError

FIRST, CONTEXT = 1 << 29, 1 << 30
ID = FIRST - 1  # the bits of an id


def entries_of(ids: Int32[np.ndarray, " T"], predicted: Bool[np.ndarray, " T"]) -> UInt32[np.ndarray, " T"]:
    """Return the entries of a conversation of which these tokens are predicted; the first one never is."""
    entries = ids.astype(np.uint32) | np.where(predicted, 0, CONTEXT).astype(np.uint32)
    entries[:1] |= np.uint32(FIRST | CONTEXT)
    return entries


class PackedTokens(Tokens):
    """Conversations in windows of block_size + 1 tokens, read as one sequence: window i begins at i * block_size.

    A conversation is in one window, whole or cut after its first block_size + 1 tokens. One of which no predicted token
    remains is left out. The windows are a function of the conversations' lengths, so they are the same in every run.
    """

    def __init__(self, tokens: Tokens, block_size: int) -> None:
        self.paths, self.dtype, self._tokens, self._block_size = tokens.paths, tokens.dtype, tokens, block_size
        self._entries, most = tokens.window(0, len(tokens)), block_size + 1
        first = np.flatnonzero(self._entries & FIRST)
        if len(self._entries) and (not len(first) or first[0] != 0):
            raise UserError(f"{self.paths[0]} does not begin with a conversation: prepare it again")
        lengths = np.diff(first, append=len(self._entries))
        long = np.flatnonzero(lengths > most)
        empty = [i for i in long if (self._entries[first[i] : first[i] + most] & CONTEXT).all()]
        self._first, self._lengths = np.delete(first, empty), np.delete(np.minimum(lengths, most), empty)
        self.n_all, self.n_cut, self.n_left_out = len(first), len(long) - len(empty), len(empty)
        self._windows = pack(self._lengths, most)

    def __len__(self) -> int:
        return len(self._windows) * self._block_size + 1 if self._windows else 0

    def windows(self, starts: Sequence[int], length: int) -> list[Integer[np.ndarray, " _"]]:
        """Return the entries of the windows that begin there; none past the end."""
        windows = [self._windows[i : i + 1] for i in (start // self._block_size for start in starts)]
        pieces = [
            [self._entries[self._first[k] :][: self._lengths[k]] for each in window for k in each] for window in windows
        ]
        return [np.concatenate([np.zeros(0, self.dtype), *each])[:length] for each in pieces]

    def predicted(self, n: int) -> Integer[np.ndarray, " _"]:
        """Return the ids of the first n tokens that are predicted."""
        some = self._entries[: 100 * n]
        return some[(some & CONTEXT) == 0][:n]

    def fingerprint(self) -> str:
        """Return the fingerprint of the conversations, which do not depend on block_size."""
        return self._tokens.fingerprint()

    def files(self) -> dict[Path, np.ndarray]:
        """Return the entries of each local file."""
        return self._tokens.files()

    def summary(self) -> str:
        """Return how many conversations there are, in how many windows, and what became of the long ones."""
        text = f"{self.n_all:,} conversations in {len(self._windows):,} windows"
        most = f"longer than model.block_size={self._block_size} and one token more"
        if self.n_cut or self.n_left_out:
            text += f" ({self.n_cut + self.n_left_out:,} are {most}: {self.n_cut:,} cut there"
            text += f", {self.n_left_out:,} left out as no answer begins before)" if self.n_left_out else ")"
        return text


def pack(lengths: Int[np.ndarray, " N"], size: int) -> list[list[int]]:
    """Return which pieces of these lengths, at most `size` each, are in which window: best-fit decreasing.

    A piece goes into the window in which it leaves the least room, the longest pieces first.
    """
    windows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(size + 1)]  # the windows with so much room left
    rooms = 0  # bit r is set if with_room[r] has any
    for i in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[i])
        if fitting := rooms >> length:
            room = length + (fitting & -fitting).bit_length() - 1
            window = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, window = size, len(windows)
            windows.append([])
        windows[window].append(i)
        if left := room - length:
            with_room[left].append(window)
            rooms |= 1 << left
    return windows
