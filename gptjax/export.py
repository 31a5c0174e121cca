"""Write a model for other programs: python -m gptjax.export out/shakespeare my-model[.gguf]

A folder is for transformers, and a .gguf file for llama.cpp. With --format stablehlo the folder has the model itself as
programs, for CPU, GPU and TPU, and an example that runs them with jax alone.
"""

import json
import secrets
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gptjax.cli import MODEL_HELP, parse_arguments, program
from gptjax.config import Section, argument, option
from gptjax.errors import UserError, one_line_errors
from gptjax.hub.export import export
from gptjax.hub.families import family_of
from gptjax.hub.gguf_export import GgufType, export_gguf
from gptjax.hub.gguf_tokenizer import tokenizer_fields
from gptjax.hub.weights import copy_side_files
from gptjax.inference.language_model import LanguageModel
from gptjax.inference.stablehlo import export_programs
from gptjax.tokenizer import END_OF_TEXT


@dataclass(frozen=True)
class Arguments(Section):
    """The options of `gptjax export`."""

    source: str = argument(MODEL_HELP)
    folder: str = argument("what to write: a folder that is new or empty, or a new FILE.gguf")
    format: Literal["auto", "huggingface", "gguf", "stablehlo"] = option(
        "auto", "weights for transformers, a file for llama.cpp, or programs for jax; auto: by the name, the first two"
    )
    checkpoint: Literal["best", "latest"] = option("best", "of a run: best by validation loss, or the latest")
    dtype: Literal["float32", "bfloat16", "float16"] = option("float32", "dtype of the weights in a folder")
    type: GgufType = option(
        "f32", "type of the matrices in a .gguf file; q4_0: with embedding and head in q8_0, rows of odd lengths in f16"
    )

    def validate(self) -> None:
        to_file = self.folder.endswith(".gguf")
        fits = self.format == "auto" or to_file == (self.format == "gguf")
        self.require(fits, "format", "does not go with the name to write: a .gguf file is gguf, and all else a folder")
        self.require(
            self.format != "stablehlo" or self.dtype == "float32", "dtype", "is float32 with --format stablehlo"
        )
        self.require(to_file or self.type == "f32", "type", "is for a .gguf file; pass --dtype for a folder")
        self.require(not to_file or self.dtype == "float32", "dtype", "is for a folder; pass --type for a .gguf file")


def main(argv: Sequence[str]) -> None:
    """Write a model as a Hugging Face folder, a GGUF file or programs for jax."""
    arguments = parse_arguments(program("export"), __doc__, argv, Arguments())
    folder = Path(arguments.folder).absolute()
    to_file = folder.suffix == ".gguf"
    if folder.exists() and (to_file or not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already: name a folder that is not")
    model = LanguageModel.load(arguments.source, arguments.checkpoint, "float32")
    if to_file:
        _write_gguf(folder, model, arguments.type)
        return
    programs = arguments.format == "stablehlo"
    family = "programs of prefill and decode" if programs else family_of(model.config)
    temporary = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}")
    temporary.mkdir(parents=True)
    try:
        _write_side_files(temporary, model)
        if programs:
            export_programs(temporary, model.config, model.params)
        else:
            export(temporary, model.config, model.params, arguments.dtype)
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"wrote {folder}: {family}, {model.n_params:,} parameters in {arguments.dtype}")


def _write_gguf(path: Path, model: LanguageModel, kind: GgufType) -> None:
    tokens = (model.tokenizer, model.config.vocab_size, model.special_tokens, model.stop_tokens)
    template = {"tokenizer.chat_template": model.template} if model.template else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    export_gguf(path, model.config, model.params, kind, tokenizer_fields(*tokens) | template)
    print(f"wrote {path}: {model.n_params:,} parameters in {kind}, {path.stat().st_size / 2**20:.1f} MiB")


def _write_side_files(folder: Path, model: LanguageModel) -> None:
    """The tokenizer, its settings, the chat template and the stop tokens: the model's own files where it has them."""
    model.tokenizer.save(folder / "tokenizer.json")
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": model.config.block_size}
    end = {} if model.tokenizer.end_of_text is None else {"eos_token": END_OF_TEXT}
    defaults: dict[str, dict[str, Any]] = {
        "tokenizer_config.json": tokenizer | end | {"clean_up_tokenization_spaces": False},
        "generation_config.json": {"eos_token_id": sorted(model.stop_tokens)} if model.stop_tokens else {},
    }
    copy_side_files(model.folder, folder)
    for name, values in defaults.items():
        if not (folder / name).exists():
            (folder / name).write_text(json.dumps(values, indent=2) + "\n")


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
