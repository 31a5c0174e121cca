"""Hugging Face chat templates, rendered as `transformers` does, in a child process that confines hostile ones."""

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
from gptjax.files import read_json

_MEMORY = 1 << 30  # bytes that the child process may map
_LONGEST = 1 << 24  # characters of a rendered conversation, far more than any model reads
# Isolated (-I) from modules in the current folder, with the parent's module search path.
_CHILD = "import sys; sys.path[:] = sys.argv[1:]; from gptjax.inference.chat_template import _serve; _serve()"
# Python and jinja2 import some modules on first use, which fails once opening files is forbidden: use them before.
_WARM_UP = r"{{ 'a\n' | wordwrap | indent | pprint }}{{ lipsum() }}{{ strftime_now('%B') }}{{ raise_exception('') }}"
# The audit events of a template that runs as it should, and of jinja2 when it looks up the line of an error.
_HARMLESS = {"builtins.id", "compile", "exec", "code.__new__", "object.__getattr__"}


def find_template(folder: Path) -> str | None:
    """The chat template in a folder's chat_template.jinja, or else in its tokenizer_config.json.

    Of several in one file it is the one named "default". Raises `UserError` for a file that is not readable.
    """
    path = folder / "chat_template.jinja"
    if path.exists():
        try:
            return path.read_text("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 at byte {error.start}: download it again") from error
    template = _read(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):
        named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = named[-1].get("template") if named else None
    return template if isinstance(template, str) else None


def special_tokens(folder: Path) -> dict[str, str]:
    """The texts of bos_token, eos_token, unk_token and pad_token, where the folder's tokenizer has them.

    A null in tokenizer_config.json means that there is none. Raises `UserError` for a file that is not readable.
    """
    tokens = _read(folder / "special_tokens_map.json") | _read(folder / "tokenizer_config.json")
    found = {name: tokens.get(name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    texts = {name: token.get("content") if isinstance(token, dict) else token for name, token in found.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def render(
    template: str, messages: Sequence[dict[str, str]], special_tokens: dict[str, str], timeout: float = 10.0
) -> str:
    """The text of a conversation, up to where the assistant's answer begins; `timeout` is in seconds.

    The template runs in a child process, in jinja2's sandbox, with limited time and memory and no access to files.
    On Windows, which has no `resource` module, only time is limited. Raises `UserError` if the template fails.
    """
    values = {"messages": list(messages), "add_generation_prompt": True, "tools": None, "documents": None}
    request = {"template": template, "values": values | special_tokens, "timeout": timeout}
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


def _failure(reason: str) -> UserError:
    printable = "".join(character if character.isprintable() else " " for character in reason)  # no terminal commands
    reason = " ".join(printable.split())[:300].rstrip(" .:")
    return UserError(f"the chat template {reason}; prompt the model without it: sample.py with --prompt, not --chat")


# What follows runs in the child process.


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
    """Limit memory and, in case the parent dies, processor time; then forbid all that a template does not need."""
    with contextlib.suppress(ImportError, OSError, ValueError):  # no such module, no such limit, or a lower limit
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (int(timeout) + 2,) * 2)
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))

    def forbid(event: str, arguments: Any) -> None:
        if event not in _HARMLESS and not event.startswith("cpython."):  # the interpreter's exit
            raise SecurityError(event)

    sys.addaudithook(forbid)  # a second barrier if the sandbox fails


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
    """The error and its line, as the continuation of "the chat template"."""
    message = str(error)[:1000]
    if isinstance(error, _Refusal):
        return message
    if isinstance(error, TemplateSyntaxError):
        return f"has a mistake in line {error.lineno}: {message}"
    lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == "<template>"]
    where = f" in line {lines[-1]}" if lines else ""
    if isinstance(error, SecurityError):
        return f"is not allowed{where} to do this: {message}"
    return f"fails{where}: {message if isinstance(error, TemplateError) else f'{type(error).__name__}: {message}'}"


class _Refusal(TemplateError):
    """The template or the limit on its length rejects a conversation."""


def _refuse(message: object) -> None:
    raise _Refusal(f"rejects these messages: {message}")


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """`json.dumps`; jinja2's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Dict:
    """The constructor `dict` and `dict.fromkeys`, without the class's other attributes."""

    fromkeys = staticmethod(dict.fromkeys)

    def __call__(self, *arguments: Any, **items: Any) -> dict[Any, Any]:
        return dict(*arguments, **items)


class _Namespace(Namespace):
    """jinja2's namespace, without names that are special to Python."""

    def __init__(self, /, *arguments: Any, **items: Any) -> None:
        super().__init__()
        for name, value in dict(*arguments, **items).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"the name {name} in a namespace")
        super().__setitem__(name, value)


class _Generation(Extension):
    """{% generation %}, which marks the model's own text for training: here it is only a scope."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(list(parser.parse_statements(("name:endgeneration",), drop_needle=True)), lineno=line)
