"""A corpus to shards: the same bytes whatever the format, the workers, the array or the interruptions."""

import gzip
import io
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from gptjax.config import DataConfig
from gptjax.data import load_dataset
from gptjax.data.__main__ import main
from gptjax.data.at_scale import documents as documents_
from gptjax.data.at_scale import tokenize_corpus
from gptjax.data.at_scale.documents import Piece, documents, find_files, parts_of
from gptjax.data.at_scale.tokenize_corpus import TokenizeConfig, begin_folder, tokenize_part, validates
from gptjax.data.token_files import Tokens, write_tokens
from gptjax.errors import UserError
from gptjax.tokenizer import END_OF_TEXT, Tokenizer

TEXTS = [
    "First Citizen:\nBefore we proceed any further, hear me speak.\n",
    f"a {END_OF_TEXT} inside is {len(END_OF_TEXT)} characters",
    "",
    "naïve 😀 \u2028 line\r\nends, \x85 and \\n",
    *(f"document {i}: " + "speak, speak. " * (i % 7) for i in range(40)),
    "First Citizen:\nBefore we proceed any further, hear me speak.\n",
]


@pytest.fixture(scope="module")
def spec(tmp_path_factory) -> Path:
    """The tokenizer.json of a small BPE."""
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    Tokenizer.train_bpe(TEXTS * 3, 400).save(path)
    return path


def json_lines(texts, **fields) -> bytes:
    return "".join(json.dumps({"text": text} | fields) + "\n" for text in texts).encode()


def write_jsonl(path: Path, texts=TEXTS) -> None:
    path.write_bytes(json_lines(texts, url="http://x"))


def write_compressed(path: Path, texts=TEXTS) -> None:
    zstd = partial(pyarrow.Codec("zstd").compress, asbytes=True)
    compress = gzip.compress if path.suffix == ".gz" else zstd
    half = len(texts) // 2  # two members, as `cat a.gz b.gz` leaves
    path.write_bytes(compress(json_lines(texts[:half])) + compress(json_lines(texts[half:])))


def write_parquet(path: Path, texts=TEXTS, kind=None) -> None:
    column = pyarrow.array(texts, pyarrow.string())
    column = column.dictionary_encode() if kind == "dictionary" else column.cast(kind) if kind else column
    table = pyarrow.table({"id": list(range(len(texts))), "text": column})
    pyarrow.parquet.write_table(table, path, row_group_size=3)


def write_txt(path: Path, texts=TEXTS) -> None:
    path.mkdir()
    for i, text in enumerate(texts):
        if text:
            (path / f"{i:04}.txt").write_bytes(text.encode())


FORMATS: dict[str, Callable[..., None]] = {
    "a.jsonl": write_jsonl,
    "a.json.gz": write_compressed,
    "a.jsonl.zst": write_compressed,
    "a.parquet": write_parquet,
    "large.parquet": partial(write_parquet, kind="large_string"),
    "dictionary.parquet": partial(write_parquet, kind="dictionary"),
    "folder": write_txt,
}


def read(sources, part_bytes: int = 1 << 30) -> list[str]:
    """The texts of all documents."""
    parts = parts_of(find_files([str(source) for source in sources]), part_bytes)
    return ["".join(document) for part in parts for piece in part for document in documents(piece, "text")]


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.bin")}


def tokenize_here(sources, out: Path, spec: Path, part_bytes: int = 1 << 30, **fields) -> None:
    """Every part, in this process."""
    config = TokenizeConfig(tuple(map(str, sources)), str(out), str(spec), **fields)
    files = find_files(config.sources)
    parts = parts_of(files, part_bytes)
    begin_folder(config, files, len(parts))
    tokenizer = Tokenizer.load(spec)
    for i, part in enumerate(parts):
        tokenize_part(i, part, tokenizer, config)


def ids_of(folder: Path, split: str = "train") -> np.ndarray:
    tokens = Tokens([folder / f"{split}_000000.bin"])
    return tokens.window(0, len(tokens)).astype(np.int32)


def expected_ids(spec: Path, texts: list[str], end: str = END_OF_TEXT) -> list[int]:
    tokenizer = Tokenizer.load(spec)
    return [i for text in texts if text for i in (*tokenizer.encode(text).tolist(), tokenizer.token_id(end))]


def run(*arguments: object) -> None:
    main(["tokenize", *map(str, arguments)])


# Formats


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_its_documents_in_order_each_ended_by_the_end_of_text(tmp_path, spec, name):
    FORMATS[name](tmp_path / name)
    for part_bytes in (100, 333, 1000, 2500) if name in ("a.jsonl", "a.parquet", "folder") else (1 << 30,):
        assert read([tmp_path / name], part_bytes) == [text for text in TEXTS if text]
    tokenize_here([tmp_path / name], tmp_path / "out", spec, val_fraction=1e-9)
    assert ids_of(tmp_path / "out").tolist() == expected_ids(spec, TEXTS)


@pytest.mark.parametrize("end", [b"\n", b""])
def test_a_cut_at_any_byte_puts_each_line_on_one_side(tmp_path, end):
    mark = b"\xef\xbb\xbf" * (end == b"")
    (tmp_path / "a.jsonl").write_bytes(mark + json_lines(["a", "", "bc", "naïve"]).removesuffix(b"\n") + end)
    [(file, size)] = find_files([str(tmp_path)]).items()
    for cut in range(1, size - 1):
        pieces = Piece(file, 0, cut), Piece(file, cut, cut + 1), Piece(file, cut + 1, size)
        texts = ["".join(document) for piece in pieces for document in documents(piece, "text")]
        assert texts == ["a", "bc", "naïve"]


def test_sources_are_files_folders_patterns_and_urls_each_file_once(tmp_path):
    deep, links = tmp_path / "deep", tmp_path / "links"
    (deep / "er").mkdir(parents=True)
    write_jsonl(deep / "b.jsonl", ["b"])
    write_jsonl(deep / "er" / "a.jsonl", ["a"])
    (deep / "README").write_text("no document")
    write_jsonl(tmp_path / "[c].jsonl", ["c"])
    assert read([deep]) == read([f"file://{deep}/**/*.jsonl"]) == ["b", "a"]
    assert read([deep / "*" / "*.jsonl", tmp_path / "[c].jsonl"]) == ["a", "c"]
    assert read([tmp_path / "[c].jsonl", tmp_path, deep]) == ["c", "b", "a"]
    fsspec.filesystem("memory").pipe_file("/sources/x/d.jsonl", json_lines(["d", "e"]))
    assert list(find_files(["memory://sources"])) == ["memory:///sources/x/d.jsonl"]
    assert read(["memory://sources/*/*.jsonl"], part_bytes=20) == ["d", "e"]
    links.mkdir()  # as in the cache of the Hugging Face hub
    (links / "d.jsonl").symlink_to(deep / "b.jsonl")
    assert read([links]) == read([links / "*.jsonl"]) == ["b"]
    assert list(find_files([str(links / "*")]).values()) == [(deep / "b.jsonl").stat().st_size]


def test_parts_depend_on_names_and_sizes_and_hold_small_files_together():
    files = {"a.txt": 60, "b.txt": 30, "c.jsonl": 250, "d.json.gz": 500, "e.txt": 10}
    assert parts_of(files, 100) == [
        (("c.jsonl", 0, 83),),
        (("c.jsonl", 83, 166),),
        (("c.jsonl", 166, 250),),
        (("a.txt", 0, 60), ("b.txt", 0, 30)),
        (("d.json.gz", 0, 500),),
        (("e.txt", 0, 10),),
    ]


def test_memory_is_bounded(tmp_path, spec, monkeypatch):
    line = json_lines(["Speak, speak. Naïve and long enough to count. " * 20])
    for name in ("a.jsonl", "b.txt"):
        (tmp_path / name).write_bytes(line * 3_000)  # 2.9 MB
    lengths: list[int] = []  # in place of encoding, which tracemalloc slows down
    fake = lambda _, texts: lengths.extend(map(len, texts)) or [np.zeros(1)] * len(texts)  # noqa: E731
    monkeypatch.setattr(Tokenizer, "encode_batch", fake)
    for name, size in (("_LONG", 1 << 16), ("_BATCH", 1 << 16)):
        monkeypatch.setattr(tokenize_corpus, name, size)
    monkeypatch.setattr(documents_, "_BLOCK", 1 << 16)
    tracemalloc.start()
    tokenize_here([tmp_path], tmp_path / "out", spec)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(lengths) > 5_000_000 and peak < 2_000_000


# Shards


def test_copies_are_on_one_side_and_the_fraction_holds(tmp_path, spec):
    texts = [f"document {i}" for i in range(1000)]
    write_jsonl(tmp_path / "a.jsonl", texts)
    write_parquet(tmp_path / "b.parquet", texts[::-1])
    tokenize_here([tmp_path], tmp_path / "out", spec, val_fraction=0.1)
    decode = Tokenizer.load(spec).decode
    train, val = (Counter(decode(ids_of(tmp_path / "out", s)).split(END_OF_TEXT)[:-1]) for s in ("train", "val"))
    assert not train.keys() & val.keys() and train + val == Counter(texts * 2)
    assert 52 < len(val) < 148  # five standard deviations, sqrt(1000 * 0.1 * 0.9) = 9.5 each
    assert all(validates((text,), 0.1) == validates(tuple(text), 0.1) == (text in val) for text in texts)


@pytest.mark.parametrize("name", ["a.jsonl", "folder"])
def test_a_long_document_is_cut_without_a_trace(tmp_path, spec, monkeypatch, name):
    texts = ["before", "First Citizen: document naïve, \n and long enough to cut; " * 50 + "x" * 1000, "after"]
    FORMATS[name](tmp_path / name, texts)
    monkeypatch.setattr(tokenize_corpus, "_LONG", 300)
    monkeypatch.setattr(tokenize_corpus, "_BATCH_TEXTS", 1)
    monkeypatch.setattr(documents_, "_BLOCK", 64)
    tokenize_here([tmp_path / name], tmp_path / "out", spec, val_fraction=1e-9, end_of_text="!")
    assert ids_of(tmp_path / "out").tolist() == expected_ids(spec, texts, "!")


# The command: workers, arrays, restarts


def test_workers_arrays_and_stops_change_no_byte_and_nothing_is_made_twice(spec, tmp_path, capsys):
    corpus, here, out = (tmp_path / name for name in ("corpus", "here", "out"))
    corpus.mkdir()
    texts = [f"{i} {TEXTS[i % len(TEXTS)]}" for i in range(1000)]
    (corpus / "a.jsonl").write_bytes(json_lines(texts, url="http://x/" + "x" * 1100))  # 1.2 MB, two parts
    write_parquet(corpus / "b.parquet", [f"document {i}" for i in range(100)])
    write_compressed(corpus / "c.jsonl.gz")
    tokenize_here([corpus], here, spec, 1 << 20, val_fraction=0.05, part_mb=1)
    options = [corpus, "--out", out, "--tokenizer", spec, "--val_fraction", 0.05, "--part_mb", 1, "--workers", 2]
    run(*options, "--shard", "1/2")
    first = capsys.readouterr().out
    assert "tokenized 2 parts in" in first and f"{out} has 2 of 3 parts" in first
    assert sorted(shards(out)) == [f"{split}_00000{i}.bin" for split in ("train", "val") for i in (0, 2)]
    with pytest.raises(UserError, match=r"2 of 3 train shards: run .* again"):
        load_dataset(DataConfig(source=str(out)))
    before = (out / "train_000000.bin").stat().st_mtime_ns
    (out / "train_000001.bin.0123abcd.part").write_bytes(b"half")  # of a worker that was killed
    with open(out / "train_000002.bin", "r+b") as file:
        file.truncate(2000)  # the machine went down
    run(*options)
    second = capsys.readouterr().out
    assert "tokenized 2 parts in" in second and (out / "train_000000.bin").stat().st_mtime_ns == before
    assert shards(out) == shards(here) and not list(out.glob("*.part"))
    run(*options, "--shard", "3/3")
    assert "nothing left" in capsys.readouterr().out
    dataset = load_dataset(DataConfig(source=str(out)))
    ends = [(each.window(0, len(each)) == dataset.tokenizer.end_of_text).sum() for each in (dataset.train, dataset.val)]
    assert len(dataset.train.paths) == 3 and sum(ends) == len(read([corpus])) and min(ends) > 0
    lines = re.findall(r"^part (.): (.+) documents (.+) tokens$", (first + second).replace(",", ""), re.M)
    counts = {part: np.array([n_documents, n_tokens], int) for part, n_documents, n_tokens in lines}
    assert sum(counts.values()).tolist() == [sum(ends), len(dataset.train) + len(dataset.val)]
    assert "s: {:,} documents, {:,} tokens (".format(*counts["1"] + counts["2"]) in second


def large(folder: Path) -> Path:
    """A file that takes one worker many seconds."""
    (folder / "large.jsonl").write_bytes(json_lines(["Speak, speak. Naïve and long enough to count.\n" * 1000]) * 800)
    return folder / "large.jsonl"


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def running(group: int) -> bool:
    """Whether a process of the group runs; dead ones that nobody has asked about do not."""
    done = subprocess.run(["ps", "-eo", "pgid=,stat="], capture_output=True, text=True, check=True)
    return any(int(each) == group and state[0] != "Z" for each, state in map(str.split, done.stdout.splitlines()))


def test_a_worker_that_dies_or_finds_a_mistake_ends_all_with_one_line(spec, tmp_path):
    out = tmp_path / "out"
    options = ["--out", out, "--tokenizer", spec, "--part_mb", 20, "--workers", 3]

    def kill() -> None:
        wait_for(lambda: list(out.glob("train*.part")))
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(UserError, match="a worker was killed.*--workers"):
        run(large(tmp_path), *options)
    killer.join()
    assert len(shards(out)) % 2 == 0 and not multiprocessing.active_children()  # those of a part, or none
    (tmp_path / "z.txt").write_bytes(b"na\xefve")
    with pytest.raises(UserError, match=r"z.txt is not UTF-8"):
        run(large(tmp_path), tmp_path / "z.txt", "--out", tmp_path / "other", *options[2:])
    assert not list((tmp_path / "other").glob("*.bin*")) and not multiprocessing.active_children()


@pytest.mark.parametrize("whom", ["Ctrl-C", pytest.param("killed", marks=pytest.mark.slow)])
def test_a_stop_leaves_whole_shards_only_and_no_process(spec, tmp_path, whom):
    source, out = large(tmp_path), tmp_path / "out"
    command = [sys.executable, "-m", "gptjax.data", "tokenize", source, "--out", out, "--tokenizer", spec]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    process = subprocess.Popen(
        [*map(str, command), "--workers", "2", "--part_mb", "20"],
        env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    wait_for(lambda: len(list(out.glob("train*.part"))) == 2)
    if whom == "Ctrl-C":
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the workers too
        assert process.communicate(timeout=60)[1] == "error: interrupted\n" and process.returncode == 130
    else:
        process.kill()
        process.communicate(timeout=60)  # until the last worker, which has the other end of stderr, is gone
    wait_for(lambda: not running(process.pid))
    assert list(out.glob("*.bin*" if whom == "Ctrl-C" else "*.bin")) == []


# Mistakes


def test_a_folder_takes_one_corpus_one_tokenizer_and_one_way_to_cut(spec, tmp_path):
    Tokenizer.train_bpe(["other"], 300).save(tmp_path / "other.json")
    config, files = TokenizeConfig(("a",), str(tmp_path / "out"), str(spec)), {"a": 1}
    for _ in range(2):
        begin_folder(config, files, 1)
    for changed, complaint in (
        (replace(config, val_fraction=0.1), r"val_fraction \(0.0005, not 0.1\)"),
        (replace(config, part_mb=2), r"part_mb \(256, not 2\)"),
        (replace(config, end_of_text="!"), "end_of_text"),
        (replace(config, tokenizer=str(tmp_path / "other.json")), "vocab_size .*, tokenizer"),
        (replace(config, column="url"), "column"),
        (config, "files"),
    ):
        with pytest.raises(UserError, match=f"out was begun with other {complaint}.*: repeat .*--out"):
            begin_folder(changed, {"a": 2} if changed is config else files, 1)


def parquet(**columns) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), sink)
    return sink.getvalue()


LATIN = pyarrow.StringArray.from_buffers(1, pyarrow.py_buffer(b"\0\0\0\0\3\0\0\0"), pyarrow.py_buffer(b"a\xefb"))
MISTAKES = {
    "no JSON": ("a.jsonl", json_lines(["one"]) + b"{oops\n", "byte 16 is no JSON document"),
    "a list": ("a.json", b'[\n{"text": "a"}\n]', "byte 0 is no JSON document"),
    "no object": ("a.jsonl", json_lines(["a"]) + b"[1]", "byte 14 .* a list, not an object"),
    "no field": ("a.jsonl", b'{"content": "a"}', "byte 0 .* no 'text', but 'content': pass --column"),
    "no text": ("a.jsonl", b'{"text": 7}', "byte 0 .* 'text' is not text but int"),
    "latin": ("a.jsonl", json_lines(["a", "b"]) + b'{"text": "na\xefve"}', "byte 28 .* 'utf-8' codec"),
    "surrogate": ("a.jsonl", b'\n{"text": "a\\ud83d"}', "byte 1 .* position 1: surrogates"),
    "far down": ("a.jsonl", json_lines(["a"] * 99) + b"oops\n" + json_lines(["b"] * 9), "byte 1386 is no"),
    "latin text": ("a.txt", b"na\xefve", "is not UTF-8 at byte 2"),
    "cut gz": ("a.jsonl.gz", gzip.compress(json_lines(TEXTS))[:-9], "EOFError"),
    "in gz": ("a.jsonl.gz", gzip.compress(json_lines(["a"]) + b"x"), "byte 14 is no JSON document"),
    "no Parquet": ("a.parquet", b"PAR1 it is not", "is not a complete Parquet file"),
    "no column": ("a.parquet", parquet(content=["a"]), "no column 'text', but 'content': pass --column"),
    "numbers": ("a.parquet", parquet(text=[1]), "column 'text' .* is not text but int64"),
    "latin row": ("a.parquet", parquet(text=pyarrow.concat_arrays([pyarrow.array(["x"]), LATIN])), "rows 0 to 1: not "),
}


@pytest.mark.parametrize("name, data, complaint", MISTAKES.values(), ids=MISTAKES)
def test_what_cannot_be_read_is_named(tmp_path, name, data, complaint):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=complaint) as error:
        read([tmp_path / name], part_bytes=150)
    assert str(tmp_path / name) in str(error.value)


def test_mistakes_are_refused_before_anything_is_made(tmp_path, spec, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty.jsonl").touch()
    Path("a.csv").write_text("a,b")
    Path("void").mkdir()
    write_jsonl(Path("a.jsonl"))
    write_parquet(Path("a.parquet"))
    write_tokens(Path("train.bin"), [np.arange(5)], np.dtype("<u2"))
    Tokenizer.characters("ab").save(Path("characters.json"))
    for arguments, complaint in {
        "empty.jsonl": "is empty",
        "a.csv": "a.csv is not .parquet",
        "none": "does not exist",
        "void": "does not exist",
        "*.gz": "does not exist",
        "nowhere://x": "cannot open nowhere://x",
        "": "SOURCES",
        "a.jsonl --shard 0/3": "shard=",
        "a.jsonl --shard 4/3": "shard=",
        "a.jsonl --shard 3": "shard=",
        "a.jsonl --val_fraction 0": "val_fraction=",
        "a.jsonl --out gs://bucket/x": "out=",
        "a.jsonl --out .": "token files of another kind: pass another --out",
        "a.jsonl --tokenizer bpe": "tokenizer='bpe' is not trained yet",
        "a.jsonl --tokenizer characters.json": r"no token '<\|endoftext\|>'.*--end_of_text",
    }.items():
        with pytest.raises(UserError, match=complaint):
            run("--out", "out", "--tokenizer", spec, *arguments.split())
        assert not Path("out").exists() and not Path("data.json").exists()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"a.parquet needs pyarrow: pip install 'gptjax\[data\]'"):
        read(["a.parquet"])
