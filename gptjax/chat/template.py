"""Hugging Face chat templates, rendered as `transformers` does, in a child process that confines hostile ones.

A conversation is a list of {"role": ..., "content": ...}.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from gptjax.errors import UserError
from gptjax.files import read_json
from gptjax.vocabulary import tokenizer_settings

# ChatML, for models without a template of their own, and its special tokens.
DEFAULT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
DEFAULT_TOKENS = ("<|im_start|>", "<|im_end|>")
# Isolated (-I) from modules in the current folder, with the parent's module search path.
_CHILD = "import sys; sys.path[:] = sys.argv[1:]; from gptjax.chat import sandbox; sandbox.serve()"


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
    template = read_json(folder / "tokenizer_config.json", missing_ok=True).get("chat_template")
    if isinstance(template, list):
        named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = named[-1].get("template") if named else None
    return template if isinstance(template, str) else None


def special_tokens(folder: Path) -> dict[str, str]:
    """The texts of bos_token, eos_token, unk_token and pad_token, where the folder's tokenizer has them.

    A null in tokenizer_config.json means that there is none. Raises `UserError` for a file that is not readable.
    """
    settings = tokenizer_settings(folder)
    found = {name: settings.get(name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    texts = {name: token.get("content") if isinstance(token, dict) else token for name, token in found.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


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
                    _command("serve_many"),
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
    return [sys.executable, "-I", "-c", _CHILD.replace("serve", function), *paths]


def _ask(request: dict[str, Any], fix: str) -> dict[str, Any]:
    """The answer of a child of its own to a request. Raises `UserError` if it gives none in time."""
    data, timeout = json.dumps(request).encode(), request["timeout"]
    try:
        child = subprocess.run(_command("serve"), input=data, capture_output=True, timeout=timeout)
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
