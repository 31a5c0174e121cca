"""The command line of a dataclass: a typed option for each field, and one-line errors that suggest the nearest name."""

import argparse
import contextlib
import dataclasses
import difflib
import inspect
import os
import re
import runpy
import shutil
import sys
import traceback
import types
import typing
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

from gptjax.config import SECTIONS, Config, type_name
from gptjax.errors import UserError, first_line
from gptjax.files import shipped

Options = TypeVar("Options")
Dtype = Literal["auto", "float32", "bfloat16", "int8"]
Which = Literal["best", "latest"]
GgufType = Literal["f32", "f16", "bf16", "q8_0", "q4_0"]
# Help texts shared by the commands that load a model; config.MODEL_HELP is another.
CHECKPOINT_HELP = "which of a run's checkpoints: the one with the best validation loss, or the latest"
DTYPE_HELP = (
    "dtype of activations, and of weights that are not from a run; int8: weights in int8 (a quarter of float32's "
    "memory; on some CPUs faster), activations as with auto; "
    "auto: float32 on CPU, elsewhere the run's own where the hardware has it, else bfloat16 or float32"
)
GROUPS = {"": "options", "train": "training"}  # of --help, by the prefix of their options; others have its name


def load_config_file(path: Path) -> Config:
    """Run a Python config file and return its `config`; `UserError` if it has none or raises an error.

    A name without a folder and without .py is that of a config that comes with gptjax.
    """
    if not path.is_file() and path.name == str(path) and not path.suffix:
        path = shipped("configs") / f"{path}.py"
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.py")], 1)
        raise UserError(f"no config file {path}" + (f"; did you mean {path.parent / near[0]}?" if near else ""))
    try:
        config = runpy.run_path(str(path)).get("config")
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
        place = f"{path}, line {lines[-1]}" if lines else str(path)
        raise UserError(f"{place}: {_explain(error)}") from error
    if not isinstance(config, Config):
        raise UserError(f"{path} builds no `config = Config(...)`")
    return config


def _explain(error: BaseException) -> str:
    unknown = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", first_line(error))
    if not unknown:
        return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {first_line(error)}"
    sections = {cls.__name__: cls for cls in [Config, *SECTIONS.values()]}
    fields = [f.name for f in dataclasses.fields(sections[unknown[1]])] if unknown[1] in sections else []
    return f"{unknown[1]} has no field {unknown[2]!r}" + _did_you_mean(unknown[2], fields)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises `UserError` and takes its options from dataclasses.

    With `brief`, --help shows the usual fields of a config's sections, and --help-all shows all.
    """

    def __init__(self, prog: str, description: str | None, add_help: bool = True, brief: bool = False) -> None:
        text = description and inspect.cleandoc(description)
        self._complete, self._brief, self._rare = add_help, brief, set[str]()
        self._named = dict[str, argparse._ArgumentGroup]()
        super().__init__(prog, "%(prog)s [options]", text, add_help=False, allow_abbrev=False)
        if add_help:
            self._group("help").add_argument("-h", "--help", action="help", help="show this help and exit")
            if brief:
                self._group("help").add_argument("--help-all", action=_HelpAll, help="show all options and exit")

    def error(self, message: str) -> NoReturn:
        """Raise `UserError` with argparse's complaint."""
        raise UserError(f"{message} (see {self.prog} --help)")

    def format_help(self, everything: bool = False) -> str:
        """The help in groups, in colour if it goes to a terminal."""
        from rich_argparse import RawDescriptionRichHelpFormatter  # here: it takes a tenth of a second

        class Formatter(RawDescriptionRichHelpFormatter):
            group_name_formatter = str
            text_markup = help_markup = False

        width = min(shutil.get_terminal_size((110, 24)).columns, 120)
        self.formatter_class = partial(Formatter, max_help_position=36, width=width)
        texts = {action: action.help for action in self._actions}
        for action in self._actions if self._brief and not everything else ():
            if action.dest in self._rare:
                action.help = argparse.SUPPRESS
        try:
            return super().format_help()
        finally:
            for action, text in texts.items():
                action.help = text
            self.formatter_class = argparse.HelpFormatter

    def _group(self, name: str) -> argparse._ArgumentGroup:
        if name not in self._named:
            self._named[name] = self.add_argument_group(name)
        return self._named[name]

    def add_fields(self, defaults: Any, prefix: str = "") -> None:
        """Add an option `--prefix.field` for each field of a dataclass, and a group for each nested dataclass.

        A tuple field takes one or more values.
        """
        hints = typing.get_type_hints(type(defaults))
        named = {f"{prefix}.{spec.name}" if prefix else spec.name: spec for spec in dataclasses.fields(defaults)}
        self._rare |= {name for name, spec in named.items() if prefix and not spec.metadata["usual"]}
        for name in sorted(named, key=self._rare.__contains__):
            default = getattr(defaults, named[name].name)
            if dataclasses.is_dataclass(default):
                self.add_fields(default, name)
            elif named[name].metadata.get("positional"):
                self._add_positional(name, named[name], hints[named[name].name])
            else:
                group = named[name].metadata.get("group") or GROUPS.get(prefix, prefix)
                self._add_option(self._group(group), name, named[name], hints[named[name].name], default)

    def _add_positional(self, name: str, spec: "dataclasses.Field[Any]", hint: Any) -> None:
        number: dict[str, Any] = {"nargs": "+"} if typing.get_origin(hint) is tuple else {}
        self.usage = f"{self.usage} {name.upper()}"
        text = spec.metadata["help"].replace("%", "%%")
        self._group("arguments").add_argument(name, metavar=name.upper(), type=_reader(hint), help=text, **number)

    def _add_option(self, group: Any, name: str, spec: "dataclasses.Field[Any]", hint: Any, default: Any) -> None:
        number: dict[str, Any] = {"nargs": "+"} if typing.get_origin(hint) is tuple else {}
        if hint is bool or "const" in spec.metadata:
            number = {"nargs": "?", "const": spec.metadata.get("const", True)}
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        unset = default is None or default is False or default in ("", ())
        text = spec.metadata["help"] + ("" if unset else f" (default: {shown})")
        metavar = spec.metadata.get("metavar") or _metavar(hint)
        number |= {"metavar": metavar, "type": _reader(hint), "default": default, "help": text.replace("%", "%%")}
        action: Any = group.add_argument(f"--{name}", dest=name, **number)
        if metavar.startswith("{"):
            action.completer = lambda **_: metavar.strip("{}").split(",")  # for argcomplete

    def parse(self, argv: Sequence[str], *defaults: Any, strict: bool = True) -> Any:
        """A copy of each of `defaults`, whose fields were added before, with the values that `argv` gives.

        Raises `UserError` if a value does not fit, or (if strict) if an option is unknown.
        """
        if self._complete and "_ARGCOMPLETE" in os.environ:  # a shell asks what may follow
            import argcomplete

            argcomplete.autocomplete(self)
        values, unknown = self.parse_known_args(argv)
        if unknown and strict:
            known = [text for action in self._actions for text in action.option_strings]
            raise UserError(f"unknown argument {unknown[0]}" + _did_you_mean(unknown[0].split("=")[0], known))
        return [_build(default, vars(values), "") for default in defaults]


class _HelpAll(argparse.Action):
    """Prints the help with all options and exits."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: Any, *_: Any) -> None:
        print(parser.format_help(everything=True), end="")
        parser.exit()


def program(command: str) -> str:
    """How the user started a command: "train.py", or else "gptjax train"."""
    script = Path(sys.argv[0])
    at_top = script.name == f"{command}.py" and script.parent.name != "gptjax"
    return script.name if at_top else f"gptjax {command}"


def parse_arguments(program: str, description: str | None, argv: Sequence[str], defaults: Options) -> Options:
    """A copy of `defaults`, a dataclass, with the values that `argv` gives; raises `UserError` as `Parser.parse`."""
    parser = Parser(program, description)
    parser.add_fields(defaults)
    [options] = parser.parse(argv, defaults)
    return options


def _metavar(hint: Any) -> str:
    """N for an integer, X for another number, TEXT, or the choices as {a,b}."""
    if typing.get_origin(hint) is tuple or isinstance(hint, types.UnionType):
        return _metavar(next(each for each in typing.get_args(hint) if each is not type(None)))
    if typing.get_origin(hint) is Literal:
        return "{" + ",".join(typing.get_args(hint)) + "}"
    return {int: "N", float: "X", bool: "{true,false}"}.get(hint, "TEXT")


def _did_you_mean(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, 1, 0.5)
    near = near or [k for k in known if k.split(".")[-1] == name.removeprefix("--").split(".")[-1]]
    return f"; did you mean {near[0]}?" if near else ""


def _build(defaults: Any, values: dict[str, Any], prefix: str) -> Any:
    changes: dict[str, Any] = {}
    for spec in dataclasses.fields(defaults):
        default, name = getattr(defaults, spec.name), prefix + spec.name
        if dataclasses.is_dataclass(default):
            changes[spec.name] = _build(default, values, f"{name}.")
        else:
            changes[spec.name] = tuple(values[name]) if isinstance(values[name], list) else values[name]
    return dataclasses.replace(defaults, **changes)


def _reader(hint: Any) -> Any:
    """The function that reads one value of type `hint` (of a tuple, one element) from the command line."""
    options = typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        return _reader(options[0])
    plain = next((option for option in options if option is not type(None)), hint)

    def read(text: str) -> Any:
        if typing.get_origin(hint) is Literal and text in options:
            return text
        if type(None) in options and text.lower() == "none":
            return None
        with contextlib.suppress(ValueError, KeyError):
            if plain is bool:
                return {"true": True, "false": False}[text.lower()]
            if plain in (int, float, str):
                return plain(text)
        raise argparse.ArgumentTypeError(f"{text!r} is not {type_name(hint)}")

    return read
