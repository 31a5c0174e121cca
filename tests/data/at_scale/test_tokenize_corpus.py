"""A corpus to shards: the same bytes whatever the format, the workers, the array or the interruptions."""

import gzip
import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptjax.config import DataConfig
from gptjax.data import load_dataset
from gptjax.data.__main__ import main
from gptjax.data.at_scale import documents as documents_
from gptjax.data.at_scale import tokenize_corpus
from gptjax.data.at_scale.documents import Piece, documents, find_files, parts_of
from gptjax.data.at_scale.tokenize_corpus import TokenizeConfig, tokenize_part, validates
from gptjax.data.token_files import Tokens, write_tokens
from gptjax.errors import UserError
from gptjax.tokenizer import END_OF_TEXT, Tokenizer

REPOSITORY = Path(__file__).parents[3]
TEXTS = [
    "First Citizen:\nBefore we proceed any further, hear me speak.\n",
    f"a {END_OF_TEXT} inside is {len(END_OF_TEXT)} characters",
    "",
    "naïve 😀 \u2028 line\r\nends, \x85 and \\n",
    *(f"document {i}: " + "speak, speak. " * (i % 7) for i in range(40)),
    "First Citizen:\nBefore we proceed any further, hear me speak.\n",
]
anywhere = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=12)


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


def write_gz(path: Path, texts=TEXTS) -> None:
    half = len(texts) // 2  # two members, as `cat a.gz b.gz` leaves
    path.write_bytes(gzip.compress(json_lines(texts[:half])) + gzip.compress(json_lines(texts[half:])))


def write_zst(path: Path, texts=TEXTS) -> None:
    half = len(texts) // 2
    codec = pyarrow.Codec("zstd")
    path.write_bytes(b"".join(codec.compress(json_lines(t), asbytes=True) for t in (texts[:half], texts[half:])))


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
    "a.json.gz": write_gz,
    "a.jsonl.zst": write_zst,
    "a.parquet": write_parquet,
    "folder": write_txt,
}


def read(sources, **fields) -> list[str]:
    """The texts of all documents."""
    parts = parts_of(find_files([str(source) for source in sources]), fields.pop("part_bytes", 1 << 30))
    return ["".join(document) for part in parts for piece in part for document in documents(piece, "text")]


def shards(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.bin")}


def tokenize_here(sources, out: Path, spec: Path, part_bytes: int = 1 << 30, **fields) -> dict[str, str]:
    """Every part, in this process."""
    config = TokenizeConfig(tuple(map(str, sources)), str(out), str(spec), **fields)
    files = find_files(config.sources)
    parts = parts_of(files, part_bytes)
    tokenize_corpus._begin(out, config, files, len(parts))
    for number, part in enumerate(parts):
        list(tokenize_part(out, number, part, Tokenizer.load(spec), config))
    return shards(out)


def run(*arguments: object) -> None:
    main(["tokenize", *map(str, arguments)])


# Formats


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_holds_the_same_documents(tmp_path, name):
    FORMATS[name](tmp_path / name)
    assert read([tmp_path / name]) == [text for text in TEXTS if text]


@pytest.mark.parametrize("kind", ["large_string", "dictionary"])
def test_parquet_may_store_text_in_other_ways(tmp_path, kind):
    write_parquet(tmp_path / "a.parquet", kind=kind)
    assert read([tmp_path / "a.parquet"]) == [text for text in TEXTS if text]


def test_every_format_gives_the_same_shards(tmp_path, spec):
    made = {}
    for name, write in FORMATS.items():
        write(tmp_path / name)
        made[name] = tokenize_here([tmp_path / name], tmp_path / f"out-{name}", spec, val_fraction=0.3)
    assert len(made["a.jsonl"]) == 2 and all(each == made["a.jsonl"] for each in made.values())


@pytest.mark.parametrize("end", [b"\n", b""])
def test_a_cut_at_any_byte_puts_each_line_on_one_side(tmp_path, end):
    (tmp_path / "a.jsonl").write_bytes(json_lines(["a", "", "bc", "naïve"]).removesuffix(b"\n") + end)
    [(file, size)] = find_files([str(tmp_path)]).items()
    for cut in range(1, size - 1):
        pieces = Piece(file, 0, cut), Piece(file, cut, cut + 1), Piece(file, cut + 1, size)
        texts = ["".join(document) for piece in pieces for document in documents(piece, "text")]
        assert texts == ["a", "bc", "naïve"]


@given(part_bytes=st.integers(100, 2500))
@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "folder"])
@anywhere
def test_cutting_a_file_anywhere_loses_and_doubles_nothing(tmp_path, name, part_bytes):
    if not (tmp_path / name).exists():
        FORMATS[name](tmp_path / name)
    assert read([tmp_path / name], part_bytes=part_bytes) == [text for text in TEXTS if text]


def test_a_last_line_without_its_end_and_a_byte_order_mark(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + json_lines(["one", "two"])[:-1])
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfthree")
    assert read([tmp_path]) == ["one", "two", "three"]


def test_sources_are_files_folders_patterns_and_urls_each_file_once(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    write_jsonl(tmp_path / "deep" / "b.jsonl", ["b"])
    write_jsonl(tmp_path / "deep" / "er" / "a.jsonl", ["a"])
    (tmp_path / "deep" / "README.md").write_text("no document")
    write_jsonl(tmp_path / "[c].jsonl", ["c"])
    assert read([tmp_path / "deep"]) == ["b", "a"]
    assert read([tmp_path / "deep" / "*" / "*.jsonl", tmp_path / "[c].jsonl"]) == ["a", "c"]
    assert read([tmp_path / "[c].jsonl", tmp_path, tmp_path / "deep"]) == ["c", "b", "a"]
    assert read([f"file://{tmp_path}/deep/**/*.jsonl"]) == ["b", "a"]
    fsspec.filesystem("memory").pipe_file("/sources/x/d.jsonl", json_lines(["d", "e"]))
    assert list(find_files(["memory://sources"])) == ["memory:///sources/x/d.jsonl"]
    assert read(["memory://sources/*/*.jsonl"], part_bytes=20) == ["d", "e"]
    (tmp_path / "links").mkdir()  # as in the cache of the Hugging Face hub
    (tmp_path / "links" / "d.jsonl").symlink_to(tmp_path / "deep" / "b.jsonl")
    assert read([tmp_path / "links"]) == read([tmp_path / "links" / "*.jsonl"]) == ["b"]
    assert list(find_files([str(tmp_path / "links" / "*")]).values()) == [
        (tmp_path / "deep" / "b.jsonl").stat().st_size
    ]


def test_parts_depend_on_names_and_sizes_and_hold_small_files_together():
    files = {"a.txt": 60, "b.txt": 30, "c.jsonl": 250, "d.json.gz": 500, "e.txt": 10}
    shown = [[(piece.file, piece.start, piece.stop) for piece in part] for part in parts_of(files, 100)]
    assert shown == [
        [("c.jsonl", 0, 83)],
        [("c.jsonl", 83, 166)],
        [("c.jsonl", 166, 250)],
        [("a.txt", 0, 60), ("b.txt", 0, 30)],
        [("d.json.gz", 0, 500)],
        [("e.txt", 0, 10)],
    ]


def test_reading_takes_bounded_memory(tmp_path):
    line = json_lines(["Speak, speak. Naïve and long enough to count. " * 20])
    (tmp_path / "a.jsonl").write_bytes(line * 8_000)
    (tmp_path / "b.txt").write_bytes(line * 8_000)
    tracemalloc.start()
    for part in parts_of(find_files([str(tmp_path)]), 1 << 30):
        batches = tokenize_corpus._batches(part, TokenizeConfig())
        n = sum(len(text.text) for batch in batches for text in batch)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n > 14_000_000 and peak < 11_000_000


# Shards


def test_documents_are_in_order_and_each_ends_with_the_end_of_text(tmp_path, spec):
    write_jsonl(tmp_path / "a.jsonl")
    tokenize_here([tmp_path / "a.jsonl"], tmp_path / "out", spec, val_fraction=1e-9)
    tokens, tokenizer = Tokens([tmp_path / "out" / "train_000000.bin"]), Tokenizer.load(spec)
    ids = tokens.window(0, len(tokens)).astype(np.int32)
    expected = [np.append(tokenizer.encode(text), tokenizer.end_of_text) for text in TEXTS if text]
    assert ids.tolist() == np.concatenate(expected).tolist()
    assert (ids == tokenizer.end_of_text).sum() == len(expected)  # none from the text that names it


def test_another_token_can_end_a_document(tmp_path, spec):
    write_jsonl(tmp_path / "a.jsonl", ["abc"])
    tokenize_here([tmp_path / "a.jsonl"], tmp_path / "out", spec, end_of_text="!")
    tokens = Tokens([tmp_path / "out" / "train_000000.bin"])
    assert Tokenizer.load(spec).decode(tokens.window(0, 99)) == "abc!"


def test_copies_are_on_one_side_and_the_fraction_holds(tmp_path, spec):
    texts = [f"document {i}" for i in range(3000)]
    write_jsonl(tmp_path / "a.jsonl", texts)
    write_parquet(tmp_path / "b.parquet", texts[::-1])
    tokenize_here([tmp_path], tmp_path / "out", spec, val_fraction=0.1)
    sides = []
    for split in ("train", "val"):
        tokens = Tokens([tmp_path / "out" / f"{split}_000000.bin"])
        text = Tokenizer.load(spec).decode(tokens.window(0, len(tokens)))
        sides.append(Counter(text.split(END_OF_TEXT)[:-1]))
    assert not sides[0].keys() & sides[1].keys()
    assert sides[0] + sides[1] == Counter(texts * 2)
    assert 220 < len(sides[1]) < 380  # five standard deviations, sqrt(3000 * 0.1 * 0.9) = 16 each


def test_the_side_of_a_document_does_not_depend_on_its_chunks():
    sides = [validates((text,), 0.5) for text in TEXTS]
    assert [validates(tuple(text), 0.5) for text in TEXTS] == sides and len(set(sides)) == 2


@pytest.mark.parametrize("name", ["a.jsonl", "folder"])
def test_a_long_document_is_cut_without_a_trace(tmp_path, spec, monkeypatch, name):
    text = "First Citizen: speak, document naïve, \n and long enough to be cut; " * 50 + "x" * 1000
    FORMATS[name](tmp_path / name, ["before", text, "after"])
    monkeypatch.setattr(tokenize_corpus, "_LONG", 300)
    monkeypatch.setattr(documents_, "_BLOCK", 64)
    tokenize_here([tmp_path / name], tmp_path / "out", spec, val_fraction=1e-9)
    tokens, tokenizer = Tokens([tmp_path / "out" / "train_000000.bin"]), Tokenizer.load(spec)
    expected = [np.append(tokenizer.encode(each), tokenizer.end_of_text) for each in ("before", text, "after")]
    assert tokens.window(0, 10_000).tolist() == np.concatenate(expected).tolist()
    assert len(list(tokenize_corpus._stretches((text,)))) > 5


# The command: workers, arrays, restarts


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Three files, of two and a half megabytes and two small ones: four parts of at most one megabyte."""
    folder = tmp_path_factory.mktemp("corpus")
    write_jsonl(folder / "a.jsonl", [f"{i} {TEXTS[i % len(TEXTS)]}" * 4 for i in range(9000)])
    write_parquet(folder / "b.parquet", [f"document {i}" for i in range(100)])
    write_gz(folder / "c.jsonl.gz")
    return folder


@pytest.fixture(scope="module")
def whole(corpus, spec, tmp_path_factory) -> dict[str, str]:
    """The shards of the corpus, made without any worker."""
    out = tmp_path_factory.mktemp("whole") / "out"
    return tokenize_here([corpus], out, spec, 1 << 20, val_fraction=0.05, part_mb=1)


def options(corpus: Path, spec: Path, out: Path) -> list[object]:
    return [corpus, "--out", out, "--tokenizer", spec, "--val_fraction", 0.05, "--part_mb", 1]


def test_workers_and_arrays_change_no_byte_and_nothing_is_made_twice(corpus, spec, whole, tmp_path, capsys):
    assert len(whole) == 8
    run(*options(corpus, spec, tmp_path / "out"), "--shard", "2/3", "--workers", 2)
    output = capsys.readouterr().out
    assert "1 parts in" in output and f"{tmp_path / 'out'} has 1 of 4 parts" in output
    assert sorted(shards(tmp_path / "out")) == ["train_000001.bin", "val_000001.bin"]
    with pytest.raises(UserError, match=r"1 of 4 train shards: run .* again"):
        load_dataset(DataConfig(source=str(tmp_path / "out")))
    before = (tmp_path / "out" / "train_000001.bin").stat().st_mtime_ns
    run(*options(corpus, spec, tmp_path / "out"), "--workers", 2)
    assert "tokenized 3 parts in" in capsys.readouterr().out
    assert shards(tmp_path / "out") == whole
    run(*options(corpus, spec, tmp_path / "out"), "--shard", "4/4")
    assert "nothing left" in capsys.readouterr().out
    assert (tmp_path / "out" / "train_000001.bin").stat().st_mtime_ns == before
    dataset = load_dataset(DataConfig(source=str(tmp_path / "out")))
    assert len(dataset.train.paths) == 4 and dataset.tokenizer.to_json() == Tokenizer.load(spec).to_json()


def test_the_summary_counts_documents_and_tokens(corpus, spec, tmp_path, capsys):
    run(corpus / "b.parquet", corpus / "c.jsonl.gz", *options(corpus, spec, tmp_path / "out")[1:])
    output = capsys.readouterr().out
    n_documents = len(read([corpus / "b.parquet", corpus / "c.jsonl.gz"]))
    dataset = load_dataset(DataConfig(source=str(tmp_path / "out")))
    n_tokens = len(dataset.train) + len(dataset.val)
    assert "tokenized 1 parts in" in output and "tokens/s" in output and " each" in output
    assert f"{n_documents:,} documents, {n_tokens:,} tokens ({len(dataset.val):,} to validate on)" in output
    ends = [(each.window(0, len(each)) == dataset.tokenizer.end_of_text).sum() for each in (dataset.train, dataset.val)]
    assert sum(ends) == n_documents and min(ends) > 0


def test_what_a_machine_that_went_down_left_is_made_again(corpus, spec, whole, tmp_path):
    out = tmp_path / "out"
    tokenize_here([corpus], out, spec, 1 << 20, val_fraction=0.05, part_mb=1)
    (out / "val_000003.bin").unlink()
    with open(out / "train_000001.bin", "r+b") as file:
        file.truncate(2000)
    (out / "train_000000.bin").unlink()
    (out / "train_000000.bin.0123abcd.part").write_bytes(b"half")
    run(*options(corpus, spec, out))
    assert shards(out) == whole and not list(out.glob("*.part"))


def large(folder: Path) -> Path:
    """A file that takes one worker a minute and more."""
    write_jsonl(folder / "large.jsonl", ["Speak, speak. Naïve and long enough to count.\n" * 1000] * 3000)
    return folder / "large.jsonl"


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def running(group: int) -> list[str]:
    """The states of a process group's members, but for dead ones that nobody has asked about."""
    done = subprocess.run(["ps", "-eo", "pgid=,stat="], capture_output=True, text=True, check=True)
    rows = [line.split() for line in done.stdout.splitlines()]
    return [state for each, state in rows if int(each) == group and not state.startswith("Z")]


def test_a_killed_worker_is_reported_with_its_file(spec, tmp_path):
    source, out = large(tmp_path), tmp_path / "out"

    def kill() -> None:
        wait_for(lambda: list(out.glob("*.part")))
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(UserError, match=r"large\.jsonl \(part 0\) ended with exit code -9.*--workers"):
        run(source, "--out", out, "--tokenizer", spec, "--workers", 1)
    killer.join()
    assert shards(out) == {} and not multiprocessing.active_children()


@pytest.mark.parametrize(
    "whom", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)], ids=["Ctrl-C", "killed"]
)
def test_a_stop_leaves_whole_shards_only_and_no_process(spec, tmp_path, whom):
    source, out = large(tmp_path), tmp_path / "out"
    command = [sys.executable, "-m", "gptjax.data", "tokenize", source, "--out", out, "--tokenizer", spec]
    process = subprocess.Popen(
        [*map(str, command), "--workers", "2", "--part_mb", "50"],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    wait_for(lambda: len(list(out.glob("train*.part"))) == 2)
    if whom == signal.SIGINT:
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the workers too
        assert process.communicate(timeout=60)[1] == "error: interrupted\n" and process.returncode == 130
    else:
        process.kill()
        process.communicate(timeout=60)  # until the last worker, which has the other end of stderr, is gone
    wait_for(lambda: not running(process.pid))
    assert list(out.glob("*.bin*")) == []


def test_a_bucket_that_does_not_answer_is_asked_again(spec, tmp_path, monkeypatch):
    fsspec.filesystem("memory").pipe_file("/flaky/a.jsonl", json_lines(TEXTS))
    config = TokenizeConfig(("memory://flaky",), str(tmp_path), str(spec))
    [part] = parts_of(find_files(config.sources), 1 << 30)
    failures = [OSError("reset by peer"), TimeoutError(), None]

    def flaky(file: str):
        if error := failures.pop(0):
            raise error
        return opened(file)

    opened = documents_._open
    monkeypatch.setattr(documents_, "_open", flaky)
    monkeypatch.setattr(tokenize_corpus, "_WAITS", (0, 0))
    last = list(tokenize_corpus._until_read(tmp_path, 0, part, Tokenizer.load(spec), config))[-1]
    assert last.documents == len(TEXTS) - 1 and len(shards(tmp_path)) == 2
    failures += [OSError("reset by peer")] * 3
    with pytest.raises(UserError, match=r"memory:///flaky/a.jsonl: OSError: reset by peer"):
        list(tokenize_corpus._until_read(tmp_path, 0, part, Tokenizer.load(spec), config))
    failures[:] = [OSError("reset by peer"), None]
    local = parts_of({"/nowhere.jsonl": 9}, 99)[0]
    with pytest.raises(UserError, match="nowhere"):
        list(tokenize_corpus._until_read(tmp_path, 0, local, Tokenizer.load(spec), config))
    assert failures == [None]  # a disk is not asked again


# Mistakes


@pytest.mark.parametrize(
    "changed, complaint",
    [
        (["--val_fraction", "0.1"], r"val_fraction \(0.05, not 0.1\)"),
        (["--part_mb", "2"], r"part_mb \(1, not 2\)"),
        (["--end_of_text", "!"], r"end_of_text .*"),
        (["--tokenizer", "other.json"], "tokenizer"),
        (["--column", "url"], r"column .*"),
        ([], "files"),
    ],
)
def test_a_folder_takes_one_corpus_one_tokenizer_and_one_way_to_cut(
    corpus, spec, tmp_path, monkeypatch, changed, complaint
):
    monkeypatch.chdir(tmp_path)
    config = TokenizeConfig((str(corpus),), "out", str(spec), val_fraction=0.05, part_mb=1)
    tokenize_corpus._begin(Path("out"), config, find_files(config.sources), 4)
    Tokenizer.train_bpe(["other"], 300).save(tmp_path / "other.json")
    write_jsonl(tmp_path / "more.jsonl", ["a"])
    sources = [corpus] if changed else [corpus, "more.jsonl"]
    with pytest.raises(UserError, match=f"out was begun with other (dtype.*|vocab.*)?{complaint}: repeat .*--out"):
        run(*sources, *options(corpus, spec, Path("out"))[1:], *changed)


def test_a_folder_of_other_token_files_is_left_alone(corpus, spec, tmp_path):
    write_tokens(tmp_path / "train.bin", [np.arange(5)], np.dtype("<u2"))
    with pytest.raises(UserError, match="token files of another kind: pass another --out"):
        run(corpus, "--out", tmp_path, "--tokenizer", spec)
    assert [path.name for path in tmp_path.iterdir()] == ["train.bin"]


MISTAKES = {
    "no JSON": ("a.jsonl", json_lines(["one"]) + b"{oops\n", r"a.jsonl, line 2, is no JSON: .*"),
    "a list": ("a.json", b'[\n{"text": "a"}\n]', r"a.json, line 1, is (no JSON|a JSON list).*"),
    "no object": ("a.jsonl", json_lines(["a"]) + b"[1]", r"line 2, is a JSON list, not an object: .*"),
    "no field": ("a.jsonl", b'{"content": "a"}', r"line 1, has no 'text', but 'content': pass --column"),
    "no text": ("a.jsonl", b'{"text": 7}', r"line 1, has a 'text' that is no text but int: .*"),
    "latin": ("a.jsonl", json_lines(["a", "b"]) + b'{"text": "na\xefve"}', r"line 3, is not UTF-8 .*"),
    "surrogate": ("a.jsonl", b'\n{"text": "a\\ud83d"}', r"line 2, is no Unicode: half a surrogate .*1 of 'text'"),
    "latin text": ("a.txt", b"na\xefve", r"a.txt is not UTF-8 at byte 2 .*"),
    "cut gz": ("a.jsonl.gz", gzip.compress(json_lines(TEXTS))[:-9], r"cannot read .*a.jsonl.gz: EOFError.*"),
    "in gz": ("a.jsonl.gz", gzip.compress(json_lines(["a"]) + b"x"), r"a.jsonl.gz, line 2, is no JSON.*"),
    "no Parquet": ("a.parquet", b"PAR1 it is not", r"a.parquet is no whole Parquet file .*"),
}


@pytest.mark.parametrize("name, data, complaint", MISTAKES.values(), ids=MISTAKES)
def test_what_cannot_be_read_is_named(tmp_path, name, data, complaint):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=f"{complaint}$") as error:
        read([tmp_path / name])
    assert str(tmp_path / name) in str(error.value)


def test_the_line_is_the_files_not_the_parts(tmp_path):
    lines = json_lines(["a"] * 99) + b"oops\n" + json_lines(["b"] * 9)
    (tmp_path / "a.jsonl").write_bytes(lines)
    with pytest.raises(UserError, match="line 100, is no JSON"):
        read([tmp_path / "a.jsonl"], part_bytes=150)


def test_a_parquet_file_without_the_text_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"content": ["a"], "id": [1]}), path)
    with pytest.raises(UserError, match=r"a.parquet has no column 'text', but 'content', 'id': pass --column"):
        read([path])
    pyarrow.parquet.write_table(pyarrow.table({"text": [1]}), path)
    with pytest.raises(UserError, match=r"column 'text' of .*a.parquet is no text but int64"):
        read([path])
    latin = pyarrow.StringArray.from_buffers(
        1, pyarrow.py_buffer(np.array([0, 3], "<i4")), pyarrow.py_buffer(b"a\xefb")
    )
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.concat_arrays([pyarrow.array(["x"]), latin])}), path)
    with pytest.raises(UserError, match=r"a.parquet, rows 0 to 1: not UTF-8"):
        read([path])


@pytest.mark.parametrize(
    "source, complaint",
    [("empty.jsonl", "is empty"), ("a.csv", "is no Parquet"), ("none", "does not exist"), ("void", "does not exist"),
     ("*.gz", "does not exist"), ("nowhere://x", "cannot open nowhere://x")],
)  # fmt: skip
def test_sources_that_are_none_are_refused_before_anything_is_made(tmp_path, spec, source, complaint):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "a.csv").write_text("a,b")
    (tmp_path / "void").mkdir()
    with pytest.raises(UserError, match=complaint):
        run(source if "://" in source else tmp_path / source, "--out", tmp_path / "out", "--tokenizer", spec)
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_named_with_the_command_that_installs_it(tmp_path, monkeypatch):
    write_parquet(tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"a.parquet takes pyarrow: pip install 'gptjax\[data\]'"):
        read([tmp_path / "a.parquet"])
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"gs://bucket/x .*gcsfs.*pip install 'gptjax\[data\]'"):
        find_files(["gs://bucket/x"])


def test_a_tokenizer_must_be_made_and_know_the_end_of_a_text(corpus, tmp_path):
    Tokenizer.characters("ab").save(tmp_path / "characters.json")
    with pytest.raises(UserError, match=r"no token '<\|endoftext\|>'.*--end_of_text"):
        run(corpus, "--out", tmp_path / "out", "--tokenizer", tmp_path / "characters.json")
    with pytest.raises(UserError, match="tokenizer='bpe' is not made yet"):
        run(corpus, "--tokenizer", "bpe")


@pytest.mark.parametrize(
    "arguments", ["", "x --shard 0/3", "x --shard 4/3", "x --shard 3", "x --val_fraction 0", "x --out gs://bucket/x"]
)
def test_mistakes_of_the_command_are_one_line(arguments):
    with pytest.raises(UserError, match=r"SOURCES|shard=|val_fraction=|out="):
        run(*arguments.split())


def test_a_mistake_in_a_file_ends_every_worker_with_one_line(spec, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"{oops\n")
    source = large(tmp_path)
    command = [sys.executable, "-m", "gptjax.data", "tokenize", tmp_path / "a.jsonl", source, "--out", tmp_path / "out"]
    done = subprocess.run(
        [*map(str, command), "--tokenizer", str(spec), "--workers", "2"],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and "a.jsonl, line 1, is no JSON" in done.stderr
    assert done.stderr.count("\n") == 1 and not list((tmp_path / "out").glob("*.bin*"))
