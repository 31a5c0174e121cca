"""The notebook runs from top to bottom, at a small size."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SMALL = {
    "OPTIONS = []": "OPTIONS = '''--data.source text.txt --data.vocab_size 300 --model.n_layer 1 --model.n_head 2 "
    "--model.n_embd 32 --model.mlp_width 64 --model.block_size 32 --train.batch_size 8 --train.max_steps 4 "
    "--train.eval_interval 2 --train.eval_batches 1'''.split()",
    'MODELS = [str(RUN), "smollm2"]': "MODELS = [str(RUN)]",
}


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(ROOT / "notebooks" / "quickstart.ipynb", 4)
    for cell in notebook.cells:
        assert not cell.get("outputs")
    for text, other in SMALL.items():
        [cell] = [cell for cell in notebook.cells if text in cell.source]
        cell.source = cell.source.replace(text, other)
    (tmp_path / "text.txt").write_text("First Citizen:\nBefore we proceed any further, hear me speak.\n\n" * 60)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert any("image/png" in output.get("data", {}) for output in outputs), "the picture of the losses"
    assert any("Models side by side" in str(output.get("data", {}).get("text/html")) for output in outputs)
    assert "everything agrees bit for bit" in str(outputs)
    assert (tmp_path / "my-model.gguf").stat().st_size > 0
