"""The command line that a dataclass describes: typed options, nested sections, errors of one line."""

import argparse
import dataclasses
import difflib
import re
import runpy
import traceback
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

from gptjax.config import SECTIONS, Config, type_name
from gptjax.errors import UserError


def load_config_file(path: Path) -> Config:
    """Run a Python config file and return the `config` that it builds.

    Raises:
        UserError: there is no such file, it fails, or it builds no `Config` named `config`.
    """
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.py")], 1)
        raise UserError(f"no config file {path}" + (f"; did you mean {path.parent / near[0]}?" if near else ""))
    try:
        config = runpy.run_path(str(path)).get("config")
    except Exception as error:
        trace = error.__traceback__
        lines = [f.lineno for f in traceback.extract_tb(trace) if f.filename == str(path)]
        where = f"{path}, line {lines[-1]}" if lines else str(path)
        raise UserError(f"{where}: {_explain(error)}") from error
    if not isinstance(config, Config):
        raise UserError(f"{path} builds no `config = Config(...)`")
    return config


def _explain(error: Exception) -> str:
    unknown = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    if not unknown:
        return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    sections = {cls.__name__: cls for cls in [Config, *SECTIONS.values()]}
    fields = [f.name for f in dataclasses.fields(sections[unknown[1]])] if unknown[1] in sections else []
    return f"{unknown[1]} has no field {unknown[2]!r}" + _did_you_mean(unknown[2], fields)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are `UserError`s, with typed options made from dataclass fields."""

    def __init__(self, prog: str, description: str | None, add_help: bool = True) -> None:
        super().__init__(
            prog, description=description, add_help=add_help, allow_abbrev=False, formatter_class=_HelpFormatter
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")

    def add_fields(self, defaults: Any, prefix: str = "") -> None:
        """Add `--prefix.field` for every field of a dataclass, nested sections as groups of their own.

        A field that is a tuple takes one value or more.
        """
        group = self.add_argument_group(prefix or "options")
        hints = typing.get_type_hints(type(defaults))
        for spec in dataclasses.fields(defaults):
            default, hint = getattr(defaults, spec.name), hints[spec.name]
            name = f"{prefix}.{spec.name}" if prefix else spec.name
            if dataclasses.is_dataclass(default):
                self.add_fields(default, name)
                continue
            shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
            text = f"{spec.metadata['help']} (default: {'none' if shown in (None, '') else shown})".replace("%", "%%")
            metavar = type_name(hint).removeprefix("a ").removeprefix("an ")
            if spec.metadata.get("positional"):
                number: dict[str, Any] = {"nargs": "+"} if typing.get_origin(hint) is tuple else {}
                self.add_argument(name, metavar=name.upper(), type=_reader(hint), help=spec.metadata["help"], **number)
                continue
            flag: dict[str, Any] = {"nargs": "?", "const": True} if hint is bool else {}
            flag = {"nargs": "+"} if typing.get_origin(hint) is tuple else flag
            group.add_argument(
                f"--{name}", dest=name, metavar=metavar, type=_reader(hint), default=default, help=text, **flag
            )

    def parse(self, argv: Sequence[str], *defaults: Any, strict: bool = True) -> Any:
        """Each of the `defaults` (after `add_fields` for each) with the fields that `argv` names replaced.

        Raises:
            UserError: an unknown option (with the nearest known one) if strict, a wrong type, values that do not fit.
        """
        values, unknown = self.parse_known_args([_normalize(argument) for argument in argv])
        if unknown and strict:
            known = [text for action in self._actions for text in action.option_strings]
            raise UserError(f"unknown argument {unknown[0]}" + _did_you_mean(unknown[0].split("=")[0], known))
        return [_build(default, vars(values), "") for default in defaults]


class _HelpFormatter(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=110)

    def add_usage(self, usage: Any, actions: Any, groups: Any, prefix: Any = None) -> None:
        places = "".join(f" {action.metavar}" for action in actions if not action.option_strings)
        super().add_usage(f"%(prog)s [options]{places}", actions, groups, prefix)


def _normalize(argument: str) -> str:
    """`--train.max-steps=3` as `--train.max_steps=3`."""
    name, equals, value = argument.partition("=")
    return name[:2] + name[2:].replace("-", "_") + equals + value if name.startswith("--") else argument


def _did_you_mean(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, 1, 0.5)
    near = near or [k for k in known if k.split(".")[-1] == name.removeprefix("--").split(".")[-1]]
    return f"; did you mean {near[0]}?" if near else ""


def _build(defaults: Any, values: dict[str, Any], prefix: str) -> Any:
    changes = {
        spec.name: _build(default, values, f"{prefix}{spec.name}.")
        if dataclasses.is_dataclass(default := getattr(defaults, spec.name))
        else tuple(value)
        if isinstance(value := values[prefix + spec.name], list)
        else value
        for spec in dataclasses.fields(defaults)
    }
    return dataclasses.replace(defaults, **changes)


def _reader(hint: Any) -> Any:
    """The function that reads a value of type `hint` from the command line, or one of a tuple's values."""
    if typing.get_origin(hint) is tuple:
        return _reader(typing.get_args(hint)[0])

    def read(text: str) -> Any:
        options = typing.get_args(hint)
        if typing.get_origin(hint) is Literal and text in options:
            return text
        if type(None) in options and text.lower() == "none":
            return None
        plain = next((t for t in options if t is not type(None)), hint) if options else hint
        try:
            if plain is bool:
                return {"true": True, "false": False}[text.lower()]
            if plain in (int, float, str):
                return plain(text)
        except (ValueError, KeyError):
            pass
        raise argparse.ArgumentTypeError(f"{text!r} is not {type_name(hint)}")

    return read
