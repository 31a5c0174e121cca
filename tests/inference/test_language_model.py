"""sample.py in this process: how it stops, what it remembers of a conversation, which rules it follows."""

import importlib.util
import itertools
import json
import shutil
from functools import cache, partial
from pathlib import Path

import jax
import numpy as np
import pytest
import scipy.special

from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.hub.export import export
from gptjax.inference import chat_template as chat
from gptjax.inference import generate
from gptjax.inference.generate import PrefixCache
from gptjax.inference.language_model import LanguageModel
from gptjax.inference.sampling import Sampling
from gptjax.model import GPT
from gptjax.tokenizer import Tokenizer

TEMPLATE = (
    "{% for message in messages %}<{{ message.role[0] }}>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)
QUESTIONS = ["abc, abc", "why?", "be that"]
BLOCK, N_NEW = 64, 8  # and as many tokens in an answer


@pytest.fixture(scope="module", autouse=True)
def no_time_is_lost():
    """Half of it would be XLA's optimizations, and much of the rest loading one folder again and again."""
    jax.config.update("jax_disable_most_optimizations", True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LanguageModel, "load", cache(LanguageModel.load))
        yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def sample():
    spec = importlib.util.spec_from_file_location("sample", Path(__file__).parents[2] / "sample.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


@pytest.fixture(scope="module")
def base(tmp_path_factory, scramble):
    """A model that looks back and does not soon repeat itself, and a tokenizer; how to use it nobody says."""
    folder = tmp_path_factory.mktemp("models") / "base"
    folder.mkdir()
    tokenizer = Tokenizer.train_bpe(["abc, abc why? be that the is to be " * 9], 280)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        block_size=BLOCK,
        n_layer=1,
        n_head=2,
        n_embd=32,
        bias=True,
        tied_head=False,
        dtype="float32",
    )
    params = scramble(config)
    for name, factor in (("query", 4), ("key", 4), ("out", 3)):
        params["layers"]["attention"][name]["kernel"] *= factor
    params["position_embedding"] *= 2
    params["head"] *= 3
    export(folder, config, params, "float32")
    tokenizer.save(folder / "tokenizer.json")
    return folder


@pytest.fixture(scope="module")
def variant(base):
    """The folder again, with other files beside the weights."""
    made = {}

    def make(**files):
        key = json.dumps(files)
        if key not in made:
            made[key] = base.with_name(f"variant{len(made)}")
            shutil.copytree(base, made[key])
            for name, content in files.items():
                file_name = name + (".jinja" if name == "chat_template" else ".json")
                (made[key] / file_name).write_text(content if isinstance(content, str) else json.dumps(content))
        return made[key]

    return make


@pytest.fixture
def write(sample, capsys):
    """What sample.py prints, without the new line at the end."""

    def write(folder, *arguments):
        capsys.readouterr()
        sample.main(["--run", str(folder), *map(str, arguments)])
        out = capsys.readouterr().out
        assert out.endswith("\n")
        return out[:-1]

    return write


@pytest.fixture
def talk(write, monkeypatch):
    """What is printed in a conversation of these questions, one text for each answer."""
    render = chat.render

    def in_process(template, messages, variables):
        values = {**variables, "messages": list(messages), "add_generation_prompt": True}
        return chat._text(template, values)

    assert render(TEMPLATE, [{"role": "user", "content": "x"}], {}) == in_process(
        TEMPLATE, [{"role": "user", "content": "x"}], {}
    )
    monkeypatch.setattr(chat, "render", in_process)

    def talk(folder, questions, *arguments):
        lines = itertools.chain(questions, [""])
        monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
        return write(folder, "--chat", *arguments)

    return talk


@partial(jax.jit, static_argnums=0)
def logits_of(config, params, tokens_BT):
    return GPT(config).apply({"params": params}, tokens_BT)


def log_probs_of(model, ids):
    """Of every token after each place, in float64 from one forward pass."""
    padded = np.zeros((1, BLOCK), np.int32)
    padded[0, : len(ids)] = ids
    return scipy.special.log_softmax(np.asarray(logits_of(model.config, model.params, padded)[0], np.float64), axis=1)


def likeliest(model, ids, n):
    """The n tokens that follow at temperature 0, each by a forward pass of its own."""
    ids = list(ids)
    for _ in range(n):
        ids.append(int(log_probs_of(model, ids)[len(ids) - 1].argmax()))
    return ids[-n:]


@pytest.fixture(scope="module")
def model(base):
    return LanguageModel.load(str(base))


@pytest.fixture(scope="module")
def tokens(model):
    """The 24 that follow "abc" at temperature 0, by hand."""
    tokens = likeliest(model, model.tokenizer.prompt("abc"), 24)
    assert len(set(tokens)) > 12 and not set(tokens) & model.stop_tokens
    return tokens


GREEDY = ["--temperature", 0, "--max_new_tokens", 24]
BRIEFLY = ["--temperature", 0, "--max_new_tokens", N_NEW]


def test_text_is_what_the_model_says(write, base, model, tokens):
    assert write(base, "--prompt", "abc", *GREEDY) == "abc" + model.tokenizer.decode(tokens)


@pytest.mark.parametrize("length", [1, 2, 5])
def test_it_stops_before_a_text(write, base, model, tokens, length):
    """Wherever that begins and ends, inside a token or across several; of more than one the first to appear."""
    whole = model.tokenizer.decode(tokens)
    for at in range(0, len(whole) - length, 16):
        stop = whole[at : at + length]
        expected = "abc" + whole[: whole.index(stop)]
        assert write(base, "--prompt", "abc", *GREEDY, "--stop", stop) == expected
        assert write(base, "--prompt", "abc", *GREEDY, "--stop", "nowhere", whole[-2:] + "x", stop) == expected


def test_what_might_have_been_a_stop_is_shown_in_the_end(write, base, model, tokens):
    whole = model.tokenizer.decode(tokens)
    for stop in (whole[-3:] + "never", whole[5:9] + "never", whole[-1] * 2 + "never"):
        assert write(base, "--prompt", "abc", *GREEDY, "--stop", stop) == "abc" + whole


def test_it_stops_at_the_tokens_that_the_makers_name(write, variant, model, tokens):
    """By number or by name, one or several; that token is not shown."""
    firsts = [token for i, token in enumerate(tokens) if token not in tokens[:i]]
    one, other = firsts[9], firsts[4]
    name = next(text for text in map(model.tokenizer.decode, [[t] for t in firsts[3:]]) if text.isascii())
    for files, ends in (
        ({"generation_config": {"eos_token_id": one}}, {one}),
        ({"generation_config": {"eos_token_id": [one, other]}}, {one, other}),
        ({"generation_config": {"eos_token_id": [other]}, "tokenizer_config": {}}, {other}),
        ({"generation_config": {"eos_token_id": None}}, set()),
        ({"tokenizer_config": {"eos_token": name}}, {model.tokenizer.token_id(name)}),
        ({"tokenizer_config": {"eos_token": {"content": name}}}, {model.tokenizer.token_id(name)}),
    ):
        shown = list(itertools.takewhile(lambda token, ends=ends: token not in ends, tokens))
        assert None not in ends and (not ends or 0 < len(shown) < 24)
        assert write(variant(**files), "--prompt", "abc", *GREEDY) == "abc" + model.tokenizer.decode(shown)


def test_log_probabilities_are_the_models_own(write, base, model):
    """Before temperature and rules, here top_k 200; to the four places that are printed."""
    prompts = ["abc", "why? be that"]
    options = ["--temperature", 1.5, "--max_new_tokens", 20, "--seed", 3]
    printed = write(base, "--prompt", *prompts, *options, "--log_probs").split("\n\n")
    assert len(printed) == 2
    ids = [model.tokenizer.prompt(prompt) for prompt in prompts]
    *_, answers = model.answer(ids, 20, Sampling(temperature=1.5, top_k=200), [3, 3])
    for lines, prompt, answer in zip(printed, ids, answers, strict=True):
        text = np.append(prompt, answer.tokens)
        log_probs_TV = log_probs_of(model, text)
        expected = log_probs_TV[np.arange(len(prompt) - 1, len(text) - 1), text[len(prompt) :].astype(int)]
        assert expected.min() < -1.5 and len(answer.tokens) == 20
        shown = [float(line[:9]) for line in lines.split("\n")]
        np.testing.assert_allclose(shown, expected, rtol=0, atol=1e-4)
        assert [line[11:] for line in lines.split("\n")] == [repr(model.tokenizer.decode([t])) for t in answer.tokens]


def test_several_prompts_are_as_each_alone(write, base):
    """Of unequal lengths; each further sample has the next seed."""
    prompts = ["abc", "why? be that is the abc"]
    options = ["--temperature", 0.9, "--max_new_tokens", 8]
    one, other, next_one = [
        write(base, "--prompt", prompt, "--seed", seed, *options)
        for prompt, seed in ((prompts[0], 5), (prompts[1], 5), (prompts[0], 6))
    ]
    assert len({one, other, next_one}) == 3
    bar = "\n---------------\n"
    assert write(base, "--prompt", *prompts, "--seed", 5, *options) == one + bar + other
    assert write(base, "--prompt", prompts[0], "--seed", 5, "--num_samples", 2, *options) == one + bar + next_one


USUAL = {"temperature": 0.8, "top_k": 200, "top_p": 1.0, "repetition_penalty": 1.0}
THEIRS = {"temperature": 0.6, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.1}


@pytest.mark.parametrize(
    ("makers", "given", "expected"),
    [
        ({}, {}, USUAL),
        ({"eos_token_id": 7, "do_sample": True}, {}, USUAL),
        ({"temperature": None}, {}, USUAL),
        ({}, {"temperature": 0.3, "top_k": 0, "top_p": 0.5, "repetition_penalty": 2.0}, None),
        (THEIRS, {}, THEIRS),
        (THEIRS, {"temperature": 1.0}, THEIRS | {"temperature": 1.0}),
        (
            THEIRS,
            {"temperature": 0.0, "top_k": 0, "top_p": 1.0},
            THEIRS | {"temperature": 0.0, "top_k": 0, "top_p": 1.0},
        ),
        ({"top_p": 0.9}, {}, USUAL | {"top_p": 0.9, "top_k": 0}),
        (THEIRS | {"do_sample": False}, {}, THEIRS | {"temperature": 0.0}),
        ({"do_sample": False}, {}, USUAL | {"temperature": 0.0, "top_k": 0}),
        ({"do_sample": False}, {"temperature": 0.5}, USUAL | {"temperature": 0.5, "top_k": 0}),
    ],
)
def test_rules_are_those_given_then_the_makers_then_the_usual(sample, variant, makers, given, expected):
    model = LanguageModel.load(str(variant(generation_config=makers)))
    assert sample.Arguments(**given).sampling(model) == Sampling(**(given if expected is None else expected))


def test_makers_rules_are_followed(write, variant, base, tokens, model):
    options = ["--prompt", "abc", "--max_new_tokens", 24]
    assert write(
        variant(generation_config={"do_sample": False, "temperature": 0.7, "top_k": 200}), *options
    ) == "abc" + (model.tokenizer.decode(tokens))
    given = itertools.chain(*((f"--{name}", value) for name, value in THEIRS.items()))
    theirs = write(variant(generation_config=THEIRS), *options)
    assert theirs == write(base, *options, *given) != write(base, *options)


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -1.0},
        {"temperature": "hot"},
        {"top_k": "50"},
        {"top_k": -3},
        {"top_p": 1.5},
        {"repetition_penalty": 0.0},
        {"eos_token_id": [[1]]},
    ],
)
def test_a_makers_mistake_is_named(write, variant, values):
    with pytest.raises(UserError, match="generation_config.json"):
        write(variant(generation_config=values), "--prompt", "abc", "--max_new_tokens", 4)


def test_whole_numbers_are_numbers(write, variant):
    folder = variant(generation_config={"temperature": 1, "top_k": 200, "top_p": 1, "repetition_penalty": 1})
    assert write(folder, "--prompt", "abc", "--max_new_tokens", 4).startswith("abc")


@pytest.fixture(scope="module")
def instruct(variant, tokens):
    return variant(chat_template=TEMPLATE, generation_config={"eos_token_id": tokens[5]})


def anew(folder, questions, temperature=0.8, seed=1337, system=None, stop=()):
    """The answers of a conversation in which each is computed from all that was said before, and the prompts."""
    model, texts, prompts = LanguageModel.load(str(folder)), [], []
    messages = [{"role": "system", "content": system}] if system else []
    rules = Sampling(temperature=temperature, top_k=200)
    for turn, question in enumerate(questions):
        messages.append({"role": "user", "content": question})
        prompts.append(model.chat_prompt(messages))
        *_, [answer] = model.answer([prompts[-1]], N_NEW, rules, [seed + turn], stop)
        texts.append(answer.text)
        messages.append({"role": "assistant", "content": answer.text})
    return texts, prompts


def test_a_conversation_is_as_if_all_of_it_were_read_for_each_answer(talk, instruct):
    """Each answer has the next seed, and is in the next prompt as it was shown."""
    texts, _ = anew(instruct, QUESTIONS, seed=5)
    assert talk(instruct, QUESTIONS, "--max_new_tokens", N_NEW, "--seed", 5) == "\n".join(texts)
    assert len(set(texts)) == 3 and any("a" in text for text in texts)
    texts, _ = anew(instruct, QUESTIONS, seed=5, stop=["a"])
    assert talk(instruct, QUESTIONS, "--max_new_tokens", N_NEW, "--seed", 5, "--stop", "a") == "\n".join(texts)
    assert not any("a" in text for text in texts)


def test_a_conversation_may_outgrow_the_block(talk, instruct):
    texts, prompts = anew(instruct, QUESTIONS * 2, temperature=0.0)
    assert len(prompts[1]) < BLOCK < len(prompts[-2])
    assert talk(instruct, QUESTIONS * 2, *BRIEFLY) == "\n".join(texts)


def test_what_was_read_is_remembered(talk, instruct, monkeypatch):
    """Of each further prompt only what is new is read, but for a token or two where texts meet."""
    _, prompts = anew(instruct, QUESTIONS, temperature=0.0)
    prefill, read = generate.prefill, []

    def note(*arguments):
        read.append(int(arguments[-1].sum()))
        return prefill(*arguments)

    monkeypatch.setattr(generate, "prefill", note)
    talk(instruct, QUESTIONS, *BRIEFLY)
    assert len(read) == 3 and read[0] == len(prompts[0])
    for n_read, before, prompt in zip(read[1:], prompts, prompts[1:], strict=False):
        assert 0 < n_read <= len(prompt) - len(before) + 2


@pytest.mark.parametrize(("length", "n"), [(20, 7), (16, 16), (20, 12), (48, 18)])
def test_a_memory_changes_no_probability(model, length, n):
    """Also where the first answer fills the cache to its last place."""
    rng, memory, greedy = np.random.default_rng(length), PrefixCache(), Sampling(temperature=0.0, top_k=200)
    prompt = rng.integers(20, 270, length).astype(np.int32)
    for _ in range(3):
        *_, [answer] = model.answer([prompt], n, greedy, [0], prefix=memory)
        *_, [again] = model.answer([prompt], n, greedy, [0])
        np.testing.assert_allclose(answer.log_probs, again.log_probs, rtol=0, atol=1e-4)
        assert answer.tokens == again.tokens and len(answer.tokens) > 0
        prompt = np.concatenate([prompt, answer.tokens, rng.integers(20, 270, 3)]).astype(np.int32)[:BLOCK]


def test_the_system_is_told_first(talk, instruct):
    texts, _ = anew(instruct, QUESTIONS[:2], temperature=0.0, system="be brief")
    assert talk(instruct, QUESTIONS[:2], *BRIEFLY, "--system", "be brief") == "\n".join(texts)
    assert texts != anew(instruct, QUESTIONS[:2], temperature=0.0)[0]


def test_a_draft_changes_no_greedy_text(write, talk, base, instruct):
    options = ["--prompt", "To be", "--temperature", 0, "--max_new_tokens", 50]
    assert write(base, *options, "--draft", instruct) == write(base, *options)
    assert talk(instruct, QUESTIONS[:2], *BRIEFLY, "--draft", base) == talk(instruct, QUESTIONS[:2], *BRIEFLY)


def test_a_draft_of_other_tokens_is_refused_before_a_word_is_said(sample, base, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(base, other)
    spec = json.loads((other / "tokenizer.json").read_text())
    vocabulary = spec["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(UserError, match="draft=other has other tokens than base"):
        sample.main(["--run", str(base), "--prompt", "To be", "--draft", str(other)])
    assert capsys.readouterr().out == ""


def test_int8_says_much_the_same(write, base):
    options = ["--prompt", "To be", "--temperature", 0, "--max_new_tokens", 30, "--log_probs"]
    exact, rounded = [
        [float(line.split()[0]) for line in write(base, *options, *more).splitlines()]
        for more in ([], ["--dtype", "int8"])
    ]
    assert exact != rounded and abs(exact[0] - rounded[0]) < 0.1


def test_the_end_of_input_ends_it(talk, instruct, monkeypatch):
    texts, _ = anew(instruct, QUESTIONS[:1], temperature=0.0)
    assert talk(instruct, [f" {QUESTIONS[0]} ", "  ", "more"], *BRIEFLY) == texts[0]

    def lines():
        yield QUESTIONS[0]
        raise EOFError

    assert talk(instruct, lines(), *BRIEFLY) == texts[0]


def test_a_base_model_holds_no_conversation(talk, base):
    with pytest.raises(UserError, match="base is not a chat model"):
        talk(base, QUESTIONS)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--temperature -1", "temperature=-1.0 is negative"),
        ("--temperature warm", "'warm' is not a number"),
        ("--top_k -1", "top_k=-1 is negative"),
        ("--top_k 1.5", "'1.5' is not an integer"),
        ("--top_p 1.1", "top_p=1.1 is not in [0, 1]"),
        ("--min_p -0.1", "min_p=-0.1 is not in [0, 1]"),
        ("--repetition_penalty 0", "repetition_penalty=0.0 is not positive"),
        ("--max_new_tokens 0", "max_new_tokens=0 is not positive"),
        ("--num_samples 0", "num_samples=0 is not positive"),
        ("--seed -1", "seed=-1 is negative"),
        ("--seed 4294967296", "seed=4294967296 is not below"),
        ("--checkpoint first", "'first' is not"),
        ("--stop=", "stop=('',) has an empty text"),
        ("--prompt a --prompt_file b", "prompt=('a',) and prompt_file cannot both be given"),
        ("--prompt_file nowhere.txt", "prompt_file=nowhere.txt"),
        ("--chat --prompt a", "chat=True reads its prompts from the terminal"),
        ("--chat --num_samples 2", "chat=True reads its prompts from the terminal"),
        ("--chat --log_probs", "chat=True reads its prompts from the terminal"),
        ("--system brief", "system='brief' needs --chat"),
        ("--temprature 1", "did you mean --temperature?"),
        ("--run nowhere/at/all", "'nowhere/at/all' does not exist"),
        ("--draft somewhere --num_samples 2", "draft='somewhere' works for one sample of one prompt"),
        ("--draft nowhere/at/all", "'nowhere/at/all' does not exist"),
    ],
)
def test_a_mistake_is_one_line(sample, base, arguments, words):
    with pytest.raises(UserError) as raised:
        sample.main(["--run", str(base), *arguments.split()])
    assert words in str(raised.value) and "\n" not in str(raised.value)
