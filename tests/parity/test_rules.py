"""The rules of sampling leave the tokens and probabilities that `transformers` leaves; stop strings end an answer."""

from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from gptjax.config import ModelConfig
from gptjax.inference.language_model import AnswerBuilder, LanguageModel
from gptjax.inference.sampling import Sampling, apply_rules
from gptjax.tokenizer import TextStream, Tokenizer

torch = pytest.importorskip("torch", reason="the reference is PyTorch; pip install 'gptjax[test]' brings it")
transformers = pytest.importorskip("transformers", reason="the reference; pip install 'gptjax[test]' brings it")

# In the order of transformers' GenerationMixin._get_logits_processor.
THEIRS = {
    "repetition_penalty": transformers.RepetitionPenaltyLogitsProcessor,
    "temperature": transformers.TemperatureLogitsWarper,
    "top_k": transformers.TopKLogitsWarper,
    "top_p": transformers.TopPLogitsWarper,
    "min_p": transformers.MinPLogitsWarper,
}
VALUES = {
    "repetition_penalty": [0.5, 0.99, 1.3, 10.0],
    "temperature": [0.05, 0.7, 3.0],
    "top_k": [1, 2, 17, 49, 50, 10_000],
    "top_p": [0.0, 1e-6, 0.3, 0.9, 0.999],
    "min_p": [1e-6, 0.05, 0.5, 1.0],
}


def draw(vocab_size, seed):
    """Logits of four rows, and the text so far of each: some tokens twice, most not at all."""
    rng = np.random.default_rng(seed)
    logits_BV = (3 * rng.standard_normal((4, vocab_size))).astype(np.float32)
    return logits_BV, rng.integers(0, vocab_size, (4, vocab_size // 3))


def assert_same_rules(rules, logits_BV, text_BT):
    """Returns the probabilities."""
    scores, clear_B = torch.from_numpy(logits_BV.copy()), np.ones(len(logits_BV), bool)
    for name, make in THEIRS.items():
        if name in rules:
            if name == "top_p":  # a sum of probabilities that is top_p up to rounding falls on either side
                sums_BV = scores.double().softmax(-1).sort(descending=True)[0].cumsum(-1).numpy()
                clear_B = np.abs(sums_BV - rules[name]).min(axis=1) > 1e-6
            scores = make(rules[name])(torch.from_numpy(text_BT), scores)
    assert clear_B.sum() >= 3
    logits_BV, text_BT, scores = logits_BV[clear_B], text_BT[clear_B], scores[clear_B]
    expected_BV = scores.softmax(-1).numpy()
    seen_BV = np.zeros(logits_BV.shape, bool)
    np.put_along_axis(seen_BV, text_BT, True, axis=1)
    sampling = Sampling(**rules)
    seen_BV = jnp.asarray(seen_BV) if "repetition_penalty" in rules else None
    ours_BV = apply_rules(jnp.asarray(logits_BV), seen_BV, sampling)
    np.testing.assert_array_equal(np.isneginf(ours_BV), np.isneginf(scores.numpy()))
    assert not np.isneginf(ours_BV).all(axis=1).any()
    # Sums of probabilities in another order: 1e-7 of 1. Logits of 10 divided by 0.05 are float32's 200 +- 1e-5.
    atol = 1e-6 / min(rules.get("temperature", 1.0), 1.0)
    np.testing.assert_allclose(jax.nn.softmax(ours_BV), expected_BV, rtol=0, atol=atol)
    return expected_BV


@pytest.mark.parametrize("vocab_size", [50, 101, 300])
@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in VALUES.items() for value in values])
def test_each_rule_alone(name, value, vocab_size):
    for seed in range(5):
        logits_BV, text_BT = draw(vocab_size, seed)
        left_BV = assert_same_rules({name: value}, logits_BV, text_BT)
        if value in ({"top_k": 1, "top_p": 0.0, "min_p": 1.0}.get(name), 1e-6 if name == "top_p" else None):
            assert ((left_BV > 0).sum(axis=1) == 1).all()


@pytest.mark.parametrize("seed", range(60))
def test_rules_in_a_chain(seed):
    rng = np.random.default_rng(seed)
    chosen = [name for name in THEIRS if rng.random() < 0.75]
    rules = {name: VALUES[name][rng.integers(len(VALUES[name]))] for name in chosen}
    logits_BV, text_BT = draw([50, 101, 300][seed % 3], seed)
    if seed % 2:
        logits_BV[:, -7:] = -np.inf  # padding
    assert_same_rules(rules, logits_BV, text_BT)


def test_the_order_of_rules_matters():
    """Else the chains above would not tell one order from another."""
    logits_BV, text_BT = draw(101, 0)
    first = assert_same_rules({"temperature": 3.0, "top_p": 0.5}, logits_BV, text_BT)
    second = assert_same_rules({"top_p": 0.5}, logits_BV, text_BT)
    assert ((first > 0).sum(axis=1) > (second > 0).sum(axis=1)).all()


# What ends an answer

END = 10_000  # a stop token


class Pieces(TextStream):
    """A stream whose token i is the i-th piece of a text, with the rest at the end, as half a character is."""

    def __init__(self, pieces, rest=""):
        self.pieces, self.rest = pieces, rest

    def feed(self, ids):
        return "".join(self.pieces[i] for i in ids)

    def end(self):
        return self.rest


def cut(text, stop):
    """The text before the first stop string, of those that end together the longest, as if characters came alone."""
    for end in range(1, len(text) + 1):
        found = [end - len(word) for word in stop if text[:end].endswith(word)]
        if found:
            return text[: min(found)], True
    return text, False


def stream(pieces, stop, chunk=1, rest="", end_token=False):
    """The answer, and the text that was shown after each chunk."""
    row, shown = AnswerBuilder(Pieces(pieces, rest), frozenset({END}), stop), []
    tokens = [*range(len(pieces)), *[END] * end_token]
    for start in range(0, len(tokens), chunk):
        some = tokens[start : start + chunk]
        row.add(some, [-0.5] * len(some))
        shown.append(row.answer.text)
    row.finish()
    return row.answer, [*shown, row.answer.text]


pieces = st.lists(st.text("abc", max_size=4), max_size=8)
stops = st.lists(st.text("abc", min_size=1, max_size=4), max_size=3)


@given(pieces=pieces, stop=stops, chunk=st.integers(1, 3), rest=st.text("abc", max_size=2), end_token=st.booleans())
@settings(max_examples=500, deadline=None)
@example(["aa", "b", "aab"], ["aab"], 1, "", False)
@example(["a", "ab", "c"], ["aabc"], 1, "", False)
@example(["x", "a"], ["ab"], 2, "b", False)
def test_an_answer_ends_before_the_first_stop_string(pieces, stop, chunk, rest, end_token):
    """However the pieces fall; and what is shown on the way is never taken back, nor held back without need."""
    assume(not any(a != b and a in b for a in stop for b in stop))  # the next test has those
    answer, shown = stream(pieces, stop, chunk, rest, end_token)
    expected, stopped = cut("".join(pieces) + rest, stop)
    assert answer.text == expected and answer.ended == (stopped or end_token)
    assert all(later.startswith(earlier) for earlier, later in zip(shown, shown[1:], strict=False))
    assert len(answer.tokens) == len(answer.log_probs) <= len(pieces) and END not in answer.tokens
    for n, text in enumerate(shown[:-2], start=1):
        so_far, stopped = cut("".join(pieces[: n * chunk]), stop)
        if not stopped:
            held = so_far.removeprefix(text)
            assert text + held == so_far and (not held or any(word.startswith(held) for word in stop))


@given(pieces=pieces, stop=stops)
@settings(max_examples=500, deadline=None)
@example(["abc"], ["abc", "b"])
def test_stop_strings_inside_each_other_end_an_answer_alike_however_the_pieces_fall(pieces, stop):
    whole, one_by_one = stream(["".join(pieces)], stop)[0], stream(list("".join(pieces)), stop)[0]
    assert stream(pieces, stop)[0].text == whole.text == one_by_one.text


@dataclass(frozen=True)
class Talk:
    """A model, two prompts, and the greedy text of each."""

    model: LanguageModel
    prompts: list[np.ndarray]
    texts: list[str]


@pytest.fixture(scope="module")
def talk(scramble):
    tokenizer = Tokenizer.characters("abcdefgh")
    config = ModelConfig(vocab_size=8, block_size=64, n_layer=1, n_head=2, n_embd=16, dtype="float32")
    params = scramble(config)
    model = LanguageModel("m", config, params, tokenizer, None, {}, frozenset(), {}, None, Path())
    prompts = [tokenizer.encode("abad"), tokenizer.encode("hg")]
    return Talk(model, prompts, [answer.text for answer in answers(model, prompts)[-1]])


def answers(model, prompts, stop=()):
    """Copies of all answers that are shown."""
    sampling = Sampling(temperature=1.0)
    return [
        [replace(answer, tokens=list(answer.tokens)) for answer in row]
        for row in model.answer(prompts, 40, sampling, [3, 4], stop)
    ]


def test_stop_strings_of_a_model(talk):
    assert all(len(text) == 40 and len(set(text)) >= 4 for text in talk.texts)
    stop = [talk.texts[0][22:26], talk.texts[1][7:9]]
    shown = answers(talk.model, talk.prompts, stop)
    for i, text in enumerate(talk.texts):
        expected, stopped = cut(text, stop)
        assert stopped and len(expected) < 38
        assert shown[-1][i].text == expected and shown[-1][i].ended
        assert all(expected.startswith(row[i].text) for row in shown)


def test_stop_tokens_of_a_model(talk):
    ids = [talk.model.tokenizer.encode(text).tolist() for text in talk.texts]
    end = ids[0][20]
    model = replace(talk.model, stop_tokens=frozenset({end}))
    for text, some, answer in zip(talk.texts, ids, answers(model, talk.prompts)[-1], strict=True):
        n = some.index(end) if end in some else len(some)
        assert answer.tokens == some[:n] and answer.text == text[:n] and answer.ended == (n < len(some))
