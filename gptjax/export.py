"""Write a Hugging Face folder that transformers loads: python -m gptjax.export out/shakespeare my-model"""

import json
import secrets
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gptjax.cli import Parser
from gptjax.config import Section, argument, option
from gptjax.errors import UserError, one_line_errors
from gptjax.hub.export import export
from gptjax.hub.families import family_of
from gptjax.hub.weights import SIDE_FILES
from gptjax.inference.language_model import LanguageModel
from gptjax.tokenizer import END_OF_TEXT


@dataclass(frozen=True)
class Arguments(Section):
    source: str = argument("a run's folder, a Hugging Face folder, the name of a model there or nanoGPT's ckpt.pt")
    folder: str = argument("folder to make")
    checkpoint: Literal["best", "latest"] = option("best", "of a run: best by validation loss, or the latest")
    dtype: Literal["float32", "bfloat16", "float16"] = option("float32", "of the weights that are written")


def main(argv: Sequence[str]) -> None:
    parser = Parser("python -m gptjax.export", __doc__)
    parser.add_fields(Arguments())
    [arguments] = parser.parse(argv, Arguments())
    folder = Path(arguments.folder).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already: name a folder that is not")
    model = LanguageModel.load(arguments.source, arguments.checkpoint, "float32")
    family_of(model.config)
    made = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}")
    made.mkdir(parents=True)
    try:
        _write_side_files(made, model)
        export(made, model.config, model.params, arguments.dtype)
        if folder.exists():
            folder.rmdir()
        made.rename(folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    print(f"wrote {folder}: {family_of(model.config)}, {model.n_params:,} parameters in {arguments.dtype}")


def _write_side_files(folder: Path, model: LanguageModel) -> None:
    """The tokenizer and what else a model has beside its weights; made up where it has no such files."""
    model.tokenizer.save(folder / "tokenizer.json")
    for name in SIDE_FILES:
        if (model.folder / name).exists():
            shutil.copyfile(model.folder / name, folder / name)
    if not (folder / "tokenizer_config.json").exists():
        mark = {} if model.tokenizer.end_of_text is None else {"eos_token": END_OF_TEXT}
        values = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": model.config.block_size} | mark
        values["clean_up_tokenization_spaces"] = False
        (folder / "tokenizer_config.json").write_text(json.dumps(values, indent=2) + "\n")
    if not (folder / "generation_config.json").exists():
        stops = {"eos_token_id": sorted(model.stop_tokens)} if model.stop_tokens else {}
        (folder / "generation_config.json").write_text(json.dumps(stops, indent=2) + "\n")


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
