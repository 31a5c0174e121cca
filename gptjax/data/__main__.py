"""The command line: `python -m gptjax.data SOURCE`, `... tokenize SOURCE... --out DIR`, `... convert-meta PATH`."""

import dataclasses
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from gptjax.cli import Parser
from gptjax.config import DataConfig, Section, argument, option
from gptjax.data.at_scale.tokenize_corpus import TokenizeConfig, tokenize_corpus
from gptjax.data.prepare import Format, prepare
from gptjax.errors import UserError, one_line_errors
from gptjax.tokenizer import Tokenizer

_HELP: dict[str, Any] = {field.name: field.metadata["help"] for field in dataclasses.fields(DataConfig)}
_PREPARE = (
    "Turn a text into a folder of token files that --data.source takes. For a corpus too large for memory there is "
    "`python -m gptjax.data tokenize --help`; `python -m gptjax.data convert-meta PATH/meta.pkl` makes nanoGPT's "
    "character data sets usable."
)
_TOKENIZE = (
    "Turn a corpus of any size into shards that --data.source takes, in parallel and in bounded memory. Each document "
    "is followed by the end-of-text token. A stop leaves whole shards; the same command makes the rest."
)


@dataclasses.dataclass(frozen=True)
class Preparation(Section):
    source: str = argument(_HELP["source"])
    tokenizer: str = option(DataConfig.tokenizer, _HELP["tokenizer"])
    vocab_size: int = option(DataConfig.vocab_size, _HELP["vocab_size"])
    val_fraction: float = option(DataConfig.val_fraction, _HELP["val_fraction"])
    sha256: str | None = option(DataConfig.sha256, _HELP["sha256"])
    dir: str = option(DataConfig.dir, _HELP["dir"])
    format: Format = option("nanogpt", "of the token files")


@dataclasses.dataclass(frozen=True)
class Conversion(Section):
    path: str = argument("nanoGPT's meta.pkl")


class _DataUnpickler(pickle.Unpickler):
    """Reads plain data: a pickle that names any class or function, which is how one runs code, is refused."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it wants to load {module}.{name}")


def main(arguments: Sequence[str]) -> None:
    """Prepare a text, tokenize a corpus too large for that, or convert nanoGPT's meta.pkl."""
    command = arguments[0] if arguments else ""
    if command == "tokenize":
        tokenize_corpus(_parse("tokenize", _TOKENIZE, TokenizeConfig(), arguments))
    elif command == "convert-meta":
        path = _parse("convert-meta", convert_meta.__doc__, Conversion(), arguments).path
        print(f"wrote {convert_meta(Path(path))}")
    else:
        options = vars(_parse("", _PREPARE, Preparation(), arguments))
        form = options.pop("format")
        prepare(DataConfig(**options), form)


def _parse(command: str, about: str | None, defaults: Any, arguments: Sequence[str]) -> Any:
    parser = Parser(f"python -m gptjax.data {command}".strip(), about)
    parser.add_fields(defaults)
    [parsed] = parser.parse(arguments[1:] if command else arguments, defaults)
    return parsed


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


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
