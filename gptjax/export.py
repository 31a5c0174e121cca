"""Write a Hugging Face folder that transformers loads: python -m gptjax.export out/shakespeare my-model"""

import json
import secrets
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gptjax.cli import parse_arguments
from gptjax.config import Section, argument, option
from gptjax.errors import UserError, one_line_errors
from gptjax.hub.export import export
from gptjax.hub.families import family_of
from gptjax.hub.weights import copy_side_files
from gptjax.inference.language_model import MODEL_HELP, LanguageModel
from gptjax.tokenizer import END_OF_TEXT


@dataclass(frozen=True)
class Arguments(Section):
    source: str = argument(MODEL_HELP)
    folder: str = argument("the folder to write: a new or an empty one")
    checkpoint: Literal["best", "latest"] = option("best", "of a run: best by validation loss, or the latest")
    dtype: Literal["float32", "bfloat16", "float16"] = option("float32", "dtype of the written weights")


def main(argv: Sequence[str]) -> None:
    arguments = parse_arguments("python -m gptjax.export", __doc__, argv, Arguments())
    folder = Path(arguments.folder).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already: name a folder that is not")
    model = LanguageModel.load(arguments.source, arguments.checkpoint, "float32")
    family = family_of(model.config)
    temporary = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}")
    temporary.mkdir(parents=True)
    try:
        _write_side_files(temporary, model)
        export(temporary, model.config, model.params, arguments.dtype)
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"wrote {folder}: {family}, {model.n_params:,} parameters in {arguments.dtype}")


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
