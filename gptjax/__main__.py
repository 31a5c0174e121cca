"""The command `gptjax`: each command of the package by its name, as in `gptjax train --config shakespeare`."""

import argparse
import difflib
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from gptjax.errors import LenientOutput, UserError, one_line_errors
from gptjax.host import keep_freed_memory

COMMANDS = {  # each is gptjax/NAME.py or gptjax/NAME/__main__.py, with a function main
    "train": "train a GPT, or resume a run",
    "sample": "generate text, or chat with a model",
    "compare": "answers of several models to the same prompts, side by side on one page",
    "evaluate": "loss of a text, or HellaSwag",
    "export": "write a folder for transformers, or a GGUF file for llama.cpp",
    "serve": "an OpenAI-compatible server, with a page to talk to models",
    "verify": "show that a run's files are what it computed",
    "plan": "memory, speed and cost of a run on hardware that is not here",
    "data": "prepare a text, or tokenize a corpus that does not fit in memory",
}


def main() -> NoReturn:
    """Run the command that the command line names first."""
    if "_ARGCOMPLETE" in os.environ:
        complete(os.environ["COMP_LINE"][: int(os.environ["COMP_POINT"])])
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in COMMANDS:
        run_command(name, arguments)
    with one_line_errors():
        if name in ("-h", "--help"):
            print(_overview())
        elif name == "--version":
            import importlib.metadata

            print(f"gptjax {importlib.metadata.version('gptjax')}")
        else:
            near = difflib.get_close_matches(name, COMMANDS, 1)
            raise UserError(f"no command {name}" + (f"; did you mean {near[0]}?" if near else " (see gptjax --help)"))
    sys.exit(0)


def run_command(name: str, arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command in this process and end it: by default with the arguments of the command line."""
    keep_freed_memory()
    os.environ.pop("MPLBACKEND", None)  # a notebook's, with which matplotlib may not even be imported
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends the process without a traceback
    module = importlib.import_module(f"gptjax.{name}.__main__" if name == "data" else f"gptjax.{name}")
    with one_line_errors():
        if name == "train":
            sys.stdout = LenientOutput(sys.stdout)
        code = module.main(sys.argv[1:] if arguments is None else arguments)
    sys.exit(code)


def complete(line: str) -> NoReturn:
    """Answer argcomplete, which a shell runs at the Tab key: what may follow on its command line, read up to there."""
    import argcomplete

    words = [*line.split(), *[""] * line[-1:].isspace()]  # the last one is to be completed
    n = 3 if words[1:3] == ["data", "tokenize"] and len(words) > 3 else 2
    if len(words) > 2 and words[1] in COMMANDS:
        os.environ["_ARGCOMPLETE"] = str(n)  # how many words stand for the program
        run_command(words[1], words[2:n])
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=COMMANDS)
    argcomplete.autocomplete(parser)
    sys.exit(1)


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        ["usage: gptjax COMMAND [options]", "", *lines, "", "gptjax COMMAND --help explains the options of a command."]
    )


if __name__ == "__main__":
    main()
