"""The examples of docs/serving.md run: each curl command, and the one in Python."""

import contextlib
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
CURLS = [
    command
    for block in re.findall(r"^```sh\n(.*?)^```", PAGE, re.M | re.S)
    for command in block.replace("\\\n", " ").splitlines()
    if command.startswith("curl ")
]


@pytest.fixture
def here(running):
    """A command with the address and the models of the test's server."""
    names = {"http://127.0.0.1:8000": running.url, "smollm2": "instruct", "shakespeare": "base"}

    def replace(text):
        for name, other in names.items():
            text = text.replace(name, other)
        return text

    return replace


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
@pytest.mark.parametrize("command", CURLS, ids=range(len(CURLS)))
def test_each_curl_command_runs(here, command):
    done = subprocess.run(["bash", "-c", here(command) + " -sSf"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    if "/metrics" in command:
        assert "gptjax_slots_in_use" in done.stdout
    elif '"stream": true' in command:
        events = [line.removeprefix("data: ") for line in done.stdout.split("\n\n") if line]
        assert events[-1] == "[DONE]" and json.loads(events[0])["choices"][0]["logprobs"]["tokens"]
    else:
        assert json.loads(done.stdout)["choices"][0]["finish_reason"] == "length"


def test_the_example_in_python_runs(here):
    [example] = re.findall(r"^```py\n(.*?)^```", PAGE, re.M | re.S)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(here(example), values := {})
    values["stream"].close()
    values["client"].close()
    assert len(out.getvalue()) > 10


def test_there_are_examples():
    assert len(CURLS) == 4
