"""Models out: a language model as a folder for transformers, a GGUF file, or a folder of programs for jax."""

import json
import secrets
import shutil
from pathlib import Path
from typing import Any

from gptjax.cli import GgufType
from gptjax.hub.export import export
from gptjax.hub.families import family_of
from gptjax.hub.gguf_export import export_gguf
from gptjax.hub.gguf_tokenizer import tokenizer_fields
from gptjax.hub.weights import copy_side_files
from gptjax.inference.language_model import LanguageModel
from gptjax.inference.stablehlo import export_programs
from gptjax.tokenizer import END_OF_TEXT


def write_folder(folder: Path, model: LanguageModel, dtype: str | None) -> str:
    """Write weights in this dtype, or programs for None, at once into a folder that is new or empty; say what it is."""
    what = "programs of prefill and decode" if dtype is None else family_of(model.config)
    temporary = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}")
    temporary.mkdir(parents=True)
    try:
        _write_side_files(temporary, model)
        if dtype is None:
            export_programs(temporary, model.config, model.params)
        else:
            export(temporary, model.config, model.params, dtype)
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return what


def write_gguf(path: Path, model: LanguageModel, kind: GgufType) -> None:
    """Write a GGUF file with matrices of this type, the tokenizer and the chat template."""
    tokens = (model.tokenizer, model.config.vocab_size, model.special_tokens, model.stop_tokens)
    template = {"tokenizer.chat_template": model.template} if model.template else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    export_gguf(path, model.config, model.params, kind, tokenizer_fields(*tokens) | template)


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
