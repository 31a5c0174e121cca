"""Folders without a tokenizer.json: transformers' ids for GPT-2 and Qwen2, and a refusal of other families."""

import json

import pytest

from gptjax.errors import UserError
from gptjax.tokenizer import END_OF_TEXT, Tokenizer

TEXTS = [
    "in 2024 I'LL go, don't!\n\n  two  spaces\t",
    "naïve café — 你好 🙂 e\u0301 \u212b",
    "<|im_start|>user\nHi<|im_end|>  <|endoftext|><tool>\n",
]
MARKS = {"<|endoftext|>": True, "<|im_start|>": True, "<|im_end|>": True, "<tool>": False}


@pytest.fixture
def write(tmp_path):
    """Writes a vocabulary and merges, the next ids of which added tokens have, and other files."""
    learned = json.loads(Tokenizer.train_bpe([" ".join(TEXTS) * 3], 320).to_json())
    vocabulary = {name: i - 1 for name, i in learned["model"]["vocab"].items() if name != END_OF_TEXT}
    tmp_path.joinpath("merges.txt").write_text("\n".join(" ".join(pair) for pair in learned["model"]["merges"]) + "\n")
    ids = {name: len(vocabulary) + i for i, name in enumerate(MARKS)}

    def write(marks=True, **files):
        own = {} if marks else {END_OF_TEXT: len(vocabulary)}
        (tmp_path / "vocab.json").write_text(json.dumps(vocabulary | own))
        for name, values in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(values(ids) if callable(values) else values))
        return tmp_path

    return write


def declared(ids):
    """As a tokenizer_config.json has them, out of order."""
    flags = {"lstrip": False, "single_word": False, "normalized": False}
    tokens = {name: {"content": name, "special": MARKS[name], "rstrip": name == "<tool>"} | flags for name in MARKS}
    return {str(i): tokens[name] for name, i in reversed(ids.items())}


QWEN = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": END_OF_TEXT}


@pytest.mark.parametrize(
    ("kind", "files"),
    [
        ("Qwen2Tokenizer", {"tokenizer_config": lambda ids: QWEN | {"added_tokens_decoder": declared(ids)}}),
        (
            "Qwen2Tokenizer",
            {
                "tokenizer_config": {"tokenizer_class": "Qwen2TokenizerFast"},
                "added_tokens": lambda ids: ids,
                "special_tokens_map": {"eos_token": {"content": "<|im_end|>"}, "pad_token": END_OF_TEXT},
            },
        ),
        ("Qwen2Tokenizer", {"config": {"model_type": "qwen2"}, "tokenizer_config": {"add_prefix_space": True}}),
        ("GPT2Tokenizer", {"config": {"model_type": "gpt2"}, "tokenizer_config": {"eos_token": "<|im_end|>"}}),
        ("GPT2Tokenizer", {"marks": False}),
    ],
)
def test_ids_are_those_of_transformers(kind, files, write):
    transformers = pytest.importorskip("transformers")
    folder = write(**files)
    theirs = getattr(transformers, kind).from_pretrained(folder)
    ours = Tokenizer.from_name_or_path(str(folder))
    assert ours.vocab_size == len(theirs)
    for text in TEXTS:
        assert ours.encode(text, special=True).tolist() == theirs(text).input_ids
        assert ours.decode(ours.encode(text, special=True)) == theirs.decode(theirs(text).input_ids)


@pytest.mark.parametrize(
    ("files", "word"),
    [
        ({}, r"tokenizer \(None\)"),
        ({"tokenizer_config": {"tokenizer_class": "RobertaTokenizer"}}, r"tokenizer \(RobertaTokenizer\)"),
        ({"config": {"model_type": "llama"}}, r"tokenizer \(llama\)"),
        ({"tokenizer_config": QWEN | {"add_bos_token": True}}, "add_bos_token"),
        ({"tokenizer_config": QWEN, "added_tokens": {"<far>": 4000}}, "'<far>' cannot have the id 4000"),
        ({"tokenizer_config": QWEN | {"added_tokens_decoder": {"x": {}}}}, "are not a tokenizer"),
        ({"tokenizer_config": QWEN, "vocab": ["a"]}, "are not a tokenizer"),
    ],
)
def test_what_is_not_known_to_be_of_a_family_is_refused(files, word, write):
    folder = write(**files)
    with pytest.raises(UserError, match=word) as caught:
        Tokenizer.from_name_or_path(str(folder))
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_a_sentencepiece_file_alone_gets_advice(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\n")
    with pytest.raises(UserError, match=r"tokenizer.model is not read: AutoTokenizer.from_pretrained\(FOLDER\)"):
        Tokenizer.from_name_or_path(str(tmp_path))
