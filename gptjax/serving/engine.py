"""The engine of one model: requests share a fixed number of slots, and each is answered as if it were alone.

A thread of its own reads the prompts of new requests chunk by chunk, draws the next tokens of all others in between,
and gives a slot to the next request as soon as one ends.
"""

import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from gptjax.inference.language_model import AnswerBuilder, LanguageModel
from gptjax.inference.sampling import Sampling, TokenIds
from gptjax.serving.slots import MOST_STEPS, PROMPT_CHUNK, Drawn, Slots
from gptjax.tokenizer import TextStream, Tokenizer

CALL_SECONDS = 0.05  # a call draws as many tokens as take about so long: few for a large model, whose text streams

End = Literal["stop", "length", "timeout", "closing", "error"]


class QueueFull(Exception):
    """So many requests wait already that no more are taken; `retry_after` is in seconds."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the queue is full; try again in {retry_after} s")
        self.retry_after = retry_after


class Closing(Exception):
    """The engine takes no more requests."""


@dataclass(frozen=True)
class Request:
    """A text to continue. `alternatives` likeliest tokens are reported with each token; the deadline is monotonic."""

    prompt: TokenIds
    max_new_tokens: int
    sampling: Sampling
    seed: int
    stop: tuple[str, ...] = ()
    alternatives: int = 0
    deadline: float = float("inf")


@dataclass(frozen=True)
class Token:
    """A drawn token and the likeliest ones there, with their log-probabilities in nats before any sampling rule.

    `place` is the number of the answer's characters before it.
    """

    id: int
    log_prob: float
    alternatives: list[tuple[int, float]]
    place: int


@dataclass(frozen=True)
class Piece:
    """The next part of an answer, with the tokens whose text begins in it; `end` says why it is the last one."""

    text: str
    tokens: list[Token]
    end: End | None = None


@dataclass(eq=False)
class Ticket:
    """A request in the engine. `deliver` gets its pieces, in the engine's thread."""

    request: Request
    deliver: Callable[[Piece], None]
    submitted: float = field(default_factory=time.monotonic)
    n_cached: int = 0  # tokens of the prompt that were found in the cache
    n_drawn: int = 0
    cancelled: bool = False


@dataclass(eq=False)
class _Slot:
    """What one slot of the cache holds, and the ticket that it works on, if any."""

    held: TokenIds = field(default_factory=lambda: np.zeros(0, np.int32))  # in whole chunks of a prompt
    ticket: Ticket | None = None
    window: list[int] = field(default_factory=list)  # the end of the text, which the model reads
    n_read: int = 0  # tokens of it that are in the cache
    text: list[int] = field(default_factory=list)  # all of it
    builder: AnswerBuilder | None = None
    pending: list[Token] = field(default_factory=list)  # whose text is held back
    used: float = 0.0

    @property
    def drawing(self) -> bool:
        return self.ticket is not None and self.n_read == len(self.window)

    @property
    def position(self) -> int:
        """Where the slot's next token is written; where none is to be drawn, a place that is read by nobody."""
        return max(self.n_read if self.ticket else 0, len(self.held))

    @property
    def sampling(self) -> Sampling:
        return self.ticket.request.sampling if self.ticket else Sampling(temperature=0.0)

    @property
    def n_needed(self) -> int:
        """The places of the cache that the next call may write."""
        return len(self.window) + MOST_STEPS if self.ticket else 0


class Engine:
    """Answers requests for one model. All methods may be called from any thread."""

    def __init__(self, model: LanguageModel, n_slots: int = 8, n_queued: int = 64) -> None:
        self.model, self.n_queued = model, n_queued
        self.n_drawn = self.n_prompt = self.n_cached = self.n_failures = 0  # since the start
        self._tokenizer = Tokenizer.from_json(model.tokenizer.to_json().encode(), "the tokenizer")  # of this thread
        self._device = Slots(model.config, model.params, n_slots)
        self._slots = [_Slot() for _ in range(n_slots)]
        self._queue, self._reading = deque[Ticket](), deque[_Slot]()
        self._changed, self._closing, self._deadline = threading.Condition(), False, float("inf")
        self._rules: tuple[list[Sampling], Sampling] = [], Sampling()  # of the slots, and the same as arrays
        self._step_seconds, self._request_seconds = CALL_SECONDS, 1.0  # of late
        self._recent = deque[tuple[float, int]]()  # when tokens were drawn, and how many
        self._thread = threading.Thread(target=self._run, name=f"engine of {model.name}", daemon=True)

    def start(self) -> None:
        """Start the thread that answers requests."""
        self._thread.start()

    def submit(self, requests: Sequence[Request], deliver: Sequence[Callable[[Piece], None]]) -> list[Ticket]:
        """Queue requests that belong together; raises `QueueFull`, or `Closing`, if they are not all taken."""
        tickets = [Ticket(request, each) for request, each in zip(requests, deliver, strict=True)]
        with self._changed:
            if self._closing:
                raise Closing
            n_free = sum(slot.ticket is None for slot in self._slots)
            if len(self._queue) + len(tickets) > self.n_queued + n_free:
                waiting = self._request_seconds * (1 + len(self._queue) / len(self._slots))
                raise QueueFull(min(60, max(1, round(waiting))))
            self._queue.extend(tickets)
            self._changed.notify()
        return tickets

    def cancel(self, ticket: Ticket) -> None:
        """Free the ticket's slot after the call that draws now, or take it out of the queue."""
        with self._changed:
            ticket.cancelled = True
            self._changed.notify()

    def close(self, deadline: float) -> None:
        """Take no more requests, and end those that are not done by the deadline (monotonic)."""
        with self._changed:
            self._closing, self._deadline = True, deadline
            self._changed.notify()

    def join(self, timeout: float | None = None) -> None:
        """Wait for the end of the thread, which comes after `close`."""
        self._thread.join(timeout)

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def n_slots(self) -> int:
        """The requests that are answered at once."""
        return len(self._slots)

    @property
    def cache_length(self) -> int:
        """The tokens of each slot for which the cache has room."""
        return self._device.length

    @property
    def tokens_per_second(self) -> float:
        """The tokens drawn in the last 10 seconds, a second."""
        recent = list(self._recent)
        return sum(n for when, n in recent if when > time.monotonic() - 10) / 10

    @property
    def n_waiting(self) -> int:
        """The requests that wait for a slot."""
        return len(self._queue)

    @property
    def n_in_use(self) -> int:
        """The slots that hold a request."""
        return sum(slot.ticket is not None for slot in self._slots)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._drop_ended()
                while not (self._queue or self.n_in_use):
                    if self._closing:
                        return
                    self._changed.wait()
                self._admit()
            try:
                self._read_chunk()
                self._draw()
            except Exception:  # of the device, such as too little memory: its arrays may be lost
                traceback.print_exc(file=sys.stderr)
                self.n_failures += 1
                self._start_over()

    def _drop_ended(self) -> None:
        """End the tickets that were cancelled or are past their deadline."""
        now = time.monotonic()
        end: End = "closing" if self._closing else "timeout"
        for slot in self._slots:
            if slot.ticket and (slot.ticket.cancelled or now > min(slot.ticket.request.deadline, self._deadline)):
                self._end(slot, end)
        for ticket in list(self._queue):
            if ticket.cancelled or now > min(ticket.request.deadline, self._deadline):
                self._queue.remove(ticket)
                _deliver(ticket, Piece("", [], end))

    def _end(self, slot: _Slot, end: End) -> None:
        """End a slot's request before its answer is complete, and free the slot."""
        if slot.ticket:
            _deliver(slot.ticket, Piece("", [], end))
        self._free(slot)

    def _free(self, slot: _Slot) -> None:
        if slot in self._reading:
            self._reading.remove(slot)
        slot.ticket, slot.builder, slot.used = None, None, time.monotonic()
        slot.window, slot.text, slot.pending = [], [], []

    def _admit(self) -> None:
        """Give each free slot to the next ticket of the queue."""
        while self._queue and (free := [slot for slot in self._slots if slot.ticket is None]):
            ticket = self._queue.popleft()
            prompt = ticket.request.prompt
            # A slot that holds nothing but the prompt's beginning, else the one that was not used for longest.
            fitting = [slot for slot in free if len(slot.held) and _n_shared(slot.held, prompt) == len(slot.held)]
            slot = max(fitting, key=lambda slot: len(slot.held)) if fitting else min(free, key=lambda slot: slot.used)
            stream = TextStream(self._tokenizer, prompt[-16:])
            slot.builder = AnswerBuilder(stream, self.model.stop_tokens, ticket.request.stop)
            slot.ticket, slot.n_read = ticket, 0
            slot.text, slot.window, slot.pending = prompt.tolist(), prompt.tolist(), []
            self._reading.append(slot)

    def _read_chunk(self) -> None:
        """Read the next chunk of the first prompt that is not read."""
        if not self._reading:
            return
        slot = self._reading[0]
        self._fit()
        if slot.n_read == 0:
            self._reuse(slot)
        tokens = slot.window[slot.n_read : slot.n_read + PROMPT_CHUNK]
        self._device.read(self._slots.index(slot), np.array(tokens, np.int32), slot.n_read, slot.text)
        slot.n_read += len(tokens)
        if slot.n_read % PROMPT_CHUNK == 0:
            slot.held = np.array(slot.window[: min(slot.n_read, self._most_held)], np.int32)
        if slot.drawing:
            self._reading.popleft()

    def _reuse(self, slot: _Slot) -> None:
        """Begin after the chunks of the text that any slot holds already."""
        window = np.array(slot.window, np.int32)
        best = max(self._slots, key=lambda other: (_n_shared(other.held, window), other is slot))
        slot.n_read = _n_shared(best.held, window)
        if best is not slot and slot.n_read:
            self._device.copy(self._slots.index(best), self._slots.index(slot))
        slot.held = window[: slot.n_read]
        assert slot.ticket is not None
        if slot.ticket.n_drawn == 0:
            slot.ticket.n_cached = slot.n_read
            self.n_prompt, self.n_cached = self.n_prompt + len(window), self.n_cached + slot.n_read

    @property
    def _most_held(self) -> int:
        """The tokens of a slot that may be kept: not the last place, where a slot without a text may draw."""
        return (self._device.length - 1) // PROMPT_CHUNK * PROMPT_CHUNK

    def _fit(self) -> None:
        """Give the cache room for the longest text and the tokens that the next call draws."""
        self._device.fit(max(slot.n_needed for slot in self._slots))
        for slot in self._slots:
            slot.held = slot.held[: self._most_held]

    def _draw(self) -> None:
        """Draw the next tokens of all slots whose text is read."""
        drawing = [slot for slot in self._slots if slot.drawing]
        if not drawing:
            return
        self._fit()
        rules, tickets = [slot.sampling for slot in self._slots], [slot.ticket for slot in self._slots]
        if rules != self._rules[0]:
            self._rules = rules, Sampling.of_rows(rules)
        n_steps = min(MOST_STEPS, max(1, int(CALL_SECONDS / self._step_seconds)), *map(self._n_left, drawing))
        start = time.monotonic()
        drawn = self._device.draw(
            n_steps,
            [slot.position for slot in self._slots],
            [ticket.request.seed if ticket else 0 for ticket in tickets],
            [ticket.n_drawn if ticket else 0 for ticket in tickets],
            self._rules[1],
            any(ticket.request.alternatives for ticket in tickets if ticket),
        )
        self._step_seconds += 0.3 * ((time.monotonic() - start) / n_steps - self._step_seconds)
        n_before = self.n_drawn
        for i, slot in enumerate(self._slots):
            if slot.drawing:
                self._take(slot, Drawn(*(values[i : i + 1] for values in drawn)))
        self._recent.append((start, self.n_drawn - n_before))
        while self._recent[0][0] < start - 10:
            self._recent.popleft()

    def _n_left(self, slot: _Slot) -> int:
        """The tokens that the slot's request still takes, and that the model can draw before its block is full."""
        assert slot.ticket is not None
        in_block = self.model.config.block_size + 1 - len(slot.window)
        return min(slot.ticket.request.max_new_tokens - slot.ticket.n_drawn, in_block)

    def _take(self, slot: _Slot, drawn: Drawn) -> None:
        """Add the tokens of one slot to its answer, deliver what is complete, and go on or end."""
        ticket, builder, block_size = slot.ticket, slot.builder, self.model.config.block_size
        assert ticket is not None and builder is not None
        answer, n_shown = builder.answer, len(builder.answer.text)
        for token, log_prob, alternatives in _tokens(drawn, ticket.request.alternatives):
            place, n_kept = len(answer.text) + len(builder.held), len(answer.tokens)
            builder.add([token], [log_prob])
            ticket.n_drawn, self.n_drawn = ticket.n_drawn + 1, self.n_drawn + 1
            slot.window.append(token)
            slot.text.append(token)
            if len(answer.tokens) > n_kept:
                slot.pending.append(Token(token, log_prob, alternatives, place))
            if answer.ended:
                break
        complete = not answer.ended and ticket.n_drawn == ticket.request.max_new_tokens
        if complete:
            builder.finish()
        # A token is reported with the text that it begins. Where a stop string cut the text, the rest is left out.
        all_shown = complete or (answer.ended and slot.text[-1] in self.model.stop_tokens)
        shown = [token for token in slot.pending if all_shown or token.place < len(answer.text)]
        slot.pending = slot.pending[len(shown) :]
        end: End | None = "stop" if answer.ended else "length" if complete else None
        if end or shown or len(answer.text) > n_shown:
            _deliver(ticket, Piece(answer.text[n_shown:], shown, end))
        slot.n_read = len(slot.window)
        if end:
            self._request_seconds += 0.2 * (time.monotonic() - ticket.submitted - self._request_seconds)
            self._free(slot)
        elif len(slot.window) > block_size:  # as in `generate`: the last half is read again
            slot.window, slot.n_read = slot.window[-max(block_size // 2, 1) :], 0
            self._reading.append(slot)

    def _start_over(self) -> None:
        """Fail what is in the slots, and begin with an empty cache."""
        for slot in self._slots:
            self._end(slot, "error")
            slot.held = slot.held[:0]
        self._device = Slots(self.model.config, self.model.params, len(self._slots))


def _n_shared(held: TokenIds, prompt: TokenIds) -> int:
    """The tokens of the whole chunks with which both begin; the prompt's last token is read again, for its logits."""
    n = min(len(held), len(prompt) - 1)
    return int(np.argmin(np.append(held[:n] == prompt[:n], False))) // PROMPT_CHUNK * PROMPT_CHUNK


def _tokens(drawn: Drawn, n_alternatives: int) -> Iterator[tuple[int, float, list[tuple[int, float]]]]:
    """Of one slot each token, its log-probability, and its alternatives with theirs."""
    tokens_C, log_probs_C, alternatives_CA, alternative_log_probs_CA = (values[0].tolist() for values in drawn)
    pairs = zip(alternatives_CA, alternative_log_probs_CA, strict=True)
    likeliest = [list(zip(*pair, strict=True))[:n_alternatives] for pair in pairs]
    return zip(tokens_C, log_probs_C, likeliest, strict=True)


def _deliver(ticket: Ticket, piece: Piece) -> None:
    """Give a piece to whoever waits for it; if that is nobody any more, the ticket is cancelled."""
    if not ticket.cancelled:
        try:
            ticket.deliver(piece)
        except RuntimeError:  # of an event loop that is closed
            ticket.cancelled = True
