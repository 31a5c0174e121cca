"""A Hugging Face chat template, rendered as by `transformers`, in a process that a hostile template cannot leave."""

import contextlib
import json
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace

from gptjax.errors import UserError

_MEMORY = 1 << 30  # bytes that a template's process may map
_LONGEST = 1 << 24  # characters of a conversation; no model reads that many
_WAY_OUT = "talk to the model without it: sample.py with --prompt instead of --chat"
# Isolated (-I), so that no module of the current folder runs, and with the parent's idea of where modules are.
_CHILD = "import sys; sys.path[:] = sys.argv[1:]; from gptjax.inference.chat_template import _serve; _serve()"
# Python and jinja2 import some modules when they first need them, which comes too late once files are forbidden.
_WARM_UP = r"{{ 'a\n' | wordwrap | indent | pprint }}{{ lipsum() }}{{ strftime_now('%B') }}{{ raise_exception('') }}"
# What Python reports to audit hooks while a template runs as it should, and while jinja2 says which line fails.
_HARMLESS = {"builtins.id", "compile", "exec", "code.__new__", "object.__getattr__"}


def find_template(folder: Path) -> str | None:
    """The chat template of a folder with a tokenizer, which is in chat_template.jinja or in tokenizer_config.json.

    Of several in one file the one named "default". Raises `UserError` for a file that can't be read.
    """
    path = folder / "chat_template.jinja"
    if path.exists():
        try:
            return path.read_text("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 at byte {error.start}: download it again") from error
    template = _read_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):
        named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = named[-1].get("template") if named else None
    return template if isinstance(template, str) else None


def special_tokens(folder: Path) -> dict[str, str]:
    """The texts of bos_token, eos_token, unk_token and pad_token, of those that the folder's tokenizer has.

    A null in tokenizer_config.json means that there is none. Raises `UserError` for a file that can't be read.
    """
    tokens = _read_json(folder / "special_tokens_map.json") | _read_json(folder / "tokenizer_config.json")
    texts = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token = tokens.get(name)
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            texts[name] = text
    return texts


def render(
    template: str,
    messages: Sequence[dict[str, str]],
    variables: dict[str, str],
    *,
    add_generation_prompt: bool,
    timeout: float = 10.0,
) -> str:
    """The text of a conversation; `variables` has the special tokens, and `timeout` is in seconds.

    The template runs in a child process, in jinja2's sandbox, with little time and memory, and can open no file.
    Where there is no `resource` module, as on Windows, only time is limited. Raises `UserError` if it fails.
    """
    values = {**variables, "messages": list(messages), "add_generation_prompt": add_generation_prompt}
    request = {"template": template, "values": values | {"tools": None, "documents": None}, "timeout": timeout}
    paths = [path for path in sys.path if path] + [str(Path(__file__).parents[2])]
    command = [sys.executable, "-I", "-c", _CHILD, *paths]
    try:
        child = subprocess.run(command, input=json.dumps(request).encode(), capture_output=True, timeout=timeout)
    except subprocess.TimeoutExpired as error:
        raise _failure(f"took longer than {timeout:g} s") from error
    if child.returncode:
        last_line = child.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise _failure(f"stopped with exit code {child.returncode}: {last_line}")
    answer = json.loads(child.stdout)
    if "error" in answer:
        raise _failure(answer["error"])
    return answer["text"]


def _failure(what: str) -> UserError:
    printable = "".join(character if character.isprintable() else " " for character in what)  # ESC commands terminals
    return UserError(f"the chat template {' '.join(printable.split())[:300].rstrip(' .:')}; {_WAY_OUT}")


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file, or an empty one where there is no file."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:  # a UnicodeDecodeError is a ValueError
        raise UserError(f"{path} is not JSON ({error}): download it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object: download it again")
    return content


# The child


def _serve() -> None:
    """Answer the request on stdin with one JSON object on stdout."""
    request = json.load(sys.stdin)
    with contextlib.suppress(TemplateError):
        _text(_WARM_UP, {})
    _confine(request["timeout"])
    try:
        answer = json.dumps({"text": _text(request["template"], request["values"])})
    except MemoryError:
        answer = json.dumps({"error": f"needs more than {_MEMORY >> 30} GiB of memory"})
    except Exception as error:  # a template can raise anything
        answer = json.dumps({"error": _reason(error)})
    sys.stdout.write(answer)


def _confine(timeout: float) -> None:
    """Limit memory, and processor time in case that the parent dies, and forbid what a template has no need for."""
    with contextlib.suppress(ImportError, OSError, ValueError):  # no such module, no such limit, or a lower one
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (int(timeout) + 2,) * 2)
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))

    def forbid(event: str, arguments: Any) -> None:
        if event not in _HARMLESS and not event.startswith("cpython."):  # those are the interpreter's end
            raise SecurityError(event)

    sys.addaudithook(forbid)  # a second wall, if the sandbox has a hole


def _text(template: str, values: Mapping[str, Any]) -> str:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _refuse,
        "strftime_now": lambda pattern: datetime.now().strftime(pattern),
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    text = environment.from_string(template).render(values)
    if len(text) > _LONGEST:
        raise _Refusal(f"writes more than {_LONGEST:,} characters")
    return text


def _reason(error: Exception) -> str:
    """What went wrong and in which line, to go on after "the chat template"."""
    message = str(error)[:1000]
    if isinstance(error, _Refusal):
        return message
    if isinstance(error, TemplateSyntaxError):
        return f"has a mistake in line {error.lineno}: {message}"
    lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == "<template>"]
    where = f" in line {lines[-1]}" if lines else ""
    if isinstance(error, SecurityError):
        return f"tries{where} what is forbidden: {message}"
    return f"fails{where}: {message if isinstance(error, TemplateError) else f'{type(error).__name__}: {message}'}"


class _Refusal(TemplateError):
    """The template, or the limit on its text, rejects a conversation."""


def _refuse(message: object) -> None:
    raise _Refusal(f"rejects these messages: {message}")


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """`json.dumps`, where jinja2's own filter escapes what HTML must escape."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Dict:
    """The function `dict` and its `fromkeys`, without the rest of a class."""

    fromkeys = staticmethod(dict.fromkeys)

    def __call__(self, *arguments: Any, **items: Any) -> dict[Any, Any]:
        return dict(*arguments, **items)


class _Namespace(Namespace):
    """jinja2's, without names that mean something to Python."""

    def __init__(self, /, *arguments: Any, **items: Any) -> None:
        super().__init__()
        for name, value in dict(*arguments, **items).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"the name {name} in a namespace")
        super().__setitem__(name, value)


class _Generation(Extension):
    """{% generation %}, which marks what the model has said: here it's only a scope."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(list(parser.parse_statements(("name:endgeneration",), drop_needle=True)), lineno=line)
