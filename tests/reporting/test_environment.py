"""environment.json: what it says about a start of a run, and that it never harms one."""

import hashlib
import json
import subprocess
from pathlib import Path
from unittest.mock import ANY

import jax
import pytest

import gptjax
from gptjax.config import Config
from gptjax.errors import UserError
from gptjax.reporting import environment
from gptjax.reporting.environment import FILE, read, recorded


def record(folder, step, **changes):
    with recorded(folder, step, Config(**changes), "fingerprint"):
        pass


def test_a_start_is_recorded_with_all_that_its_numbers_depend_on_and_no_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("NVIDIA_API_KEY", "secret")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    record(tmp_path, 0)
    [start] = read(tmp_path)
    assert start["variables"]["OMP_NUM_THREADS"] == "2" and "secret" not in (tmp_path / FILE).read_text()
    assert start["versions"]["jax"] == jax.__version__ and start["hardware"]["devices"] == len(jax.devices())
    assert Config.from_dict(start["config"], tmp_path) == Config() and start["data"] == "fingerprint"
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    package = Path(gptjax.__file__).parent
    sources = {path.relative_to(package).as_posix(): path for path in package.rglob("*.py")}
    text = b"".join(name.encode() + b"\n" + sources[name].read_bytes() for name in sorted(sources))
    assert start["code"] == {"commit": head or None, "diff": ANY, "sha256": hashlib.sha256(text).hexdigest()}


def test_a_start_replaces_the_entries_of_the_steps_that_it_repeats(tmp_path):
    for step in (0, 10, 20, 10):
        record(tmp_path, step, init_from=f"of {step}")
    assert [(start["step"], start["config"]["init_from"]) for start in read(tmp_path)] == [(0, "of 0"), (10, "of 10")]


@pytest.mark.parametrize("damage", ["", "{}", '{"starts": 3}', '{"starts": [{"step": "x"}]}'])
def test_a_damaged_record_is_one_line_to_readers_and_begun_anew_by_the_run(tmp_path, damage):
    (tmp_path / FILE).write_text(damage)
    with pytest.raises(UserError, match=FILE):
        read(tmp_path)
    record(tmp_path, 5)
    assert [start["step"] for start in read(tmp_path)] == [5]


def test_a_run_goes_on_without_git_and_without_its_record(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    record(tmp_path, 0)
    assert json.loads((tmp_path / FILE).read_text())["starts"][0]["code"]["commit"] is None
    monkeypatch.setattr(environment, "surroundings", lambda: 1 / 0)
    record(tmp_path, 1)
    assert "environment.json was not written" in capsys.readouterr().out
