"""A run folder that version 0.1 wrote still resumes, samples and exports as it did then.

tests/saved/run_0.1.tar.gz holds the folder of a run at step 4, `run`, and the text that it was trained on.
tests/saved/expected.npz holds the parameters and the optimizer state of step 8, by path, of the same run that version
0.1 trained to step 8 without a stop.
"""

import hashlib
import tarfile
from pathlib import Path

import numpy as np
import pytest

import gptjax.sample
import gptjax.train
from gptjax import export
from gptjax.sharding import by_path

SAVED = Path(__file__).parent / "saved"


def script(name):
    return {"train.py": gptjax.train.main, "sample.py": gptjax.sample.main}[name]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    with tarfile.open(SAVED / "run_0.1.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_it_resumes_as_if_it_had_never_stopped(folder, state_of):
    """On the machine that wrote expected.npz, with XLA's usual optimization, the arrays are bit-equal.

    Another machine, or XLA without optimization as in these tests, may sum in another order. Float32's rounding (6e-8)
    stays below the tolerances over four steps. A wrong batch, dropout mask or optimizer state shows in the first digit.
    """
    options = ["--cpu_devices", "8", "--num_processes", "1"]  # JAX runs here already, with conftest.py's devices
    assert script("train.py")(["--resume", "--out_dir", "run", "--train.max_steps", "8", *options]) == 0
    step, trees = state_of(folder / "run")
    actual = by_path(trees)
    with np.load(SAVED / "expected.npz") as expected:
        assert step == 8 and set(actual) == set(expected)
        for name, leaf in actual.items():
            np.testing.assert_allclose(leaf, expected[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_it_gives_the_same_greedy_text(capsys):
    options = ["--run", "run", "--checkpoint", "latest", "--prompt", "First"]
    script("sample.py")([*options, "--temperature", "0", "--max_new_tokens", "24"])
    assert capsys.readouterr().out == "Firsttttooooooooooooooooooooo\n"


def test_it_exports_the_same_file(folder):
    export.main(["run", "exported", "--checkpoint", "latest"])
    digest = hashlib.sha256((folder / "exported" / "model.safetensors").read_bytes()).hexdigest()
    assert digest == "715f16f6b7094d729bc6363a1150579585e2c2dab18b891fa1119b994901377e"
