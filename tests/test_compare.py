"""Models side by side: one page with all that was asked and answered, whatever stands in names, prompts and answers."""

import base64
import html
import json
import re
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

import jax
import numpy as np
import pytest
import scipy.special
from test_evaluate import bigram

from gptjax.chat import sandbox
from gptjax.chat import template as chat
from gptjax.checkpoint import Checkpoints
from gptjax.compare import Arguments, main
from gptjax.config import Config, ModelConfig, TrainConfig
from gptjax.errors import UserError
from gptjax.hub.export import export
from gptjax.inference import comparison
from gptjax.inference.language_model import Answer, LanguageModel
from gptjax.model import GPT
from gptjax.tokenizer import Tokenizer

BLOCK, N_NEW = 32, 10
NASTY = "|`c`<script>&é"
PROMPTS = [NASTY, "Über", "a b"]  # the second has a character that the models of characters lack
TEMPERATURES = ["0", "0.8"]
CHAIN = "</pre>`"  # what a model made by hand says after anything else, and then "`" for ever
END = "~"  # of a chat model's answer
ALPHABET = sorted(set("\nab Ü" + NASTY + CHAIN + END + "[usb]" + "be brief"))
UNAWARE = [character if character != "Ü" else "Z" for character in ALPHABET]
# One architecture for all models, and so one compilation.
SIZES = {"vocab_size": len(ALPHABET), "block_size": BLOCK, "n_layer": 1, "n_head": 2, "n_embd": 32}
MODEL = ModelConfig(**SIZES, bias=True, tied_head=False, dtype="float32")
TEMPLATE = "{% for message in messages %}[{{ message.role[0] }}]{{ message.content }}{% endfor %}[b]"
PICTURE = b"\x89PNG and more <bytes>"


@pytest.fixture(scope="module", autouse=True)
def no_time_is_lost():
    """Each folder is loaded once, and templates are rendered in this process (tests/chat has theirs)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LanguageModel, "load", cache(LanguageModel.load))
        patch.setattr(chat, "render", lambda template, messages, _: sandbox.text(template, {"messages": messages}))
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory, scramble):
    """A run after its third step."""
    folder = tmp_path_factory.mktemp("runs") / "shakespeare"
    config = Config(model=MODEL, train=TrainConfig(batch_size=5))
    checkpoints = Checkpoints(folder / "checkpoints" / "best")
    checkpoints.save(3, {}, params=scramble(MODEL))
    checkpoints.close()
    (folder / "config.json").write_text(config.to_json())
    tokenizer_of(UNAWARE).save(folder / "tokenizer.json")
    (folder / "loss.png").write_bytes(PICTURE)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A Hugging Face folder with a name that HTML and Markdown could trip over, and answers of that kind."""
    folder = tmp_path_factory.mktemp("models") / "base|`x` <script>"
    folder.mkdir()
    export(folder, MODEL, bigram(MODEL, table()), "float32")
    tokenizer_of(UNAWARE).save(folder / "tokenizer.json")
    return folder


@pytest.fixture(scope="module")
def instruct(tmp_path_factory, scramble):
    """A chat model that reads every text."""
    folder = tmp_path_factory.mktemp("models") / "instruct"
    folder.mkdir()
    export(folder, MODEL, scramble(MODEL, seed=1), "float32")
    tokenizer_of(ALPHABET).save(folder / "tokenizer.json")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))
    return folder


def tokenizer_of(alphabet):
    return Tokenizer.from_characters({character: i for i, character in enumerate(alphabet)})


def table():
    """Log-probabilities of what follows: along the chain, at its end the end again, from elsewhere its beginning."""
    logits_VV = np.random.default_rng(0).normal(size=(len(ALPHABET), len(ALPHABET)))
    for i, character in enumerate(ALPHABET):
        follower = CHAIN[min(CHAIN.index(character) + 1, len(CHAIN) - 1)] if character in CHAIN else CHAIN[0]
        logits_VV[i, ALPHABET.index(follower)] += 6
    return scipy.special.log_softmax(logits_VV, axis=1)


def texts(element, tag, kind=None):
    """Of the elements inside with this tag and, if there is one, this class."""
    return ["".join(inside.itertext()) for inside in element.iter(tag) if kind in (None, inside.get("class"))]


def read_markdown(text):
    """The lines outside of fences, and each block in fences by the headings and the paragraph that it stands under."""
    outside, blocks, under, fence = [], {}, {}, None
    for line in text.split("\n"):
        if fence is None and (found := re.fullmatch("`{3,}", line)):
            fence, block = line, []
        elif fence is None:
            outside.append(line)
            if found := re.match("(##+) (.*)|(Temperature) ([^ ]+) ", line):
                under[found[1] or found[3]] = unescaped(found[2] or found[4])
        elif re.fullmatch(f"{fence}`*", line):
            blocks[under["##"], under["###"], under["Temperature"]], fence = "\n".join(block), None
        else:
            block.append(line)
    assert fence is None
    return outside, blocks


def unescaped(markdown):
    return html.unescape(re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", markdown))


@pytest.fixture(scope="module")
def pages(run, base, instruct, tmp_path_factory):
    """The command's two pages, as texts."""
    folder = tmp_path_factory.mktemp("pages")
    (folder / "prompts.txt").write_text("\n" + "\n\n".join(f" {prompt} " for prompt in PROMPTS), encoding="utf-8")
    out = folder / "new" / "page"
    arguments = ["--prompts", folder / "prompts.txt", "--temperature", *TEMPERATURES, "--max_new_tokens", N_NEW]
    main([str(run), str(base), str(instruct), *map(str, arguments), "--out", f"{out}.html"])
    assert sorted(path.name for path in out.parent.iterdir()) == ["page.html", "page.md"]
    return [Path(f"{out}.{kind}").read_text(encoding="utf-8") for kind in ("html", "md")]


@pytest.fixture(scope="module")
def page(pages):
    """The page of HTML, which is well-formed XML too."""
    return ElementTree.fromstring(pages[0])


@pytest.fixture(scope="module")
def answers(page):
    """(prompt, model, temperature) -> the answer on the page of HTML."""
    return {
        (texts(section, "h2")[0], texts(card, "h3")[0], temperature.split()[1]): answer
        for section in page.iter("section")
        for card in section.iterfind(".//div[@class='card']")
        for temperature, answer in zip(texts(card, "b"), texts(card, "pre"), strict=True)
    }


def test_both_pages_have_every_prompt_model_temperature_and_answer(pages, page, answers, run, base, instruct):
    outside, blocks = read_markdown(pages[1])
    names = [run.name, base.name, instruct.name]
    readable = {(p, n, t) for p in PROMPTS for n in names for t in TEMPERATURES if p != "Über" or n == "instruct"}
    assert set(answers) == set(blocks) == readable
    for (prompt, name, temperature), text in blocks.items():
        before = "" if name == "instruct" else prompt  # what a chat model is asked is no part of its text
        assert answers[prompt, name, temperature] == before + text
    assert texts(page, "h2") == names + PROMPTS and texts(page, "h3") == names * len(PROMPTS)
    headings = [unescaped(line) for line in outside if line.startswith("#")]
    expected = [[f"## {prompt}", *(f"### {name}" for name in names)] for prompt in PROMPTS]
    assert headings == ["# Models side by side", *sum(expected, [])]


def test_answers_are_the_models_own(answers, run, base, instruct):
    """Of the model made by hand they are known; the others' are computed as anything else does."""
    said = (CHAIN + "`" * N_NEW)[:N_NEW]
    assert [answers[prompt, base.name, "0"] for prompt in (NASTY, "a b")] == [NASTY + said, "a b" + said]
    for prompt in PROMPTS:
        assert answers[prompt, instruct.name, "0"] == greedy(instruct, f"[u]{prompt}[b]")
    assert answers[NASTY, run.name, "0"] == NASTY + greedy(run, NASTY)


def greedy(folder, text):
    """The likeliest continuation, each token by a forward pass of its own."""
    model, new = LanguageModel.load(str(folder)), []
    ids = model.tokenizer.prompt(text)
    while len(new) < N_NEW:
        window = np.append(ids, new).astype(np.int32)[-BLOCK:]
        likeliest = int(logits_of(model, window)[len(window) - 1].argmax())
        if likeliest in model.stop_tokens:
            break
        new.append(likeliest)
    return model.tokenizer.decode(new)


def logits_of(model, ids):
    padded = np.zeros((1, BLOCK), np.int32)
    padded[0, : len(ids)] = ids
    return np.asarray(forward(model.config, model.params, padded)[0], np.float64)


forward = jax.jit(lambda config, params, tokens_BT: GPT(config).apply({"params": params}, tokens_BT), static_argnums=0)


def test_the_page_needs_nothing_else_and_runs_nothing(page):
    for element in page.iter():  # no script and no link
        assert (
            element.tag
            in "html head meta title style body h1 h2 h3 div dl dt dd img section p b pre span footer".split()
        )
        assert set(element.keys()) <= {"class", "style", "lang", "charset", "name", "content", "src", "alt"}
        assert "http" not in "".join(element.attrib.values())
    [image], [style] = page.iter("img"), texts(page, "style")
    assert image.get("src") == "data:image/png;base64," + base64.b64encode(PICTURE).decode()
    assert "url(" not in style and "@import" not in style


def test_markdown_has_no_html_and_its_table_is_whole(pages, run, base, instruct):
    outside, _ = read_markdown(pages[1])
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in outside if line.startswith("|")]
    assert {len(row) for row in rows} == {4} and len(rows) == 2 + 7
    assert [unescaped(cell.strip()) for cell in rows[0]] == ["", run.name, base.name, instruct.name]
    assert not re.search(r"(?<!\\)<", "\n".join(outside))


def test_what_a_model_cannot_read_is_said_and_the_rest_goes_on(pages, page):
    [_, section, _], (outside, _) = page.iter("section"), read_markdown(pages[1])
    assert texts(page, "p", "problem") == texts(section, "p", "problem")
    assert ["no character 'Ü'" in problem for problem in texts(page, "p", "problem")] == [True] * 2
    assert sum("no character 'Ü'" in line for line in outside) == 2
    assert len(texts(section, "pre")) == len(TEMPERATURES)  # the chat model's


def test_cards_say_what_is_known(page, run):
    cards = page.findall(".//div[@class='card']")[:3]
    shown = [dict(zip(texts(card, "dt"), texts(card, "dd"), strict=True)) for card in cards]
    assert [facts["trained on"] for facts in shown] == [f"{3 * 5 * BLOCK} tokens", "not stated", "not stated"]
    assert [facts["asked as"].split()[1] for facts in shown] == ["text", "text", "chat"]
    assert {facts["tokenizer"] for facts in shown} == {f"characters, {len(ALPHABET)} tokens"}
    assert [len(texts(card, "img")) for card in cards] == [1, 0, 0]
    n_params = sum(leaf.size for leaf in jax.tree.leaves(LanguageModel.load(str(run)).params))
    assert shown[0]["parameters"] == f"{n_params:,}" and shown[0]["context"] == f"{BLOCK} tokens"


def test_a_seed_is_an_answer_but_not_at_temperature_0(run):
    model = LanguageModel.load(str(run))

    def answer(temperature, seed):
        reply = comparison.reply(model, NASTY, temperature, N_NEW, None, seed)
        assert reply.tokens_per_second > 0 and len(reply.answer.tokens) == N_NEW
        return reply.answer.text

    assert answer(0.0, 1) == answer(0.0, 2) != answer(1.5, 1) == answer(1.5, 1) != answer(1.5, 2)


def test_a_system_prompt_is_for_chat_models(instruct, run):
    for folder, prompt in ((instruct, "[s]be brief[u]a b[b]"), (run, "a b")):
        answer = comparison.reply(LanguageModel.load(str(folder)), "a b", 0.0, N_NEW, "be brief", 0).answer
        assert answer.text == greedy(folder, prompt)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompts", "nowhere.txt"], "nowhere.txt"),
        (["--prompts", "blank.txt"], "prompts=blank.txt has no prompts"),
        (["--prompts", "latin.txt"], "latin.txt is not UTF-8"),
        (["--temperature", "0", "-1"], "temperature=(0.0, -1.0)"),
        (["--max_new_tokens", "0"], "max_new_tokens=0 is not positive"),
        (["--seed", "-1"], "seed=-1 is not in"),
        (["no such model"], "'no such model' does not exist"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(run, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    Path("blank.txt").write_text(" \n\n\t\n")
    Path("latin.txt").write_bytes("é".encode("latin1"))
    with pytest.raises((UserError, FileNotFoundError)) as raised:
        main([*([] if arguments[0][0] != "-" else [str(run)]), *arguments])
    assert words in str(raised.value) and "\n" not in str(raised.value)
    assert not list(Path().glob("compare.*"))


def test_the_default_prompts_are_a_file_of_the_project():
    assert len(Arguments(models=("any",)).read_prompts()) == 3


@pytest.mark.parametrize("text", ["a\n```\nb", "\n````\n\n", "a ` b `` c", ""])
def test_a_fence_ends_where_the_answer_does(text):
    answer = comparison.Reply(Answer(text, [1], [-1.0]), 1.0)
    column = comparison.Column("name", {"asked as": "a chat"}, None, {("prompt", 0.5): answer}, {})
    assert read_markdown(comparison.to_markdown([column], ["prompt"], [0.5]))[1] == {("prompt", "name", "0.5"): text}
    assert texts(ElementTree.fromstring(comparison.to_html([column], ["prompt"], [0.5])), "pre") == [text]
