"""Coverage-guided fuzzing of all readers: `fuzz.py FOLDER OPTIONS`. It fails at an input without one line.

FOLDER holds a good file for each reader, OPTIONS are libFuzzer's. Each reader has a process of its own, forked from
this one, which has done the imports, and a folder of its own, with the other files beside the one that changes.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["gptjax"]):
    from gptjax.chat.template import find_template, special_tokens
    from gptjax.config import Config
    from gptjax.data.at_scale.documents import Piece, documents
    from gptjax.data.conversations import read_conversations
    from gptjax.data.token_files import open_split
    from gptjax.errors import UserError
    from gptjax.hub.weights import open_weights, stop_ids
    from gptjax.planning.topology import find_topology
    from gptjax.reporting import environment
    from gptjax.reporting.report import read_metrics
    from gptjax.tokenizer import Tokenizer
    from gptjax.vocabulary import read_vocabulary


def tokens(path: Path) -> None:
    for split in ("train", "val"):
        read = open_split(path.parent, split)
        read.window(0, len(read)), read.fingerprint()


def tokenizer(path: Path) -> None:
    read = Tokenizer.load(path)
    read.decode(read.encode("To be, or not to be"))


def side_files(path: Path) -> None:
    find_template(path.parent), special_tokens(path.parent), stop_ids(path.parent)


def lines(path: Path) -> None:
    for document in documents(Piece(str(path), 0, path.stat().st_size), "text"):
        "".join(document)


READERS: dict[str, Callable[[Path], object]] = {  # of the file of this name
    "data.json": tokens,
    "train.bin": tokens,
    "text.jsonl": lines,
    "text.jsonl.gz": lines,
    "chat.jsonl": lambda path: list(read_conversations(path)),
    "chat.jsonl.gz": lambda path: list(read_conversations(path)),
    "tokenizer.json": tokenizer,
    "tokenizer_config.json": side_files,
    "merges.txt": lambda path: read_vocabulary(path.parent),
    "config.json": lambda path: open_weights(path.parent),
    "model.safetensors": lambda path: open_weights(path.parent),
    "model.gguf": open_weights,
    "run.json": Config.from_json,
    "environment.json": lambda path: environment.read(path.parent),
    "metrics.csv": read_metrics,
    "topology": lambda path: find_topology(path.read_text(errors="replace")),
}


def fuzz(file: str, folder: Path, options: list[str]) -> None:
    """Give the reader of a file one input after the other; ends the process, with code 0 if there is no finding."""
    path = folder / "fuzzed" / file / file
    path.parent.mkdir(parents=True)
    for beside in folder.glob("*.*"):
        (path.parent / beside.name).symlink_to(beside)
    path.unlink(missing_ok=True)
    seeds = folder / "seeds" / file
    seeds.mkdir(parents=True)
    (seeds / file).write_bytes((folder / file).read_bytes())

    def one_input(data: bytes) -> None:
        path.write_bytes(data)
        try:
            READERS[file](path)
        except UserError as error:
            assert len(str(error).splitlines()) == 1, error

    limits = [f"-artifact_prefix={path}.", "-rss_limit_mb=0", "-timeout=60"]
    atheris.Setup([sys.argv[0], *options, *limits, str(seeds)], one_input)
    atheris.Fuzz()


def main(folder: Path, options: list[str]) -> None:
    for file in READERS:
        print(f"== {file}", flush=True)
        child = os.fork()
        if child == 0:
            fuzz(file, folder, options)
        if code := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
            sys.exit(code)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
