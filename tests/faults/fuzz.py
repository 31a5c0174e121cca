"""Coverage-guided fuzzing of one reader: `fuzz.py READER FILE FOLDER OPTIONS`. It fails at an input without one line.

FOLDER holds `seeds`, good files to begin with, and `work`, where the reader finds FILE and what else it reads; OPTIONS
are libFuzzer's.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["gptjax"]):
    from gptjax import environment
    from gptjax.chat.template import find_template, special_tokens
    from gptjax.config import Config
    from gptjax.data.at_scale.documents import Piece, documents
    from gptjax.data.conversations import read_conversations
    from gptjax.data.token_files import open_split
    from gptjax.errors import UserError
    from gptjax.hub.weights import open_weights, stop_ids
    from gptjax.planning.topology import find_topology
    from gptjax.report import read_metrics
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


READERS: dict[str, Callable[[Path], object]] = {
    "tokens": tokens,
    "tokenizer": tokenizer,
    "vocabulary": lambda path: read_vocabulary(path.parent),
    "run_config": Config.from_json,
    "environment": lambda path: environment.read(path.parent),
    "metrics": read_metrics,
    "documents": lines,
    "conversations": lambda path: list(read_conversations(path)),
    "folder": lambda path: open_weights(path.parent),
    "gguf": open_weights,
    "side_files": side_files,
    "topology": lambda path: find_topology(path.read_text(errors="replace")),
}


def main(reader: str, file: str, folder: Path, *options: str) -> None:

    def one_input(data: bytes) -> None:
        path = folder / "work" / file
        path.write_bytes(data)
        try:
            READERS[reader](path)
        except UserError as error:
            assert len(str(error).splitlines()) == 1, error

    limits = [f"-artifact_prefix={folder}/", "-rss_limit_mb=0", "-timeout=60"]
    atheris.Setup([sys.argv[0], *options, *limits, str(folder / "seeds")], one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), *sys.argv[4:])
