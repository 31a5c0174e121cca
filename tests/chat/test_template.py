"""Chat templates: the text that `transformers` renders, and one line of error for whatever a hostile template tries."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers

from gptjax.chat.template import Renderer, find_template, render, special_tokens
from gptjax.errors import UserError

ROOT = Path(__file__).parents[2]
VARIABLES = {"bos_token": "<s>", "eos_token": "</s>"}

CHATML = """\
{%- if messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\\nYou are Bard, made of plays.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role in ('user', 'system') or (message.role == 'assistant' and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- else %}
        {{- raise_exception('unknown role ' ~ message.role) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

HEADERS = """\
{% set turns = messages %}
{% for message in turns %}
    {% set header = '<|head|>' + message['role'] + '<|/head|>\n\n' %}
    {% set text = header + message['content'] | trim + '<|eot|>' %}
    {% if loop.index0 == 0 %}{% set text = bos_token + text %}{% endif %}
{{ text }}
{% endfor %}
{% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\n\n' }}{% endif %}"""

BRACKETS = """\
{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set about = messages[0]['content'] %}\
{% else %}{% set rest = messages %}{% set about = false %}{% endif %}
{% for message in rest %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Roles must alternate: user/assistant/...') }}
    {% endif %}
    {% set text = message['content'] %}
    {% if loop.first and about is not false %}{% set text = '<<SYS>>\n' + about + '\n<</SYS>>\n\n' + text %}{% endif %}
    {% if message['role'] == 'user' %}
        {{- bos_token + '[INST] ' + text.strip() + ' [/INST]' }}
    {% elif message['role'] == 'assistant' %}
        {{- ' ' + text.strip() + ' ' + eos_token }}
    {% endif %}
{% endfor %}"""

FEATURES = [
    "{{ messages | tojson }} {{ messages[0] | tojson(indent=2) }} {{ {'b': '<é>', 'a': 1} | tojson(true) }}",
    "{{ {'b': 'é', 'a': [1]} | tojson(false, none, (',', ':'), true) }}",
    "{% for i in range(9) %}{% if i % 2 %}{% continue %}{% endif %}{{ i }}{% if i > 5 %}{% break %}{% endif %}"
    "{% endfor %}",
    "{{ strftime_now('%d %b %Y, %A') }}",
    "{% set x = 1 %}{% for m in messages %}\n  {% generation %}\n {{- loop.index }} {{ m.content }}\n"
    "{% set x = x + 1 %}{{ x }}{%- endgeneration %}\n{{ x }}{% endfor %}",
    "{{ tools is none }} {{ documents is none }} {{ tools }} {{ add_generation_prompt }}",
    "{{ pad_token }}|{{ messages[0].thought }}|{{ pad_token is defined }}|{{ messages[9] }}",
    "{% set ns = namespace(n=0, self='s') %}{% for m in messages %}{% set ns.n = ns.n + m.content | length %}"
    "{% endfor %}{{ ns.n }} {{ ns.self }} {{ dict(a=1, **{'b': 2}) }} {{ dict.fromkeys('ab', 0) }} "
    "{{ dict.update is defined }}",
    "{{ messages | map(attribute='content') | join('/') | indent | wordwrap(3) | pprint }}"
    "{{ '<&>' | e }}{{ lipsum() | length > 9 }}{{ messages | selectattr('role', 'equalto', 'user') | list | count }}",
    "\n  {% if true %}  \n\n\ta {#- b -#} c\n  {% endif %}\n{{ bos_token }}\n \n",
    "{% macro turn(m, end='.') -%} {{ m.role }}: {{ m.content }}{{ end }} {%- endmacro %}\n"
    "{% for m in messages %}{{ turn(m) }}{{ turn(m, end=eos_token) }}{% endfor %}",
]

TALK = [
    ("user", "Who goes\nthere? "),
    ("assistant", "\n A  friend."),
    ("user", "\"Nay\" {{ 'x' }} {% if %} </s> 中文 é😀"),
]


def conversations():
    for turns, system in ((1, ""), (3, ""), (3, " Speak {verse}; it's \\n \u2028 night.\n")):
        yield [{"role": role, "content": text} for role, text in [("system", system)][: bool(system)] + TALK[:turns]]


@pytest.fixture(scope="module")
def reference():
    """`apply_chat_template` of a tokenizer that knows one word."""
    transformers = pytest.importorskip("transformers")
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({"word": 0}, "word"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=library, **VARIABLES)

    return lambda template, messages: tokenizer.apply_chat_template(
        messages, chat_template=template, add_generation_prompt=True, tokenize=False
    )


def failure(template, messages=({"role": "user", "content": "Hi"},), timeout=60.0):
    """The one line that the user reads, which says the way out."""
    with pytest.raises(UserError) as caught:
        render(template, list(messages), VARIABLES, timeout=timeout)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 500 and "Traceback" not in message
    assert message.startswith("the chat template ") and message.endswith("--prompt, not --chat")
    return message


def test_conversations_are_those_of_transformers(reference):
    for template, messages in itertools.product((CHATML, HEADERS, BRACKETS), conversations()):
        assert render(template, messages, VARIABLES) == reference(template, messages)


def test_what_templates_use_is_that_of_transformers(reference):
    messages, template = list(conversations())[-1], "\n#\n".join(FEATURES)
    assert render(template, messages, VARIABLES).split("\n#\n") == reference(template, messages).split("\n#\n")


def test_a_lone_surrogate_comes_back():
    assert render("{{ messages[0].content }}", [{"role": "user", "content": "\ud800"}], {}) == "\ud800"


def test_what_transformers_rejects_is_an_error_with_the_reason(reference):
    again = [{"role": "user", "content": "Hi"}] * 2
    for template, messages in ((BRACKETS, again), (CHATML, [{"role": "ghost", "content": "Hi"}])):
        with pytest.raises(Exception) as caught:  # jinja2's
            reference(template, messages)
        assert str(caught.value).rstrip(".") in failure(template, messages)


@pytest.mark.parametrize(
    "template, part",
    [
        ("one\n{% two %}", "has a mistake in line 2: Encountered unknown tag 'two'"),
        ("one\n\n{{ two.three }}", "fails in line 3: 'two' is undefined"),
        ("{{ 1 + 'a' }}", "fails in line 1: TypeError: unsupported operand"),
        ("{{ raise_exception('a\\n\\x1b[31mred\\u202e' ~ 'b' * 9999) }}", "rejects these messages: a [31mred bbb"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ " + "(" * 9999 + ")" * 9999 + " }}", "RecursionError"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ 'a' * 16777217 }}", "writes more than 16,777,216 characters"),
    ],
)
def test_a_template_with_a_mistake_says_where(template, part):
    assert part in failure(template)


ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
GROWING = "{% set n = namespace(x=[1]) %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}"


@pytest.mark.parametrize("template", [ENDLESS, "{{ 9 ** (9 ** 9) }}"])
def test_an_endless_template_is_stopped(template):
    assert "took longer than 0.5 s" in failure(template, timeout=0.5)


@pytest.mark.parametrize("template", ["{{ 'a' * 10 ** 10 }}", GROWING])
def test_a_template_that_takes_memory_is_stopped(template):
    pytest.importorskip("resource")
    assert "needs more than 1 GiB of memory" in failure(template)


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.popen('touch X').read() }}",
    "{{ raise_exception.__globals__['__builtins__'].open('X', 'w') }}",
    "{{ ('{0.__class__}' | attr('format'))(1).x }}{{ '{0.__class__.__mro__}'.format(1).x }}",
    "{% set n = namespace(__html__=1) %}",
    "{% set n = namespace() %}{% set n.__call__ = 1 %}",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_the_sandbox_holds(template, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "is not allowed in line 1 to do this" in failure(template)
    assert not os.listdir(tmp_path)


def serve(template, folder, before="pass", timeout=10.0):
    """The child itself, without its parent."""
    request = {"template": template, "values": {}, "timeout": timeout}
    return subprocess.run(
        [sys.executable, "-c", f"from gptjax.chat import sandbox; {before}; sandbox.serve()"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=60.0,
        start_new_session=True,  # or os.kill(0, 9) ends the tests
    )


WAYS = ["__import__('os').popen('touch X')", "__import__('os').kill(0, 9)", "__import__('ctypes')", "open('kept')"]


@pytest.mark.parametrize("way", WAYS)
def test_a_hole_in_the_sandbox_leads_to_a_second_wall(way, tmp_path):
    (tmp_path / "kept").touch()
    hole = "import jinja2; sandbox.ImmutableSandboxedEnvironment = jinja2.Environment"
    child = serve("{{ cycler.__init__.__globals__.__builtins__." + way + " }}", tmp_path, hole)
    error = json.loads(child.stdout)["error"]
    assert re.match(r"is not allowed in line 1 to do this: (open|import|os\.|subprocess)", error)
    assert os.listdir(tmp_path) == ["kept"]


def test_a_child_without_a_parent_ends(tmp_path):
    pytest.importorskip("resource")
    assert serve("{{ 9 ** (9 ** 9) }}", tmp_path, timeout=-1.0).returncode < 0  # one second of processor time


def test_no_module_of_the_users_folder_runs(tmp_path, monkeypatch):
    for name in ("json", "jinja2", "gptjax", "encodings", "sitecustomize"):
        (tmp_path / f"{name}.py").write_text("open('X', 'w')")
    monkeypatch.chdir(tmp_path)
    elsewhere = [path for path in sys.path if path and Path(path).resolve() != ROOT]  # as in an editable install
    monkeypatch.setattr(sys, "path", ["", *elsewhere])
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert render("{{ bos_token }}", [], VARIABLES) == "<s>"
    assert not (tmp_path / "X").exists()


def test_a_child_that_dies_is_an_error(monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    assert "stopped with exit code 1" in failure("")


@pytest.fixture(scope="module")
def renderer():
    pytest.importorskip("resource")
    renderer = Renderer()
    yield renderer
    renderer.close()


def test_a_renderer_renders_as_render_does(renderer):
    messages = [{"role": "user", "content": "Hi\n\u00e9\ud800"}]
    for template in ("{{ bos_token }}{{ messages[0].content }}", "{{ messages | tojson }}\n"):
        assert renderer.render(template, messages, VARIABLES) == render(template, messages, VARIABLES)


def test_what_a_template_does_to_a_renderer_ends_with_it(renderer, tmp_path, monkeypatch):
    """It is stopped, or has an error, and the next one is rendered; a child that dies is replaced."""
    monkeypatch.chdir(tmp_path)
    for template, words in (
        (ENDLESS, "took longer than 1 s"),
        (GROWING, "needs more than 1 GiB"),
        (ESCAPES[1], "is not allowed in line 1"),
        ("{{ raise_exception('no') }}", "rejects these messages: no"),
        ("{% if %}", "has a mistake in line 1"),
    ):
        with pytest.raises(UserError, match=words):
            renderer.render(template, [], VARIABLES, timeout=1.0 if template == ENDLESS else 60.0)
        assert renderer.render("{{ bos_token }}", [], VARIABLES, timeout=60.0) == "<s>"
    renderer._child.kill()
    renderer._child.wait()
    assert renderer.render("{{ bos_token }}", [], VARIABLES, timeout=60.0) == "<s>"
    assert not os.listdir(tmp_path)


def test_the_templates_file_wins_over_the_config(tmp_path):
    assert find_template(tmp_path) is None
    several = [{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}]
    for value, template in ((None, None), ("中", "中"), (several, "b"), (several[:1], None), (3, None)):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))
        assert find_template(tmp_path) == template
    (tmp_path / "chat_template.jinja").write_text("é\n", encoding="utf-8")
    assert find_template(tmp_path) == "é\n"


def test_special_tokens_come_from_either_file(tmp_path):
    assert special_tokens(tmp_path) == {}
    of_map = {"bos_token": "map", "eos_token": "map", "unk_token": "map", "pad_token": {"content": "<pad>"}}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(of_map | {"additional_special_tokens": ["<x>"]}))
    config = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>", "unk_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert special_tokens(tmp_path) == {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[]"])
def test_a_broken_file_is_named(content, tmp_path):
    (tmp_path / "tokenizer_config.json").write_bytes(content)
    for read in (find_template, special_tokens):
        with pytest.raises(UserError, match="tokenizer_config.json"):
            read(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(UserError, match="chat_template.jinja is not UTF-8"):
        find_template(tmp_path)
