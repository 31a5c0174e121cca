"""The exported programs draw the tokens that sample.py draws, in a process that has jax and not gptjax."""

import os
import subprocess
import sys

import jax
import jax.export
import numpy as np
import pytest
import safetensors.numpy

from gptjax import export as command
from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.hub.export import export
from gptjax.inference.generate import generate
from gptjax.inference.language_model import LanguageModel
from gptjax.inference.sampling import Sampling
from gptjax.tokenizer import Tokenizer

PROMPT = [5, 17, 3, 3, 40, 21]
MODELS = {
    "gpt2": ModelConfig(vocab_size=61, block_size=48, n_layer=2, n_head=2, n_embd=16, bias=True, dtype="float32"),
    "llama": ModelConfig(
        vocab_size=1030,
        block_size=64,
        n_layer=2,
        n_head=4,
        n_kv_head=2,
        n_embd=16,
        norm="rmsnorm",
        position="rope",
        activation="swiglu",
        dtype="float32",
    ),
}


@pytest.fixture(scope="module", params=MODELS)
def written(request, tmp_path_factory, scramble):
    """The model, and the folder that the command writes."""
    folder = tmp_path_factory.mktemp("export")
    config = MODELS[request.param]
    (folder / "model").mkdir()
    export(folder / "model", config, scramble(config), "float32")
    Tokenizer.from_characters({chr(97 + i): i for i in range(61)}).save(folder / "model" / "tokenizer.json")
    command.main([str(folder / "model"), str(folder / "programs"), "--format", "stablehlo"])
    return LanguageModel.load(str(folder / "model")), folder / "programs"


def test_the_example_draws_equal_tokens_with_jax_alone(written):
    model, folder = written
    chunks = generate(model.config, model.params, [np.array(PROMPT, np.int32)], 32, Sampling(temperature=0.0), [0])
    expected = np.concatenate([chunk.tokens_BC[0] for chunk in chunks]).tolist()
    # -S and a path with site-packages alone: gptjax, which may be installed in place, cannot be imported.
    code = "import sys, runpy; sys.argv = sys.argv[1:]; sys.modules['gptjax'] = None; runpy.run_path(sys.argv[0])"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder / "run.py"), *map(str, PROMPT)],
        env=environment | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [int(word) for word in done.stdout.split()] == expected


def test_the_programs_are_for_all_platforms_and_hold_no_weights(written):
    model, folder = written
    weights = safetensors.numpy.load_file(folder / "weights.safetensors")
    assert sum(leaf.size for leaf in weights.values()) == sum(leaf.size for leaf in jax.tree.leaves(model.params))
    for name in ("prefill", "decode"):
        program = jax.export.deserialize(bytearray((folder / f"{name}.jax_export").read_bytes()))
        assert program.platforms == ("cpu", "cuda", "tpu") and "stablehlo" in program.mlir_module()
        assert len(program.in_avals) - len(weights) == (1 if name == "prefill" else 4)
    assert (folder / "tokenizer.json").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("a.gguf --format stablehlo", "format='stablehlo' does not go with the name"),
        ("a --format gguf", "format='gguf' does not go with the name"),
        ("a --format stablehlo --dtype bfloat16", "dtype='bfloat16' is float32 with"),
    ],
)
def test_options_that_do_not_go_together_are_refused(arguments, words):
    with pytest.raises(UserError, match=words.replace("(", r"\(")):
        command.main(["nowhere", *arguments.split()])
