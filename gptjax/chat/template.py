"""Hugging Face chat templates, rendered as `transformers` does, in a child process that confines hostile ones.

A conversation is a list of {"role": ..., "content": ...}.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace

from gptjax.errors import UserError
from gptjax.files import read_json

# ChatML, for models without a template of their own, and its special tokens.
DEFAULT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
DEFAULT_TOKENS = ("<|im_start|>", "<|im_end|>")
_OPEN, _CLOSE = "\ud801", "\ud802"  # around what a template marks; halves of surrogate pairs, which no text has
_MEMORY = 1 << 30  # bytes that the child process may map
_LONGEST = 1 << 24  # characters of a rendered conversation, far more than any model reads
# Isolated (-I) from modules in the current folder, with the parent's module search path.
_CHILD = "import sys; sys.path[:] = sys.argv[1:]; from gptjax.chat.template import _serve; _serve()"
# Python and jinja2 import some modules on first use, which fails once opening files is forbidden: use them before.
_WARM_UP = r"{{ 'a\n' | wordwrap | indent | pprint }}{{ lipsum() }}{{ strftime_now('%B') }}{{ raise_exception('') }}"
# The audit events of a template that runs as it should, and of jinja2 when it looks up the line of an error.
_HARMLESS = {"builtins.id", "compile", "exec", "code.__new__", "object.__getattr__"}


class Rendered(NamedTuple):
    """The text of a conversation, and from where to where in it the model's own text is."""

    text: str
    spans: Sequence[tuple[int, int]]


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
    request = _prompt_request(template, messages, special_tokens, timeout)
    return _text_in(_ask(request, _INSTEAD))


class Renderer:
    """Renders conversations as `render` does, for programs that render many: a child that has started forks for each.

    Each conversation still has a confined process of its own. Its methods may be called from any thread.
    """

    def __init__(self) -> None:
        self._lock, self._child = threading.Lock(), cast("subprocess.Popen[bytes] | None", None)

    def render(
        self, template: str, messages: Sequence[dict[str, str]], special_tokens: dict[str, str], timeout: float = 10.0
    ) -> str:
        """`render`. Where a system has no fork, such as Windows, it is called."""
        if not hasattr(os, "fork"):
            return render(template, messages, special_tokens, timeout)
        request = json.dumps(_prompt_request(template, messages, special_tokens, timeout)).encode()
        with self._lock:
            if self._child is None or self._child.poll() is not None:
                self._stop()
                self._child = subprocess.Popen(
                    _command("_serve_many"),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                )
            reply = _ask_line(self._child, request + b"\n", timeout)
            if not reply.endswith(b"\n"):
                self._stop()
                raise _failure(f"took longer than {timeout:g} s", _INSTEAD)
        return _text_in(json.loads(reply))

    def close(self) -> None:
        """End the child."""
        with self._lock:
            self._stop()

    def _stop(self) -> None:
        if self._child is not None:
            if self._child.poll() is None:
                os.killpg(self._child.pid, signal.SIGKILL)
            self._child.communicate()
            self._child = None


def render_examples(
    template: str,
    conversations: Sequence[Sequence[dict[str, str]]],
    special_tokens: dict[str, str],
    ends: Collection[str] = (),
    timeout: float = 60.0,
) -> list[Rendered | UserError]:
    """Whole conversations as texts, with the place of the assistant's text in each, or why the template fails.

    These places are what {% generation %} marks in the template. In a template without it an answer is what its message
    adds to the text of the messages before it with the generation prompt, without the white space that follows it if it
    ends in one of `ends`, the special tokens. That fails where a template writes a turn otherwise when others follow.
    """
    values = _NOTHING_ELSE | special_tokens
    request = {"template": template, "values": values, "ends": list(ends), "timeout": timeout}
    answers = _ask(request | {"examples": [list(messages) for messages in conversations]}, _CORRECT)
    if "error" in answers:
        raise _failure(answers["error"], _CORRECT)
    return [
        _failure(each["error"], _CORRECT)
        if "error" in each
        else Rendered(each["text"], [(start, end) for start, end in each["spans"]])
        for each in answers["examples"]
    ]


_NOTHING_ELSE: dict[str, Any] = {"tools": None, "documents": None}
_INSTEAD = "; prompt the model without it: sample.py with --prompt, not --chat"
_CORRECT = "; correct the template or the messages"


def _prompt_request(
    template: str, messages: Sequence[dict[str, str]], special_tokens: dict[str, str], timeout: float
) -> dict[str, Any]:
    values = _NOTHING_ELSE | special_tokens | {"messages": list(messages), "add_generation_prompt": True}
    return {"template": template, "values": values, "timeout": timeout}


def _text_in(answer: dict[str, Any]) -> str:
    if "error" in answer:
        raise _failure(answer["error"], _INSTEAD)
    return answer["text"]


def _command(function: str) -> list[str]:
    paths = [path for path in sys.path if path] + [str(Path(__file__).parents[2])]
    return [sys.executable, "-I", "-c", _CHILD.replace("_serve", function), *paths]


def _ask(request: dict[str, Any], fix: str) -> dict[str, Any]:
    """The answer of a child of its own to a request. Raises `UserError` if it gives none in time."""
    data, timeout = json.dumps(request).encode(), request["timeout"]
    try:
        child = subprocess.run(_command("_serve"), input=data, capture_output=True, timeout=timeout)
    except subprocess.TimeoutExpired as error:
        raise _failure(f"took longer than {timeout:g} s", fix) from error
    if child.returncode:
        last_line = child.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise _failure(f"stopped with exit code {child.returncode}: {last_line}", fix)
    return json.loads(child.stdout)


def _ask_line(child: "subprocess.Popen[bytes]", request: bytes, timeout: float) -> bytes:
    """The line that the child answers a line with, without an end if it does not answer in time."""
    assert child.stdin is not None and child.stdout is not None
    clock = threading.Timer(timeout, os.killpg, (child.pid, signal.SIGKILL))
    clock.start()
    try:
        child.stdin.write(request)
        child.stdin.flush()
        return child.stdout.readline()
    except BrokenPipeError:
        return b""
    finally:
        clock.cancel()


def _failure(reason: str, fix: str) -> UserError:
    printable = "".join(character if character.isprintable() else " " for character in reason)  # no terminal commands
    return UserError("the chat template " + " ".join(printable.split())[:300].rstrip(" .:") + fix)


# What follows runs in the child process.


def _serve() -> None:
    """Answer the request on stdin with one JSON object on stdout."""
    request = json.load(sys.stdin)
    with contextlib.suppress(TemplateError):
        _text(_WARM_UP, {})
    sys.stdout.write(_answer(request))


def _serve_many() -> None:
    """Answer each line on stdin with a line on stdout, from a process that is forked for it."""
    with contextlib.suppress(TemplateError):
        _text(_WARM_UP, {})
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
        answer = _result(lambda: {"text": _text(template, values)})
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


def _text(template: str, values: Mapping[str, Any]) -> str:
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
