"""The benchmarks go on where a rival, or one of their commands, does not finish."""

from functools import partial

import pytest

from benchmarks import gpu
from benchmarks.paired import Contender, in_turn


def test_a_rival_that_cannot_start_is_left_out(capsys, tmp_path):
    ours = partial(Contender, "works:our_batches", folder=str(tmp_path), batch_size=1, block_size=1)
    missing = partial(Contender, "paired:none")
    (tmp_path / "train.bin").write_bytes(bytes(100))
    found, rival = in_turn([ours, missing], rounds=2)
    assert len(found.values) == 2 and found.median > 0 and rival is None
    assert "left out: benchmarks.paired paired:none {} ended with exit code 1" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="paired:none"):
        in_turn([missing], rounds=2)


def test_the_figures_of_a_gpu_are_kept_as_they_come(monkeypatch, capfd, tmp_path):
    """Two results, of which one command then fails, and a command that takes longer than there is time for."""
    scripts = {
        "good": "print('note'); print('{\"work\": 1}')",
        "bad": "print('{\"work\": 2}', flush=True); raise SystemExit(3)",
        "slow": "import time; print('started', flush=True); time.sleep(100)",
    }
    for name, code in scripts.items():
        (tmp_path / f"{name}.py").write_text(f"import sys\n{code}\n")
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "COMMANDS", [f"{name}.py" for name in scripts])
    monkeypatch.setattr(gpu, "circumstances", lambda: {"machine": "NVIDIA L4"})
    assert gpu.run_all(minutes=0.05, rival_python="python") == 2
    assert (results / "l4.jsonl").read_text() == '{"work": 1}\n{"work": 2}\n'
    assert "ended with exit code 3" in (text := capfd.readouterr().err) and "did not suffice" in text
