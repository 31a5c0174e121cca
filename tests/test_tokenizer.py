"""The tokenizer: round trips, ids that do not depend on how a text is cut, and errors that say the fix."""

import os
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from gptjax.errors import UserError
from gptjax.tokenizer import END_OF_TEXT, TextStream, Tokenizer, safe_chunks

quick = settings(deadline=None, max_examples=60)
ODD = "a  b\n\n\tß\r\n e\u0301 \u2028\x85\x00 😀👩‍👩‍👧 中文 \u00a0<|endoftext|>'s \ufffd \U0010ffff"
PROSE = "It's 1605; the king's men -- all 12 of 'em -- played.\nWell said!\n\nEnter a fool.  \n\tExit, 中文。再见"
letters = st.sampled_from(sorted(set(PROSE + "\r_é😀，'st")))
scraps = st.sampled_from([" the", "\n", "\n\n", "ing ", ". ", "!\n"])
mixed_texts = st.lists(letters | scraps, max_size=60).map("".join)


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return Tokenizer.train_bpe([PROSE * 50], 300)


@pytest.fixture(scope="module")
def qwen_like() -> Tokenizer:
    """Qwen's pre-tokenization, where punctuation takes the newlines behind it."""
    pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    pattern += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    library = tokenizers.Tokenizer(models.BPE())
    words, byte_level = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"), pre_tokenizers.ByteLevel
    library.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level(add_prefix_space=False, use_regex=False)])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    library.train_from_iterator([PROSE * 50], trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    return Tokenizer(library)


def cut(text: str, sizes: list[int]) -> list[str]:
    """The text in pieces of these sizes, over and over."""
    pieces, at = [], 0
    while at < len(text):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(text[at : at + size])
        at += size
    return pieces


@given(st.text(min_size=1))
@example(ODD)
@quick
def test_characters_round_trip_and_agree_with_the_library(text):
    tokenizer = Tokenizer.characters(text)
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and tokenizer.decode(ids) == text
    library = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    assert library.encode(text).ids == ids.tolist()
    assert library.decode(ids.tolist()) == text


def test_character_ids_follow_the_code_points_as_in_nanogpt(tmp_path):
    text = "hello\nWorld, 中!"
    tokenizer = Tokenizer.characters(text)
    tokenizer.save(tmp_path / "tokenizer.json")
    for each in (tokenizer, Tokenizer.load(tmp_path / "tokenizer.json")):
        assert each.encode("".join(sorted(set(text)))).tolist() == list(range(len(set(text))))
        assert each.vocab_size == len(set(text)) and each.end_of_text is None and each.kind == "characters"
    holes = Tokenizer.from_characters({"a": 0, "b": 7})
    assert holes.vocab_size == 8 and holes.encode("ba").tolist() == [7, 0] and holes.decode([0, 3, 7]) == "ab"


@pytest.mark.parametrize("pieces", [["ab\ncab\nab☃c\n"], ["ab\nc", "ab", "\nab", "☃c\n"]])
def test_an_unknown_character_is_named_with_its_place(pieces):
    with pytest.raises(UserError) as error:
        list(Tokenizer.characters("abc\n").encode_chunks(pieces))
    for part in ("'☃'", "U+2603", "index 9 ", "(line 3, column 3)", "--data.tokenizer bpe"):
        assert part in str(error.value)
    for character in "\ud800\U0010ffff":  # that no corpus has
        with pytest.raises(UserError, match=f"U\\+{ord(character):04X}"):
            Tokenizer.characters("ab").encode("a" + character)


@given(st.text())
@quick
def test_a_bpe_knows_every_text(bpe, text):
    assert bpe.decode(bpe.encode(text)) == text


def test_a_bpe_has_every_byte_the_end_of_text_and_the_size_that_was_asked_for(bpe):
    assert bpe.vocab_size == 300 and bpe.kind == "byte-level BPE"
    assert bpe.end_of_text is not None and bpe.decode([bpe.end_of_text]) == END_OF_TEXT
    assert Tokenizer.train_bpe([""], 300).vocab_size == 257
    for text in ("a" * 5000, " " * 5000):  # longer words would take a time that is quadratic in their length
        assert max(map(len, Tokenizer.train_bpe([text], 300).vocabulary())) <= 1000


def test_bpe_training_depends_on_the_text_alone():
    whole, pieces = Tokenizer.train_bpe([PROSE * 9], 300), Tokenizer.train_bpe(cut(PROSE * 9, [5]), 300)
    assert whole.to_json() == pieces.to_json()


@pytest.mark.parametrize("name", ["bpe", "qwen_like"])
@given(text=mixed_texts, sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4))
@settings(deadline=None, max_examples=100)
def test_a_text_has_the_same_ids_however_it_is_cut(request, name, text, sizes):
    tokenizer = request.getfixturevalue(name)
    assert [i for ids in tokenizer.encode_chunks(cut(text, sizes)) for i in ids] == tokenizer.encode(text).tolist()
    assert "".join(safe_chunks(cut(text, sizes))) == text


def test_prose_is_cut_often_enough_to_stay_in_bounded_memory():
    for text in (PROSE * 100, PROSE.replace("\n", "\r\n") * 100, "再见，中文。" * 100, "no newline " * 100):
        assert max(map(len, safe_chunks(cut(text, [50])))) < 200


def test_a_text_without_any_safe_place_is_still_cut():
    pieces = list(safe_chunks(["x" * 600_000] * 4))
    assert "".join(pieces) == "x" * 2_400_000 and max(map(len, pieces)) < 2_000_000


def test_the_name_of_the_end_of_text_is_plain_text_unless_asked_for(bpe):
    text = f"Well{END_OF_TEXT}{END_OF_TEXT} said"
    assert bpe.end_of_text not in bpe.encode(text)
    special = bpe.encode(text, special=True)
    assert (special == bpe.end_of_text).sum() == 2
    assert bpe.decode(special) == bpe.decode(bpe.encode(text)) == text
    assert bpe.encode("Well", special=True).tolist() == bpe.encode("Well").tolist()
    assert bpe.encode("").shape == bpe.encode("", special=True).shape == (0,)


def test_settings_of_a_batch_in_a_file_change_no_ids(bpe, tmp_path):
    """Truncation, padding and tokens behind a text, which a prompt must not end with; those before it stay."""
    library = tokenizers.Tokenizer.from_str(bpe.to_json())
    library.enable_truncation(max_length=8)
    library.enable_padding(length=9, pad_id=3, pad_token="!")
    ends = [("<s>", 5), ("</s>", 6)]
    library.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
    for text in (PROSE, "", "a"):
        ids = bpe.encode(text).tolist()
        assert tokenizer.encode(text).tolist() == tokenizer.encode_batch([text])[0].tolist() == ids
        assert tokenizer.prompt(text).tolist() == [5, *(ids or bpe.encode("\n").tolist())]
    assert tokenizer.begin.tolist() == [5]
    assert [i for ids in tokenizer.encode_chunks([PROSE] * 9) for i in ids] == bpe.encode(PROSE * 9).tolist()


def streamed(tokenizer, ids):
    """The pieces of text, one id at a time, and what is left at the end."""
    stream = TextStream(tokenizer)
    return [stream.feed([i]) for i in ids] + [stream.end()]


@given(data=st.data())
@quick
def test_streamed_pieces_join_to_the_whole(bpe, data):
    ids = data.draw(st.lists(st.integers(0, bpe.vocab_size - 1), max_size=30))
    assert "".join(streamed(bpe, ids)) == bpe.decode(ids)


@given(st.text(st.characters(exclude_characters="\ufffd", exclude_categories=["Cs"])))
@quick
def test_a_streamed_piece_never_splits_a_character_and_does_not_wait(bpe, text):
    first, *others = streamed(bpe, bpe.encode("W" + text).tolist())[:-1]
    assert first[0] == "W" and "".join([first, *others]) == "W" + text
    assert not any("\ufffd" in piece for piece in others)


def test_streaming_keeps_the_spaces_of_decoders_that_drop_the_first_one():
    library = tokenizers.Tokenizer(models.WordLevel({"▁to": 0, "▁be": 1, ",": 2}))
    library.decoder = decoders.Metaspace()
    assert "".join(streamed(Tokenizer(library), [0, 1, 2, 0, 1])) == "to be, to be"
    assert TextStream(Tokenizer(library), before=[0]).feed([1]) == " be"


def test_gpt2_from_its_original_files_and_from_the_other_names(tmp_path):
    folder = Path(os.environ.get("GPTJAX_TEST_DATA", Path(__file__).parents[2] / "shared" / "data")) / "gpt2"
    if not folder.exists():
        pytest.skip(f"{folder} does not exist; GPTJAX_TEST_DATA names the folder above it")
    tokenizer = Tokenizer.from_name_or_path(str(folder))
    assert tokenizer.vocab_size == 50257 and tokenizer.end_of_text == 50256
    assert tokenizer.encode("Hello world, it's me.").tolist() == [15496, 995, 11, 340, 338, 502, 13]
    assert tokenizer.decode(tokenizer.encode(ODD)) == ODD
    (tmp_path / "vocab.json").write_bytes((folder / "encoder.json").read_bytes())
    (tmp_path / "merges.txt").write_bytes((folder / "vocab.bpe").read_bytes())
    assert Tokenizer.from_name_or_path(str(tmp_path)).encode(ODD).tolist() == tokenizer.encode(ODD).tolist()
    tokenizer.save(tmp_path / "tokenizer.json")
    again, text = Tokenizer.from_name_or_path(str(tmp_path)), ODD + END_OF_TEXT
    assert again.encode(text, special=True).tolist() == tokenizer.encode(text, special=True).tolist()


def test_what_is_no_tokenizer_is_refused_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.json").write_text('{"model": "what"}')
    for name, part in ((str(tmp_path), "tokenizer.json"), (str(tmp_path / "none"), "does not exist")):
        with pytest.raises(UserError, match=part):
            Tokenizer.from_name_or_path(name)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="vocab.bpe"):
        Tokenizer.from_name_or_path(str(tmp_path))

    def offline(name):
        raise OSError("no network")

    monkeypatch.setattr("tokenizers.Tokenizer", type("Offline", (), {"from_pretrained": staticmethod(offline)}))
    for fix in ("name a folder with its tokenizer.json, or with encoder.json and vocab.bpe; for a ckpt.pt", "./gpt2,"):
        with pytest.raises(UserError, match=f"in place of 'gpt2'.* {fix}"):
            Tokenizer.from_name_or_path("gpt2")
        monkeypatch.chdir(tmp_path)
        (tmp_path / "gpt2").mkdir(exist_ok=True)


def test_a_huge_id_is_refused():
    text = Tokenizer.characters("ab").to_json().replace('"b": 1', '"b": 4294967295')
    with pytest.raises(UserError, match="4,294,967,295"):
        Tokenizer.from_json(text.encode(), "tokenizer.json")
