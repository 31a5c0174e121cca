"""Evaluation: every token counts once with the context it should have, and the right answers are known by hand."""

import json
import math
from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import tokenizers

from gptjax.config import Config, MeshConfig, ModelConfig, TrainConfig
from gptjax.data.prepare import Dataset
from gptjax.data.token_files import Tokens, write_tokens
from gptjax.errors import UserError
from gptjax.evaluate import main
from gptjax.hub.export import export
from gptjax.inference.evaluation import hellaswag, read_tokens, text_loss
from gptjax.inference.language_model import LanguageModel
from gptjax.loop import Run, validation_loss
from gptjax.model import GPT, param_shapes
from gptjax.sharding import make_mesh
from gptjax.tokenizer import Tokenizer
from gptjax.training import compile_steps

ALPHABET = "\n .abcdefgé你"
BLOCK = 12
CONFIG = ModelConfig(
    vocab_size=len(ALPHABET), block_size=BLOCK, n_layer=1, n_head=2, n_embd=16, bias=True, dtype="float32"
)


@pytest.fixture(scope="module", autouse=True)
def each_folder_is_loaded_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LanguageModel, "load", cache(LanguageModel.load))
        yield


def model_of(config, params, tokenizer, folder):
    return LanguageModel("model", config, params, tokenizer, None, {}, frozenset(), {}, None, folder)


@pytest.fixture(scope="module")
def model(scramble, tmp_path_factory):
    """Weights far from their initialization, so that a token too much or too little of context shows."""
    params = scramble(CONFIG)
    params["position_embedding"] *= 3
    return model_of(CONFIG, params, Tokenizer.characters(ALPHABET), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def folder(model):
    export(model.folder, model.config, model.params, "float32")
    model.tokenizer.save(model.folder / "tokenizer.json")
    return model.folder


def bigram(config, log_probs_VV):
    """Parameters for a next token that depends on the last one alone: attention and MLP are off, the head is the table.

    The embedding of token i is 100 at place i, of which LayerNorm makes a (e_i - 1 / D); its bias adds the a / D again.
    """
    (n, _), width = log_probs_VV.shape, config.n_embd
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), param_shapes(config))
    a = width / math.sqrt(width - 1)
    params["token_embedding"] = 100 * jnp.eye(n, width)
    params["final_norm"] = {"scale": jnp.ones(width), "bias": jnp.full(width, a / width)}
    params["head"] = params["head"].at[:, :n].set(log_probs_VV.T / a)
    return params


@pytest.fixture(scope="module")
def chooser(tmp_path_factory):
    """A word "d" is what it expects; after a letter comes a space, but after "b" comes "c"."""
    table = {" ": {"d": 0.7, "b": 0.2}, "a": {" ": 0.6}, "b": {"c": 0.9}, "c": {" ": 0.6}, "d": {" ": 0.6}}
    alphabet = " abcd"
    rows = []
    for character in alphabet:
        likely = table[character]
        rest = (1 - sum(likely.values())) / (len(alphabet) - len(likely))
        rows.append([likely.get(other, rest) for other in alphabet])
    config = replace(CONFIG, vocab_size=len(alphabet), block_size=32, tied_head=False)
    params = bigram(config, np.log(rows))
    model = model_of(config, params, Tokenizer.characters(alphabet), tmp_path_factory.mktemp("chooser"))

    def log_prob(text, start):
        """Of text[start:], from the table."""
        places = [alphabet.index(character) for character in text]
        return sum(math.log(rows[places[i - 1]][places[i]]) for i in range(start, len(text)))

    return model, log_prob


def random_ids(n):
    return np.random.default_rng(0).integers(0, len(ALPHABET), n).astype(np.int32)


@partial(jax.jit, static_argnums=0)
def logits_of(config, params, tokens_BT):
    return GPT(config).apply({"params": params}, tokens_BT)


def naive_log_probs(model, pairs):
    """Of a token after a context, for each pair of them: a forward pass over nothing else, and float64 from there."""
    padded = np.zeros((-(-len(pairs) // 256) * 256, BLOCK), np.int32)  # causal: what stands behind does not matter
    for row, (context, _) in zip(padded, pairs, strict=False):
        row[: len(context)] = context
    logits = np.asarray(logits_of(model.config, model.params, padded), np.float64)
    logits = np.array([logits[i, len(context) - 1] for i, (context, _) in enumerate(pairs)])
    return scipy.special.log_softmax(logits, axis=1)[np.arange(len(pairs)), [token for _, token in pairs]]


# Float32 logits of order 1 leave 1e-7 each; the mean of tokens' nats has been within 3e-7.
CLOSE = {"rtol": 2e-6}


def test_the_loss_of_windows_on_their_own_is_a_runs_validation_loss(model, tmp_path):
    """The one number, three ways: this module, the training loop, and every token by a forward pass of its own."""
    config = Config(model=CONFIG, train=TrainConfig(batch_size=8), mesh=MeshConfig(data=1))
    mesh = make_mesh(config.mesh, 8)
    run = Run(config, model.folder, None, mesh, compile_steps(config, mesh), None, None)
    for n_tokens in (2, BLOCK + 1, BLOCK + 2, 30):
        ids = random_ids(n_tokens)
        pairs = [(ids[(i - 1) // BLOCK * BLOCK : i], ids[i]) for i in range(1, n_tokens)]
        naive = -naive_log_probs(model, pairs).mean()
        write_tokens(tmp_path / "val.bin", [ids], np.dtype("<u2"))
        tokens = Tokens([tmp_path / "val.bin"])
        with_tokens = run._replace(dataset=Dataset(tokens, tokens, model.tokenizer, tmp_path))
        np.testing.assert_allclose(validation_loss(with_tokens, model.params), naive, **CLOSE)
        np.testing.assert_allclose(text_loss(model, ids, BLOCK)["nats_per_token"], naive, **CLOSE)


@pytest.mark.parametrize("n_tokens", [2, BLOCK + 1, BLOCK + 2, 160])  # 160: more windows than are scored at once
@pytest.mark.parametrize(("block_size", "stride"), [(BLOCK, 1), (BLOCK, 5), (BLOCK, BLOCK), (7, 4), (1, 1)])
def test_every_token_counts_once_after_the_tokens_just_before_it(model, monkeypatch, n_tokens, block_size, stride):
    ids, windows, score = random_ids(n_tokens), [], LanguageModel.score
    monkeypatch.setattr(LanguageModel, "score", lambda self, texts: windows.extend(texts) or score(self, texts))
    result = text_loss(model, ids, block_size, stride)
    assert np.concatenate([continuation for _, continuation in windows]).tolist() == ids[1:].tolist()
    pairs, at = [], 1
    for number, (context, continuation) in enumerate(windows):
        n_before, n = len(context), len(continuation)
        if number == 0:
            assert n_before == 1 and n == min(block_size, n_tokens - 1)
        elif number < len(windows) - 1:
            assert n == stride and n_before == block_size + 1 - stride
        else:
            assert 1 <= n <= stride and block_size + 1 - stride <= n_before and n_before + n <= block_size + 1
        pairs += [(ids[at - n_before : i], ids[i]) for i in range(at, at + n)]
        at += n
    np.testing.assert_allclose(result["nats_per_token"], -naive_log_probs(model, pairs).mean(), **CLOSE)
    assert result["tokens"] == n_tokens - 1


def test_no_stride_is_the_whole_block_and_a_block_is_cut_to_the_models(model):
    ids = random_ids(3 * BLOCK + 1)
    assert text_loss(model, ids, 1000) == text_loss(model, ids, 1000, 900) == text_loss(model, ids, BLOCK, BLOCK)


@pytest.mark.parametrize("text", ["abc", "éa你\n.", "a" * 30 + "é" * 3])
def test_bytes_and_perplexities_say_the_same(model, text):
    result = text_loss(model, model.tokenizer.encode(text), BLOCK)
    nats = result["nats_per_token"] * result["tokens"]
    assert result["bytes"] == len(text[1:].encode()) and result["tokens"] == len(text) - 1
    assert result["perplexity_per_token"] == pytest.approx(math.exp(result["nats_per_token"]))
    assert result["bits_per_byte"] == pytest.approx(nats / result["bytes"] / math.log(2))


def same_scores(texts, nats):
    """As from `score`, with the same log-probability for every token."""
    return [np.full(len(text), nats, np.float32) for _, text in texts]


def test_a_token_that_begins_every_text_is_no_text(model, monkeypatch, tmp_path):
    """As of Llama's tokenizers: it is seen, and all of the text counts."""
    library = tokenizers.Tokenizer.from_str(Tokenizer.train_bpe(["abcdefg " * 20], 262).to_json())
    library.add_special_tokens(["<s>"])
    begin = ("<s>", library.token_to_id("<s>"))
    library.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[begin])
    tokenizer = Tokenizer(library)
    model = replace(model, tokenizer=tokenizer, config=replace(CONFIG, vocab_size=tokenizer.vocab_size))
    text = "é abcdefg <s>é"
    (tmp_path / "text.txt").write_text(text)
    monkeypatch.setattr(LanguageModel, "score", lambda self, texts: same_scores(texts, -1.0))
    ids = read_tokens(model, tmp_path / "text.txt")
    assert ids[0] == begin[1] and begin[1] not in ids[1:]
    result = text_loss(model, ids, BLOCK)
    assert (result["tokens"], result["bytes"]) == (len(tokenizer.encode(text)), len(text.encode()))


def test_a_bin_file_is_the_text_that_it_was_made_from(folder, model, tmp_path, capsys):
    text = "abé 你c.\ngfe " * 20
    (tmp_path / "text.txt").write_text(text)
    ids = model.tokenizer.encode(text)
    write_tokens(tmp_path / "flat.bin", [ids], np.dtype("<u2"))
    write_tokens(tmp_path / "shard.bin", [ids], np.dtype("<u2"), header=True)
    for name in ("text.txt", "flat.bin", "shard.bin"):
        main([str(folder), "--text", str(tmp_path / name), "--json"])
        result = json.loads(capsys.readouterr().out)["text"]
        assert result.pop("file").endswith(name) and result.pop("seconds") >= 0
        assert result == text_loss(model, ids, 1024)


def test_the_likeliest_ending_is_chosen_by_its_sum_or_per_character(chooser):
    """A label is a number or, as in HellaSwag's own files, a text."""
    model, log_prob = chooser
    question = {"ctx": "a", "endings": ["b", "d", "c"]}
    assert np.argmax([log_prob("a " + ending, 1) for ending in question["endings"]]) == 1
    results = [hellaswag(model, [question | {"label": label}]) for label in (1, "1", 0, "2")]
    assert [result["accuracy"] for result in results] == [1, 1, 0, 0]
    short, long = "b", "d d d"
    sums = [log_prob("a " + ending, 1) for ending in (short, long)]
    assert sums[0] > sums[1] and sums[0] / len(short) < sums[1] / len(long)
    result = hellaswag(model, [{"ctx": "a", "endings": [long, short, short], "label": 1}])
    assert (result["accuracy"], result["accuracy_per_character"]) == (1, 0)


def test_choices_are_those_of_every_tokens_own_forward_pass(model):
    """Also where context and ending are longer than the model can see: they are cut in front."""
    rng = np.random.default_rng(2)
    text = lambda n: "".join(rng.choice(list("abcdefg"), n))  # noqa: E731
    lengths = [1, 3, 5, 8, 9, 14, 15, 30] * 2
    questions = [{"ctx": text(n), "endings": [text(m) for m in rng.integers(1, 8, 4)]} for n in lengths]
    best = []
    for question in questions:
        sums = []
        for ending in question["endings"]:
            ids = model.tokenizer.encode(f"{question['ctx']} {ending}")[-BLOCK - 1 :]
            first = len(ids) - len(ending) - 1
            sums.append(naive_log_probs(model, [(ids[:i], ids[i]) for i in range(first, len(ids))]).sum())
        best.append([np.argmax(sums), np.argmax(np.divide(sums, [len(ending) for ending in question["endings"]]))])
    assert len(set(map(tuple, best))) > 2
    for i in range(4):
        result = hellaswag(model, [question | {"label": i} for question in questions])
        accuracy, per_character = np.mean(np.equal(best, i), axis=0)
        assert result == {"questions": 16, "accuracy": accuracy, "accuracy_per_character": per_character}


def test_one_command_does_both(folder, tmp_path, capsys):
    """A line ends where those of JSONL do, not at U+2028 or U+0085, which may stand in a JSON text as they are."""
    (tmp_path / "text.txt").write_text("abc def. " * 9)
    question = '{"ctx": "ab", "endings": ["c", "de"], "label": "0", "note": "\u2028 \u0085"}'
    (tmp_path / "h.jsonl").write_text(f"{question}\r\n\n{question}\n")
    files = {"text": "text.txt", "hellaswag": "h.jsonl"}
    arguments = [str(folder), *(part for name in files for part in (f"--{name}", str(tmp_path / files[name])))]
    main([*arguments, "--json"])
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    results = json.loads(out)
    assert set(results) == {"model", *files} and results["model"] == folder.name
    assert results["hellaswag"]["questions"] == 2
    main(arguments)
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line[0] != " "] == [f"model: {folder.name}", *(f"{name}:" for name in files)]
    assert f"  nats per token: {results['text']['nats_per_token']:.5g}" in lines and "  tokens: 80" in lines


def test_numbers_without_end_are_json_too(folder, monkeypatch, tmp_path, capsys):
    """A perplexity beyond float64."""
    monkeypatch.setattr(LanguageModel, "score", lambda self, texts: same_scores(texts, -900.0))
    (tmp_path / "text.txt").write_text("abc")
    main([str(folder), "--text", str(tmp_path / "text.txt"), "--json"])
    json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        "null",
        '{"ctx": "a", "endings": ["b"]}',
        '{"endings": ["b"], "label": 0}',
        '{"ctx": 1, "endings": ["b"], "label": 0}',
        '{"ctx": "a", "endings": ["b", ""], "label": 0}',
        '{"ctx": "a", "endings": ["b", "c"], "label": 2}',
        '{"ctx": "a", "endings": ["b", "c"], "label": ""}',
        '{"ctx": "a", "endings": ["b", "c"], "label": -1}',
        '{"ctx": "a", "endings": "bc", "label": 0}',
    ],
)
def test_a_line_that_is_no_question_is_named(folder, tmp_path, line):
    path, good = tmp_path / "questions.jsonl", '{"ctx": "a", "endings": ["b", "c"], "label": 0}'
    path.write_text(f"{good}\n\n{line}\n{good}\n")
    with pytest.raises(UserError, match=r"questions\.jsonl, line 3, .* HellaSwag"):
        main([str(folder), "--hellaswag", str(path)])


def test_a_mistake_is_one_line(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = {"text.txt": "abc", "short.txt": "a", "unknown.txt": "abZ", "empty.bin": "", "empty.jsonl": "\n"}
    files["long.jsonl"] = json.dumps({"ctx": "a", "endings": ["abcdefg" * 3], "label": 0})
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "latin.txt").write_bytes("é".encode("latin1"))
    write_tokens(tmp_path / "other.bin", [np.array([1, len(ALPHABET), 2])], np.dtype("<u2"))
    for arguments, words in {
        "": "nothing to evaluate",
        "--text nowhere.txt": "text=nowhere.txt: there is no such file",
        "--text .": "there is no such file",
        "--text short.txt": "short.txt is too short",
        "--text empty.bin": "empty.bin is too short",
        "--text latin.txt": "latin.txt is not UTF-8",
        "--text unknown.txt": "no character 'Z'",
        "--text other.bin": f"other.bin has token {len(ALPHABET)}; the model has {len(ALPHABET)}",
        "--hellaswag empty.jsonl": "empty.jsonl has no questions",
        "--hellaswag long.jsonl": "has 22 tokens, and",
        "--text text.txt --block_size 0": "block_size=0 is not positive",
        "--text text.txt --block_size 8 --stride 9": "stride=9 is not in [1, block_size=8]",
        "--text text.txt --strid 9": "did you mean --stride?",
    }.items():
        with pytest.raises(UserError) as raised:
            main([str(folder), *arguments.split()])
        assert words in str(raised.value) and "\n" not in str(raised.value), arguments
    with pytest.raises(UserError, match="MODEL"):
        main(["--text", "text.txt"])
