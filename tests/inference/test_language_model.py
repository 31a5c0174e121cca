"""sample.py in this process: how an answer ends, which rules it follows, what a conversation is."""

import io
import itertools
import json
import os
import shutil
from functools import cache, partial

import jax
import numpy as np
import pytest
import scipy.special

from gptjax import sample
from gptjax.chat import sandbox
from gptjax.chat import template as chat
from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.hub.export import export
from gptjax.inference import generate
from gptjax.inference.language_model import LanguageModel
from gptjax.inference.sampling import Sampling
from gptjax.model import GPT
from gptjax.tokenizer import Tokenizer

TEMPLATE = "{% for message in messages %}<{{ message.role[0] }}>{{ message.content }}\n{% endfor %}<a>"
QUESTIONS = ["abc, abc", "why?", "be that"]
BLOCK, N_NEW = 64, 8  # and as many tokens in an answer


@pytest.fixture(scope="module", autouse=True)
def each_folder_is_loaded_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LanguageModel, "load", cache(LanguageModel.load))
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory, scramble):
    """A model that attends far back and does not soon repeat itself, and its tokenizer, without other files."""
    folder = tmp_path_factory.mktemp("models") / "base"
    folder.mkdir()
    tokenizer = Tokenizer.train_bpe(["abc, abc why? be that the is to be " * 9], 280)
    sizes = {"vocab_size": tokenizer.vocab_size, "block_size": BLOCK, "n_layer": 1, "n_head": 2, "n_embd": 32}
    config = ModelConfig(**sizes, bias=True, tied_head=False, dtype="float32")
    params = scramble(config)
    for name, factor in (("query", 4), ("key", 4), ("out", 3)):
        params["layers"]["attention"][name]["kernel"] *= factor
    params["position_embedding"] *= 2
    params["head"] *= 3
    export(folder, config, params, "float32")
    tokenizer.save(folder / "tokenizer.json")
    return folder


def test_a_dtype_that_is_asked_for_changes_no_other_choice(base):
    for dtype in ("float32", "bfloat16"):
        config = LanguageModel.load(str(base), dtype=dtype).config
        assert (config.dtype, config.attention, config.layers) == (dtype, "plain", "looped")


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
                if name == "config":
                    content = json.loads((base / "config.json").read_text()) | content
                file_name = name + (".jinja" if name == "chat_template" else ".json")
                (made[key] / file_name).write_text(content if isinstance(content, str) else json.dumps(content))
        return made[key]

    return make


@pytest.fixture
def write(capsys):
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
    """What is printed in a conversation of these questions; templates are rendered in this process, for time."""
    monkeypatch.setattr(chat, "render", lambda template, messages, _: sandbox.text(template, {"messages": messages}))

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


@pytest.fixture(scope="module")
def model(base):
    return LanguageModel.load(str(base))


@pytest.fixture(scope="module")
def tokens(model):
    """The 24 that follow "abc" at temperature 0, each by a forward pass of its own."""
    prompt = ids = model.tokenizer.prompt("abc").tolist()
    for _ in range(24):
        ids = [*ids, int(log_probs_of(model, ids)[len(ids) - 1].argmax())]
    tokens = ids[len(prompt) :]
    assert len(set(tokens)) > 12 and not set(tokens) & model.stop_tokens
    return tokens


GREEDY = ["--temperature", 0, "--max_new_tokens", 24]
BRIEFLY = ["--temperature", 0, "--max_new_tokens", N_NEW]


def test_text_ends_before_a_stop_string(write, base, model, tokens):
    """Wherever that begins and ends, inside a token or across several; of more than one the first to appear."""
    whole = model.tokenizer.decode(tokens)
    assert write(base, "--prompt", "abc", *GREEDY) == "abc" + whole
    for length, at in itertools.product((1, 5), range(0, len(whole) - 5, 16)):
        stop = whole[at : at + length]
        stops = ["nowhere", whole[-2:] + "x", stop]
        assert write(base, "--prompt", "abc", *GREEDY, "--stop", *stops) == "abc" + whole[: whole.index(stop)]
    for stop in (whole[-3:] + "never", whole[-1] * 2 + "never"):  # what was held back is shown in the end
        assert write(base, "--prompt", "abc", *GREEDY, "--stop", stop) == "abc" + whole


def test_text_ends_before_a_stop_token(write, variant, model, tokens):
    """The makers name it by number or by text, one or several."""
    one, other = [token for i, token in enumerate(tokens) if token not in tokens[:i]][4:10:5]
    named = next(token for token in tokens if model.tokenizer.token_id(model.tokenizer.decode([token])) == token)
    name = model.tokenizer.decode([named])
    for files, ends in (
        ({"generation_config": {"eos_token_id": [one, other]}}, {one, other}),
        ({"generation_config": {"eos_token_id": other}, "tokenizer_config": {}}, {other}),
        ({"generation_config": {"eos_token_id": None}}, set()),
        ({"config": {"eos_token_id": one}}, {one}),
        ({"config": {"eos_token_id": [one, other]}, "generation_config": {"top_k": 3}}, {one, other}),
        ({"config": {"eos_token_id": one}, "generation_config": {"eos_token_id": other}}, {other}),
        ({"tokenizer_config": {"eos_token": name}}, {named}),
        ({"tokenizer_config": {"eos_token": {"content": name}}}, {named}),
    ):
        assert LanguageModel.load(str(variant(**files))).stop_tokens == ends | {model.tokenizer.end_of_text}
    shown = tokens[: min(tokens.index(one), tokens.index(other))]
    folder = variant(generation_config={"eos_token_id": [one, other]})
    assert write(folder, "--prompt", "abc", *GREEDY) == "abc" + model.tokenizer.decode(shown)


def test_log_probabilities_are_the_models_own(write, base, model):
    """Before temperature and rules, here top_k 200; to the four places that are printed."""
    prompts = ["abc", "why? be that"]
    options = ["--temperature", 1.5, "--max_new_tokens", 20, "--seed", 3]
    printed = write(base, "--prompt", *prompts, *options, "--log_probs").split("\n\n")
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
GIVEN = {"temperature": 0.0, "top_k": 0, "top_p": 0.5, "repetition_penalty": 2.0}


@pytest.mark.parametrize(
    ("makers", "given", "expected"),
    [
        ({"eos_token_id": 7, "do_sample": True, "temperature": None}, {}, USUAL),
        ({}, GIVEN, GIVEN),
        (THEIRS, {}, THEIRS),
        (THEIRS, GIVEN | {"top_p": 1.0}, GIVEN | {"top_p": 1.0}),
        ({"top_p": 1, "temperature": 1}, {}, USUAL | {"temperature": 1.0, "top_k": 0}),
        (THEIRS | {"do_sample": False}, {}, THEIRS | {"temperature": 0.0}),
        ({"do_sample": False}, {"temperature": 0.5}, USUAL | {"temperature": 0.5, "top_k": 0}),
    ],
)
def test_rules_are_those_given_then_the_makers_then_the_usual(variant, makers, given, expected):
    model = LanguageModel.load(str(variant(generation_config=makers)))
    assert model.sampling(**sample.Arguments(**given).rules) == Sampling(**expected)


@pytest.mark.parametrize("values", [{"temperature": "hot"}, {"top_k": -3}, {"top_p": 1.5}, {"eos_token_id": [[1]]}])
def test_a_makers_mistake_is_named(variant, values):
    with pytest.raises(UserError, match=f"generation_config.json: {next(iter(values))}="):
        LanguageModel.load(str(variant(generation_config=values)))


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
    options = ["--max_new_tokens", N_NEW, "--seed", 5]
    texts, _ = anew(instruct, QUESTIONS, seed=5)
    assert talk(instruct, QUESTIONS, *options) == "\n".join(texts)
    assert len(set(texts)) == 3 and any("a" in text for text in texts)
    stopped, _ = anew(instruct, QUESTIONS, seed=5, stop=["a"])
    assert talk(instruct, QUESTIONS, *options, "--stop", "a") == "\n".join(stopped)
    assert not any("a" in text for text in stopped)
    told, _ = anew(instruct, QUESTIONS, seed=5, system="be brief")
    assert talk(instruct, QUESTIONS, *options, "--system", "be brief") == "\n".join(told) != "\n".join(texts)


def test_a_conversation_reads_only_what_is_new_and_may_outgrow_the_block(talk, instruct, monkeypatch):
    """But for a token or two where texts meet."""
    texts, prompts = anew(instruct, QUESTIONS * 2, temperature=0.0)
    assert len(prompts[1]) < len(prompts[2]) < BLOCK < len(prompts[-2])
    prefill, n_read = generate.prefill, []
    monkeypatch.setattr(generate, "prefill", lambda *a: n_read.append(int(a[-1][0])) or prefill(*a))
    assert talk(instruct, QUESTIONS * 2, *BRIEFLY) == "\n".join(texts)
    assert n_read[0] == len(prompts[0])
    for n, before, prompt in zip(n_read[1:3], prompts, prompts[1:], strict=False):
        assert 0 < n <= len(prompt) - len(before) + 2


def test_special_tokens_of_a_prompt_are_text_unless_asked_for(write, base, model):
    text = "abc<|endoftext|>"
    ids = {"": model.tokenizer.encode(text), "--special": model.tokenizer.encode(text, special=True)}
    assert len(ids["--special"]) < len(ids[""]) - 3
    for option, prompt in ids.items():
        *_, [answer] = model.answer([prompt], N_NEW, Sampling(temperature=0.0), [0])
        assert write(base, "--prompt", text, *BRIEFLY, *option.split()) == text + answer.text


def test_a_byte_order_mark_and_bytes_that_are_no_text(write, instruct, tmp_path, monkeypatch):
    """The mark is not read; in a conversation such bytes become the replacement character."""
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbfabc")
    expected = write(instruct, "--prompt", "abc", *BRIEFLY)
    assert write(instruct, "--prompt_file", tmp_path / "bom.txt", *BRIEFLY) == expected

    def typed(data):
        return io.TextIOWrapper(io.BytesIO(data), encoding="utf-8")

    with open(tmp_path / "bom.txt", "rb") as file:
        kept = os.dup(0)
        os.dup2(file.fileno(), 0)
        assert write(instruct, "--prompt_file", "-", *BRIEFLY) == expected
        os.dup2(kept, 0)
        os.close(kept)
    monkeypatch.setattr(chat, "render", lambda template, messages, _: sandbox.text(template, {"messages": messages}))
    monkeypatch.setattr("sys.stdin", typed(b"\xef\xbb\xbfabc\nw\xffhy\n\n"))
    assert write(instruct, "--chat", *BRIEFLY) == "\n".join(anew(instruct, ["abc", "w\ufffdhy"], temperature=0.0)[0])


def test_a_draft_changes_no_greedy_text(write, talk, base, instruct):
    options = ["--prompt", "To be", "--temperature", 0, "--max_new_tokens", 50]
    assert write(base, *options, "--draft", instruct) == write(base, *options)
    assert talk(instruct, QUESTIONS[:2], *BRIEFLY, "--draft", base) == talk(instruct, QUESTIONS[:2], *BRIEFLY)


def test_a_draft_of_other_tokens_is_refused_before_a_word_is_said(base, tmp_path, capsys):
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
    options = ["--prompt", "To be", *BRIEFLY, "--log_probs"]
    exact, rounded = [
        [float(line.split()[0]) for line in write(base, *options, "--dtype", dtype).splitlines()]
        for dtype in ("auto", "int8")
    ]
    assert exact != rounded and abs(exact[0] - rounded[0]) < 0.1


def test_an_empty_line_or_the_end_of_input_ends_a_conversation(talk, instruct):
    def lines():
        yield QUESTIONS[0]
        raise EOFError

    texts = anew(instruct, QUESTIONS[:1], temperature=0.0)[0]
    for questions in ([f" {QUESTIONS[0]} ", "  ", "more"], lines()):
        assert talk(instruct, questions, *BRIEFLY) == texts[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--temperature -1", "temperature=-1.0 is negative"),
        ("--top_p 1.1", "top_p=1.1 is not in [0, 1]"),
        ("--repetition_penalty 0", "repetition_penalty=0.0 is not positive"),
        ("--max_new_tokens 0", "max_new_tokens=0 is not positive"),
        ("--seed 4294967296", "seed=4294967296 is not below"),
        ("--stop=", "stop=('',)"),
        ("--prompt a --prompt_file b", "prompt=('a',) and prompt_file"),
        ("--prompt_file nowhere.txt", "nowhere.txt"),
        ("--chat --prompt a", "chat=True"),
        ("--num_samples 1000000000", "num_samples=1000000000"),
        ("--chat --num_samples 2", "chat=True"),
        ("--chat --log_probs", "chat=True"),
        ("--chat", "base is not a chat model: it has no chat template"),
        ("--system brief", "system='brief'"),
        ("--chat --special", "special=True"),
        ("--temprature 1", "did you mean --temperature?"),
        ("--run nowhere/at/all", "'nowhere/at/all' does not exist"),
        ("--draft somewhere --num_samples 2", "draft='somewhere'"),
        ("--draft nowhere/at/all", "'nowhere/at/all' does not exist"),
    ],
)
def test_a_mistake_is_one_line(base, arguments, words):
    with pytest.raises((UserError, FileNotFoundError)) as raised:
        sample.main(["--run", str(base), *arguments.split()])
    assert words in str(raised.value) and "\n" not in str(raised.value)
