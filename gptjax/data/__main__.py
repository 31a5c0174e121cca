"""The command line: `python -m gptjax.data SOURCE`, and `python -m gptjax.data convert-meta PATH/meta.pkl`."""

import argparse
import dataclasses
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from gptjax.config import DataConfig
from gptjax.data.prepare import prepare
from gptjax.errors import UserError, one_line_errors
from gptjax.tokenizer import Tokenizer


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}: see {self.prog} --help")


class _DataUnpickler(pickle.Unpickler):
    """Reads plain data: a pickle that names any class or function, which is how one runs code, is refused."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it wants to load {module}.{name}")


def main(arguments: Sequence[str]) -> None:
    """Prepare a text, or convert nanoGPT's meta.pkl."""
    if arguments[:1] == ["convert-meta"]:
        parser = _Parser(prog="python -m gptjax.data convert-meta", description=convert_meta.__doc__)
        parser.add_argument("path", type=Path, metavar="PATH/meta.pkl")
        print(f"wrote {convert_meta(parser.parse_args(arguments[1:]).path)}")
        return
    options = vars(_parser().parse_args(arguments))
    form = options.pop("format")
    prepare(DataConfig(**options), form)


def convert_meta(path: Path) -> Path:
    """Write nanoGPT's character vocabulary, the meta.pkl beside its token files, as a tokenizer.json there."""
    try:
        with open(path, "rb") as file:
            characters: dict[int, str] = _DataUnpickler(file).load()["itos"]
        ids = {character: i for i, character in characters.items()}
        if sorted(ids.values()) != list(range(len(characters))) or any(len(character) != 1 for character in ids):
            raise ValueError("its 'itos' does not map 0, 1, 2, ... to one character each")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except Exception as error:  # a damaged pickle raises nearly anything
        raise UserError(f"{path} is not a character vocabulary of nanoGPT: {error}; nothing in it was run") from error
    target = path.with_name("tokenizer.json")
    Tokenizer.from_characters(ids).save(target)
    return target


def _parser() -> _Parser:
    parser = _Parser(
        prog="python -m gptjax.data",
        description="Turn a text into a folder of token files that --data.source takes.",
        epilog="`python -m gptjax.data convert-meta PATH/meta.pkl` makes nanoGPT's character data sets usable.",
    )
    help: dict[str, Any] = {field.name: field.metadata["help"] for field in dataclasses.fields(DataConfig)}
    defaults = DataConfig()
    parser.add_argument("source", metavar="SOURCE", help=help["source"])
    for name, kind in (("tokenizer", str), ("vocab_size", int), ("val_fraction", float), ("sha256", str), ("dir", str)):
        default = getattr(defaults, name)
        parser.add_argument(f"--{name}", type=kind, default=default, help=f"{help[name]} (default: {default})")
    parser.add_argument("--format", choices=("nanogpt", "llmc"), default="nanogpt", help="of the token files")
    return parser


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
