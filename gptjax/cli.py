"""The command line of a dataclass: a typed option for each field, and one-line errors that suggest the nearest name."""

import argparse
import contextlib
import dataclasses
import difflib
import inspect
import re
import runpy
import traceback
import typing
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

from gptjax.config import SECTIONS, Config, type_name
from gptjax.errors import UserError, first_line

Options = TypeVar("Options")


def load_config_file(path: Path) -> Config:
    """Run a Python config file and return its `config`; `UserError` if it has none or raises an error."""
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
    """An ArgumentParser that raises `UserError` and takes its options from dataclasses."""

    def __init__(self, prog: str, description: str | None, add_help: bool = True) -> None:
        text = description and inspect.cleandoc(description)
        super().__init__(prog, "%(prog)s [options]", text, add_help=add_help, allow_abbrev=False)
        self.formatter_class = partial(argparse.RawDescriptionHelpFormatter, max_help_position=34, width=110)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")

    def add_fields(self, defaults: Any, prefix: str = "") -> None:
        """Add an option `--prefix.field` for each field of a dataclass, and a group for each nested dataclass.

        A tuple field takes one or more values.
        """
        group = self.add_argument_group(prefix or "options")
        hints = typing.get_type_hints(type(defaults))
        for spec in dataclasses.fields(defaults):
            default, hint = getattr(defaults, spec.name), hints[spec.name]
            name = f"{prefix}.{spec.name}" if prefix else spec.name
            if dataclasses.is_dataclass(default):
                self.add_fields(default, name)
                continue
            number: dict[str, Any] = {"nargs": "+"} if typing.get_origin(hint) is tuple else {}
            if spec.metadata.get("positional"):
                self.usage = f"{self.usage} {name.upper()}"
                self.add_argument(name, metavar=name.upper(), type=_reader(hint), help=spec.metadata["help"], **number)
                continue
            if hint is bool or "const" in spec.metadata:
                number = {"nargs": "?", "const": spec.metadata.get("const", True)}
            shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
            text = f"{spec.metadata['help']} (default: {'none' if shown in (None, '') else shown})".replace("%", "%%")
            metavar = type_name(hint).removeprefix("a ").removeprefix("an ")
            group.add_argument(
                f"--{name}", dest=name, metavar=metavar, type=_reader(hint), default=default, help=text, **number
            )

    def parse(self, argv: Sequence[str], *defaults: Any, strict: bool = True) -> Any:
        """A copy of each of `defaults`, whose fields were added before, with the values that `argv` gives.

        Raises `UserError` if a value does not fit, or (if strict) if an option is unknown.
        """
        values, unknown = self.parse_known_args(argv)
        if unknown and strict:
            known = [text for action in self._actions for text in action.option_strings]
            raise UserError(f"unknown argument {unknown[0]}" + _did_you_mean(unknown[0].split("=")[0], known))
        return [_build(default, vars(values), "") for default in defaults]


def parse_arguments(program: str, description: str | None, argv: Sequence[str], defaults: Options) -> Options:
    """A copy of `defaults`, a dataclass, with the values that `argv` gives; raises `UserError` as `Parser.parse`."""
    parser = Parser(program, description)
    parser.add_fields(defaults)
    [options] = parser.parse(argv, defaults)
    return options


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
