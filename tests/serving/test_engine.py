"""The engine: whatever shares the batch, a request gets the tokens that sample.py draws for it alone."""

import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from gptjax.config import ModelConfig
from gptjax.inference.language_model import LanguageModel
from gptjax.inference.sampling import Sampling
from gptjax.serving.engine import Closing, Engine, QueueFull, Request
from gptjax.serving.slots import PROMPT_CHUNK, SHORTEST, Slots
from gptjax.tokenizer import TextStream

RULES = [
    Sampling(temperature=0.0),
    Sampling(temperature=0.8, top_k=5),
    Sampling(temperature=1.3, top_p=0.7),
    Sampling(temperature=1.0, min_p=0.05, repetition_penalty=1.4),
    Sampling(temperature=1.5),
    Sampling(temperature=0.9, top_k=40, top_p=0.9, min_p=0.01, repetition_penalty=1.1),
]


class Listener:
    """Collects the pieces of one answer."""

    def __init__(self):
        self.pieces, self.done = [], threading.Event()

    def __call__(self, piece):
        self.pieces.append(piece)
        if piece.end:
            self.done.set()

    def wait(self):
        assert self.done.wait(120), "no end"
        return self

    @property
    def text(self):
        return "".join(piece.text for piece in self.pieces)

    @property
    def tokens(self):
        return [token for piece in self.pieces for token in piece.tokens]

    @property
    def end(self):
        return self.pieces[-1].end


@pytest.fixture(scope="module")
def model(models):
    return models[0]


@pytest.fixture(scope="module")
def engine(model):
    engine = Engine(model, n_slots=4)
    engine.start()
    yield engine
    engine.close(time.monotonic())
    engine.join(30.0)
    assert not engine.alive and engine.n_failures == 0


def submit(engine, *requests):
    listeners = [Listener() for _ in requests]
    return listeners, engine.submit(requests, listeners)


def ask(engine, *requests):
    return [listener.wait() for listener in submit(engine, *requests)[0]]


def prompt_of(length, seed=0):
    return np.random.default_rng(seed).integers(0, 260, length).astype(np.int32)


def alone(model, request):
    """The answer that sample.py gives: LanguageModel.answer for this prompt alone."""
    options = request.max_new_tokens, request.sampling, [request.seed], request.stop
    *_, [answer] = model.answer([request.prompt], *options)
    return answer


def idle(engine):
    for _ in range(1000):
        if engine.n_in_use == 0 and engine.n_waiting == 0:
            return True
        time.sleep(0.01)
    return False


def test_each_request_gets_the_tokens_that_it_gets_alone(engine, model):
    """Prompts of all lengths around the chunks, answers past the block, different rules and seeds, in one batch."""
    lengths = [1, 15, PROMPT_CHUNK, PROMPT_CHUNK + 1, 2 * PROMPT_CHUNK - 1, 2 * PROMPT_CHUNK, 150, 160]
    requests = [
        Request(prompt_of(n, seed=n), 130 + i, RULES[(0, 1, 3, 5)[i % 4]], seed=100 + i) for i, n in enumerate(lengths)
    ]
    for request, answer in zip(requests, ask(engine, *requests), strict=True):
        expected = alone(model, request)
        assert [token.id for token in answer.tokens] == expected.tokens
        assert answer.text == expected.text and answer.end == ("stop" if expected.ended else "length")
        log_probs = [token.log_prob for token in answer.tokens]
        np.testing.assert_allclose(log_probs, expected.log_probs, rtol=0, atol=1e-4)
    assert idle(engine)


def test_neighbours_slots_and_what_was_read_before_change_no_bit(engine):
    """The same request alone, among others, and after its prompt was read: equal log-probabilities, bit for bit."""
    request = Request(prompt_of(2 * PROMPT_CHUNK + 9, seed=5), 20, RULES[5], seed=9, alternatives=3)
    [first] = ask(engine, request)
    others = [Request(prompt_of(30 + i, seed=i), 5 + 9 * i, RULES[i], seed=i) for i in range(3)]
    listeners, tickets = submit(engine, *others, request, *others, request)
    answers = [listener.wait() for listener in listeners]
    for answer in (answers[3], answers[7]):
        assert answer.tokens == first.tokens
    assert tickets[3].n_cached == tickets[7].n_cached == 2 * PROMPT_CHUNK


def test_the_next_turn_of_a_conversation_reads_only_what_is_new(engine, model):
    prompt = prompt_of(PROMPT_CHUNK + 3, seed=11)
    listeners, _ = submit(engine, Request(prompt, 12, RULES[0], seed=0))
    answer = [token.id for token in listeners[0].wait().tokens]
    more = np.concatenate([prompt, answer, prompt_of(7, seed=12)]).astype(np.int32)
    request = Request(more, 12, RULES[1], seed=3)
    listeners, [ticket] = submit(engine, request)
    assert [token.id for token in listeners[0].wait().tokens] == alone(model, request).tokens
    assert ticket.n_cached == PROMPT_CHUNK


def test_stop_strings_end_an_answer(engine, model):
    request = Request(prompt_of(8, seed=2), 60, Sampling(temperature=1.0), seed=4)
    text = alone(model, request).text
    stop = text[10:13]
    stopped = replace(request, stop=("never", stop))
    [answer] = ask(engine, stopped)
    assert answer.text == alone(model, stopped).text == text[: text.index(stop)] and answer.end == "stop"
    assert all(token.place < len(answer.text) for token in answer.tokens)


def test_a_stop_token_ends_an_answer_and_is_no_part_of_it(model):
    request = Request(prompt_of(8, seed=2), 60, Sampling(temperature=1.0), seed=4)
    tokens = alone(model, request).tokens
    ending = replace(model, stop_tokens=frozenset({tokens[20]}))
    engine = Engine(ending, n_slots=2)
    engine.start()
    [answer] = ask(engine, request)
    expected = alone(ending, request)
    assert answer.text == expected.text and answer.end == "stop"
    assert [token.id for token in answer.tokens] == expected.tokens == tokens[: tokens.index(tokens[20])]
    engine.close(time.monotonic())
    engine.join(30.0)


def test_alternatives_are_the_likeliest_tokens(engine):
    [answer] = ask(engine, Request(prompt_of(5), 6, Sampling(temperature=0.0), seed=0, alternatives=4))
    for token in answer.tokens:
        assert len(token.alternatives) == 4 and token.alternatives[0][0] == token.id
        assert token.alternatives[0][1] == pytest.approx(token.log_prob, abs=1e-6)
        assert [p for _, p in token.alternatives] == sorted((p for _, p in token.alternatives), reverse=True)


def test_pieces_join_to_the_answer_and_characters_stay_whole(engine, model):
    """Of random bytes most characters are incomplete."""
    request = Request(prompt_of(3, seed=8), 50, Sampling(temperature=3.0), seed=8)
    [answer] = ask(engine, request)
    ids = [token.id for token in answer.tokens]
    stream = TextStream(model.tokenizer, request.prompt[-16:])
    assert answer.text == stream.feed(ids) + stream.end()
    assert len(answer.pieces) > 1


def test_a_cancelled_request_frees_its_slot_and_its_place_in_the_queue(engine):
    long = [Request(prompt_of(9, seed=i), 100_000, RULES[4], seed=i) for i in range(6)]
    listeners, tickets = submit(engine, *long)
    while not listeners[0].pieces:
        time.sleep(0.01)
    assert engine.n_in_use == 4 and engine.n_waiting == 2
    for ticket in tickets:
        engine.cancel(ticket)
    assert idle(engine)
    assert not any(listener.done.is_set() for listener in listeners)


def test_the_queue_is_bounded(model):
    engine = Engine(model, n_slots=2, n_queued=3)
    requests = [Request(prompt_of(4), 5, RULES[0], seed=0)] * 5
    listeners, _ = submit(engine, *requests)
    with pytest.raises(QueueFull) as full:
        submit(engine, requests[0])
    assert 1 <= full.value.retry_after <= 60
    engine.start()
    assert {listener.wait().end for listener in listeners} == {"length"}
    engine.close(time.monotonic() + 60)
    with pytest.raises(Closing):
        submit(engine, requests[0])
    engine.join(30.0)


def test_a_deadline_and_the_end_of_the_server_end_what_runs(model):
    engine = Engine(model, n_slots=2)
    engine.start()
    forever = Request(prompt_of(4), 10**6, RULES[4], seed=0)
    soon = Request(prompt_of(4), 10**6, RULES[4], seed=0, deadline=time.monotonic() + 0.5)
    listeners, _ = submit(engine, soon, forever, soon, forever)
    assert listeners[0].wait().end == listeners[2].wait().end == "timeout"
    listeners += submit(engine, Request(prompt_of(4), 5, RULES[0], seed=0))[0]
    engine.close(time.monotonic() + 1)
    assert listeners[1].wait().end == listeners[3].wait().end == "closing"
    engine.join(30.0)
    assert not engine.alive


def test_a_failure_of_the_device_fails_what_runs_and_the_next_request_is_answered(model, monkeypatch, capsys):
    engine = Engine(model, n_slots=2)
    engine.start()
    with monkeypatch.context() as patch:
        patch.setattr(engine._device, "draw", lambda *_: 1 / 0)
        [answer] = ask(engine, Request(prompt_of(4), 5, RULES[0], seed=0))
    assert answer.end == "error" and "ZeroDivisionError" in capsys.readouterr().err
    request = Request(prompt_of(4), 5, RULES[0], seed=0)
    [answer] = ask(engine, request)
    assert [token.id for token in answer.tokens] == alone(model, request).tokens and engine.n_failures == 1
    engine.close(time.monotonic())
    engine.join(30.0)


def test_one_program_serves_all_rules(engine, compilations):
    ask(engine, Request(prompt_of(4), 3, RULES[0], seed=0, alternatives=1))
    with compilations() as names:
        ask(engine, *[Request(prompt_of(4), 3, rules, seed=i) for i, rules in enumerate(RULES)])
    assert "_draw" not in " ".join(names)


def test_the_cache_grows_for_a_long_text_and_shrinks_again(scramble):
    config = ModelConfig(vocab_size=61, block_size=1100, n_layer=1, n_head=1, n_embd=8, dtype="float32")
    slots = Slots(config, scramble(config), 2)
    lengths = []
    for n in (1, SHORTEST, SHORTEST + 1, 1100, 10**6, SHORTEST + 1, SHORTEST):
        slots.fit(n)
        lengths.append(slots.length)
    assert lengths == [256, 256, 512, 1152, 1152, 1152, 256]


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_layers_that_are_stacked_as_on_a_tpu_and_int8_weights(base, dtype):
    model = LanguageModel.load(str(base), dtype=dtype)
    model = model if dtype == "float32" else model.for_sampling()
    engine = Engine(model, n_slots=2)
    engine.start()
    requests = [Request(prompt_of(n, seed=n), 70, RULES[0], seed=0) for n in (70, 90, 75)]
    for request, answer in zip(requests, ask(engine, *requests), strict=True):
        assert [token.id for token in answer.tokens] == alone(model, request).tokens
    engine.close(time.monotonic())
    engine.join(30.0)
