"""The command line for data: prepare a text, tokenize a corpus larger than memory, or convert nanoGPT's meta.pkl."""

import dataclasses
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from gptjax.cli import Parser, parse_arguments
from gptjax.config import DataConfig, Section, argument, option
from gptjax.data.at_scale.tokenize_corpus import TokenizeConfig, tokenize_corpus
from gptjax.data.prepare import prepare
from gptjax.errors import UserError, one_line_errors
from gptjax.tokenizer import Tokenizer

_HELP: dict[str, Any] = {field.name: field.metadata["help"] for field in dataclasses.fields(DataConfig)}


@dataclasses.dataclass(frozen=True)
class Preparation(Section):
    """Turn a text into a folder of token files for --data.source.

    Two more commands: `python -m gptjax.data tokenize` does so for a corpus larger than memory, and `python -m
    gptjax.data convert-meta PATH/meta.pkl` makes nanoGPT's character data sets usable.
    """

    source: str = argument("'shakespeare' (the complete plays), a UTF-8 text file, a folder of .txt and .md, or a URL")
    tokenizer: str = option(DataConfig.tokenizer, _HELP["tokenizer"])
    vocab_size: int = option(DataConfig.vocab_size, _HELP["vocab_size"])
    val_fraction: float = option(DataConfig.val_fraction, _HELP["val_fraction"])
    sha256: str | None = option(DataConfig.sha256, _HELP["sha256"])
    dir: str = option(DataConfig.dir, _HELP["dir"])


class _DataUnpickler(pickle.Unpickler):
    """Reads plain data only: it refuses classes and functions, through which a pickle could run code."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it loads {module}.{name}")


def main(arguments: Sequence[str]) -> None:
    """Run the command that the arguments give."""
    command = arguments[0] if arguments else ""
    if command == "tokenize":
        options = TokenizeConfig()
        tokenize_corpus(parse_arguments("python -m gptjax.data tokenize", options.__doc__, arguments[1:], options))
    elif command == "convert-meta":
        parser = Parser("python -m gptjax.data convert-meta", convert_meta.__doc__)
        parser.add_argument("path", metavar="PATH", help="nanoGPT's meta.pkl")
        print(f"wrote {convert_meta(Path(parser.parse_args(arguments[1:]).path))}")
    else:
        preparation = parse_arguments("python -m gptjax.data", Preparation.__doc__, arguments, Preparation())
        prepare(DataConfig(**vars(preparation)))


def convert_meta(path: Path) -> Path:
    """Convert nanoGPT's meta.pkl, a character vocabulary, to a tokenizer.json in the same folder."""
    try:
        with open(path, "rb") as file:
            characters: dict[int, str] = _DataUnpickler(file).load()["itos"]
        ids = {character: i for i, character in characters.items()}
        if sorted(ids.values()) != list(range(len(characters))) or any(len(character) != 1 for character in ids):
            raise ValueError("its 'itos' does not map 0, 1, 2, ... to one character each")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except Exception as error:  # a damaged pickle can raise almost any exception
        raise UserError(f"{path} is not a character vocabulary of nanoGPT: {error} (nothing in it was run)") from error
    target = path.with_name("tokenizer.json")
    Tokenizer.from_characters(ids).save(target)
    return target


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
