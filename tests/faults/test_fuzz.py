"""Every reader of a file takes any bytes: it reads them, or says in one line what is wrong."""

import gzip
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from gptjax.config import Config, ModelConfig
from gptjax.data.token_files import UINT16, write_tokens
from gptjax.export import main as export_main
from gptjax.hub.export import export

START = {"step": 0, "config": {}, "versions": {}, "code": {}, "variables": {}, "hardware": {"devices": 1}}
CHAT = """{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Good morrow"}]}
{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Well met"}]}
{"prompt": "Hi", "response": "Hail"}
"""
METRICS = "step,tokens,seconds,train_loss,val_loss\n0,0,0.1,,4.5\n10,640,1.5,3.25,\n"


@pytest.fixture(scope="module")
def whole_files(scramble, tmp_path_factory):
    """A folder with a good file of each kind."""
    folder = tmp_path_factory.mktemp("whole")
    model = ModelConfig(260, 16, n_layer=1, n_head=2, n_embd=8, mlp_width=16, bias=True, dtype="float32")
    export(folder, model, scramble(model), "float32")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate([*letters, "To", "be", "<|endoftext|>"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("T", "o"), ("b", "e")]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    export_main([str(folder), str(folder / "model.gguf")])
    settings = {"chat_template": "{{ messages }}", "eos_token": "<|endoftext|>", "tokenizer_class": "GPT2Tokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\nT o\nb e\n")
    for split in ("train", "val"):
        write_tokens(folder / f"{split}.bin", [np.arange(40)], UINT16, header=True)
    (folder / "data.json").write_text('{"dtype": "uint16", "parts": 1, "train_tokens": 40}')
    (folder / "environment.json").write_text(json.dumps({"starts": [START]}))
    (folder / "metrics.csv").write_text(METRICS)
    (folder / "text.jsonl").write_text('{"text": "To be"}\n{"text": "or not\\n", "id": 1}\n')
    (folder / "chat.jsonl").write_text(CHAT)
    for name in ("text.jsonl", "chat.jsonl"):
        (folder / f"{name}.gz").write_bytes(gzip.compress((folder / name).read_bytes()))
    (folder / "run.json").write_text(Config().to_json())
    (folder / "topology").write_text("v5e:4x4x2")
    return folder


@pytest.mark.slow
def test_any_bytes_are_read_or_refused_in_one_line(whole_files):
    if not importlib.util.find_spec("atheris"):
        pytest.skip("atheris is not installed; it has wheels for Linux alone")
    script = Path(__file__).with_name("fuzz.py")
    environment = os.environ | {"PYTHONPATH": str(script.parents[2]), "XDG_CACHE_HOME": str(whole_files)}
    # Without a time the same inputs at each call; GPTJAX_FUZZ_SECONDS=40, for each reader, when a reader changes.
    seconds = os.environ.get("GPTJAX_FUZZ_SECONDS")
    extent = [f"-max_total_time={seconds}"] if seconds else ["-runs=200", "-seed=1"]
    command = [sys.executable, script, whole_files, *extent]
    ended = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment)
    assert ended.returncode == 0, (ended.stdout + ended.stderr)[-5000:]
