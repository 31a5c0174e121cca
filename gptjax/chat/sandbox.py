"""The child process of chat/template.py: chat templates in jinja2's sandbox, with no more rights than they need."""

import contextlib
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import partial
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace

_OPEN, _CLOSE = "\ud801", "\ud802"  # around what a template marks; halves of surrogate pairs, which no text has
_MEMORY = 1 << 30  # bytes that the child process may map
_LONGEST = 1 << 24  # characters of a rendered conversation, far more than any model reads
# Python and jinja2 import some modules on first use, which fails once opening files is forbidden: use them before.
_WARM_UP = r"{{ 'a\n' | wordwrap | indent | pprint }}{{ lipsum() }}{{ strftime_now('%B') }}{{ raise_exception('') }}"
# The audit events of a template that runs as it should, and of jinja2 when it looks up the line of an error.
_HARMLESS = {"builtins.id", "compile", "exec", "code.__new__", "object.__getattr__"}


def serve() -> None:
    """Answer the request on stdin with one JSON object on stdout."""
    request = json.load(sys.stdin)
    with contextlib.suppress(TemplateError):
        text(_WARM_UP, {})
    sys.stdout.write(_answer(request))


def serve_many() -> None:
    """Answer each line on stdin with a line on stdout, from a process that is forked for it."""
    with contextlib.suppress(TemplateError):
        text(_WARM_UP, {})
    for line in sys.stdin:
        read_end, write_end = os.pipe()
        if (child := os.fork()) == 0:
            with open(write_end, "w", encoding="ascii") as pipe:
                pipe.write(_answer(json.loads(line)))
            os._exit(0)
        os.close(write_end)
        with open(read_end, encoding="ascii") as pipe:
            answer = pipe.read()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(json.dumps({"error": f"stopped with exit code {code}"}) if code else answer, flush=True)


def _answer(request: dict[str, Any]) -> str:
    """The answer to a request, in JSON. From here on this process can do no more than a template needs."""
    _confine(request["timeout"])
    template, values = request["template"], request["values"]
    if "examples" not in request:
        answer = _result(lambda: {"text": text(template, values)})
    else:
        answer = _result(lambda: {"examples": _examples(template, values, request["examples"], request["ends"])})
    return json.dumps(answer)


def _result(make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make` returns, or the reason why it fails."""
    try:
        return make()
    except MemoryError:
        return {"error": f"needs more than {_MEMORY >> 30} GiB of memory"}
    except Exception as error:  # a template can raise anything
        return {"error": _reason(error)}


def _examples(template: str, values: Mapping[str, Any], conversations: Any, ends: Sequence[str]) -> list[Any]:
    """For each conversation the fields of `Rendered`, or an error."""
    marked = re.search(r"{%[-+]?\s*generation\b", template) is not None
    write = _compiled(template, _MarkedGeneration if marked else _Generation)

    def text(messages: Any, prompt: bool) -> str:
        return write(dict(values) | {"messages": messages, "add_generation_prompt": prompt})

    def example(messages: Any) -> dict[str, Any]:
        whole = text(messages, False)
        return _marked(whole) if marked else {"text": whole, "spans": _answers(text, messages, whole, tuple(ends))}

    return [_result(partial(example, messages)) for messages in conversations]


def _marked(text: str) -> dict[str, Any]:
    """A text without the marks of {% generation %}, and the places of what was between them."""
    plain, spans = "", []
    for piece in re.split(f"([{_OPEN}{_CLOSE}])", text):
        if piece == _OPEN:
            start = len(plain)
        elif piece == _CLOSE:
            spans.append((start, len(plain)))
        else:
            plain += piece
    return {"text": plain, "spans": spans}


def _answers(text: Callable[[Any, bool], str], messages: Any, whole: str, ends: tuple[str, ...]) -> list[Any]:
    """The place of each answer in the text of a whole conversation, by the texts of its first messages."""
    spans = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before, after = text(messages[:i], True), text(messages[: i + 1], False)
            if not (whole.startswith(after) and after.startswith(before)):
                raise _Refusal(
                    f"writes the first {i + 1} messages otherwise when more follow, so an answer has no known place: "
                    "mark it with {% generation %} and {% endgeneration %}"
                )
            end = len(before) + len(after[len(before) :].rstrip())
            spans.append((len(before), end if after[:end].endswith(ends) else len(after)))
    return spans


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


def text(template: str, values: Mapping[str, Any]) -> str:
    """The text that a template writes with these variables."""
    return _compiled(template, _Generation)(values)


def _compiled(template: str, generation: type[Extension]) -> Callable[[Mapping[str, Any]], str]:
    """The function from a template's variables to its text."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _refuse,
        "strftime_now": lambda pattern: datetime.now().strftime(pattern),
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    compiled = environment.from_string(template)

    def text(values: Mapping[str, Any]) -> str:
        text = compiled.render(values)
        if len(text) > _LONGEST:
            raise _Refusal(f"writes more than {_LONGEST:,} characters")
        return text

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


class _MarkedGeneration(_Generation):
    """{% generation %} with marks around what is in it."""

    def parse(self, parser: Parser) -> nodes.Node:
        scope: Any = super().parse(parser)
        first, last = [nodes.Output([nodes.TemplateData(mark)], lineno=scope.lineno) for mark in (_OPEN, _CLOSE)]
        scope.body = [first, *scope.body, last]
        return scope
