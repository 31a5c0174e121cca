"""The command line for data: prepare a text, or tokenize a corpus larger than memory."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from gptjax.__main__ import run_command
from gptjax.cli import parse_arguments, program
from gptjax.config import DataConfig, Section, argument, option
from gptjax.data.at_scale.tokenize_corpus import TokenizeConfig, tokenize_corpus
from gptjax.data.prepare import prepare

_HELP: dict[str, Any] = {field.name: field.metadata["help"] for field in dataclasses.fields(DataConfig)}


@dataclasses.dataclass(frozen=True)
class Preparation(Section):
    """Turn a text into a folder of token files for --data.source.

    Another command, `python -m gptjax.data tokenize`, does so for a corpus larger than memory.
    """

    source: str = argument(
        "'shakespeare' (the complete plays), a UTF-8 text file, a folder of .txt and .md, or a URL; chat: "
        "'shakespeare-dialogues', or JSON lines of messages"
    )
    format: Literal["text", "chat"] = option(DataConfig.format, _HELP["format"])
    tokenizer: str = option(DataConfig.tokenizer, _HELP["tokenizer"])
    vocab_size: int = option(DataConfig.vocab_size, _HELP["vocab_size"])
    val_fraction: float = option(DataConfig.val_fraction, _HELP["val_fraction"])
    sha256: str | None = option(DataConfig.sha256, _HELP["sha256"])
    dir: str = option(DataConfig.dir, _HELP["dir"], metavar="PATH")


def main(arguments: Sequence[str]) -> None:
    """Run the command that the arguments give."""
    if arguments[:1] == ["tokenize"]:
        options = TokenizeConfig()
        tokenize_corpus(parse_arguments(f"{program('data')} tokenize", options.__doc__, arguments[1:], options))
    else:
        preparation = parse_arguments(program("data"), Preparation.__doc__, arguments, Preparation())
        prepare(DataConfig(**vars(preparation)))


if __name__ == "__main__":
    run_command("data")
