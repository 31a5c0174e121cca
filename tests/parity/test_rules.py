"""The rules of sampling leave the tokens and probabilities that `transformers` leaves; stop strings end an answer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from gptjax.inference.language_model import AnswerBuilder
from gptjax.inference.sampling import Sampling, apply_rules, seen_tokens
from gptjax.tokenizer import TextStream

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
    "top_k": [1, 2, 17, 100, 101, 10_000],
    "top_p": [0.0, 1e-6, 0.3, 0.9, 0.999],
    "min_p": [1e-6, 0.05, 0.5, 1.0],
}
ONE_STAYS = [{"top_k": 1}, {"top_p": 0.0}, {"top_p": 1e-6}, {"min_p": 1.0}]
apply_compiled = jax.jit(apply_rules)


def draw(seed):
    """Logits of sixteen rows, and the text so far of each: some of the 101 tokens twice, most not at all."""
    rng = np.random.default_rng(seed)
    return (3 * rng.standard_normal((16, 101))).astype(np.float32), rng.integers(0, 101, (16, 33))


def assert_same_rules(rules, logits_BV, text_BT):
    """Returns the probabilities."""
    scores, clear_B = torch.from_numpy(logits_BV.copy()), np.ones(len(logits_BV), bool)
    for name, make in THEIRS.items():
        if name in rules:
            if name == "top_p":  # a sum of probabilities that is top_p up to rounding falls on either side
                sums_BV = scores.double().softmax(-1).sort(descending=True)[0].cumsum(-1).numpy()
                clear_B = np.abs(sums_BV - rules[name]).min(axis=1) > 1e-6
            scores = make(rules[name])(torch.from_numpy(text_BT), scores)
    assert clear_B.sum() >= 12
    sampling = Sampling(**rules)
    ours_BV = apply_compiled(jnp.asarray(logits_BV), seen_tokens(sampling, list(text_BT), 101), sampling)
    assert not np.isneginf(ours_BV).all(axis=1).any()
    ours_BV, scores = np.asarray(ours_BV)[clear_B], scores[clear_B]
    np.testing.assert_array_equal(np.isneginf(ours_BV), np.isneginf(scores.numpy()))
    # Sums of probabilities in another order: 1e-7 of 1. Logits of 10 divided by 0.05 are float32's 200 +- 1e-5.
    atol = 1e-6 / min(rules.get("temperature", 1.0), 1.0)
    np.testing.assert_allclose(jax.nn.softmax(ours_BV), scores.softmax(-1).numpy(), rtol=0, atol=atol)
    return scores.softmax(-1).numpy()


@pytest.mark.parametrize("rules", [{name: value} for name, values in VALUES.items() for value in values], ids=str)
def test_each_rule_alone(rules):
    probabilities_BV = assert_same_rules(rules, *draw(0))
    assert rules not in ONE_STAYS or ((probabilities_BV > 0).sum(axis=1) == 1).all()


@pytest.mark.parametrize("seed", range(20))
def test_rules_in_a_chain(seed):
    rng = np.random.default_rng(seed)
    chosen = [name for name in THEIRS if rng.random() < 0.75]
    logits_BV, text_BT = draw(seed)
    if seed % 2:
        logits_BV[:, -7:] = -np.inf  # padding
    assert_same_rules({name: VALUES[name][rng.integers(len(VALUES[name]))] for name in chosen}, logits_BV, text_BT)


def test_the_order_of_rules_matters():
    """Else the chains above would not tell one order from another."""
    first = assert_same_rules({"temperature": 3.0, "top_p": 0.5}, *draw(0))
    second = assert_same_rules({"top_p": 0.5}, *draw(0))
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
@settings(max_examples=300, deadline=None)
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
@settings(max_examples=300, deadline=None)
@example(["abc"], ["abc", "b"])
def test_stop_strings_inside_each_other_end_an_answer_alike_however_the_pieces_fall(pieces, stop):
    whole, one_by_one = stream(["".join(pieces)], stop)[0], stream(list("".join(pieces)), stop)[0]
    assert stream(pieces, stop)[0].text == whole.text == one_by_one.text
