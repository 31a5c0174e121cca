"""Evaluate a model's loss on a text, or HellaSwag: python -m gptjax.evaluate out/shakespeare --text FILE

The model is any run, Hugging Face folder or ckpt.pt. The loss is over every token, not over a sample of them.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptjax import host
from gptjax.__main__ import run_command
from gptjax.cli import CHECKPOINT_HELP, DTYPE_HELP, Dtype, Which, parse_arguments, program
from gptjax.config import MODEL_HELP, Section, argument, option
from gptjax.errors import UserError

# What needs JAX is imported where it is used: --help and a mistake in an option do not wait for it.


@dataclass(frozen=True)
class Arguments(Section):
    """The options of `gptjax evaluate`."""

    model: str = argument(MODEL_HELP)
    text: str | None = option(
        None, "file to predict: UTF-8 text, or a .bin file of the model's own tokens", metavar="PATH"
    )
    hellaswag: str | None = option(
        None, 'choose an ending: JSONL of {"ctx": ..., "endings": [...], "label": ...}', metavar="PATH"
    )
    block_size: int = option(1024, "text: tokens in a window, at most the model's block_size")
    stride: int | None = option(None, "text: tokens scored in each window; fewer: more context, but slower; none: all")
    checkpoint: Which = option("best", CHECKPOINT_HELP)
    dtype: Dtype = option("auto", DTYPE_HELP)
    json: bool = option(False, "print one JSON object instead of readable lines")

    def validate(self) -> None:
        self.require(self.block_size > 0, "block_size", "is not positive")
        fits = self.stride is None or 0 < self.stride <= self.block_size
        self.require(fits, "stride", f"is not in [1, block_size={self.block_size}]")


def main(argv: Sequence[str]) -> None:
    """Print the loss of a text and the accuracy on HellaSwag, whichever are asked for."""
    arguments = parse_arguments(program("evaluate"), __doc__, argv, Arguments())
    from gptjax.inference.evaluation import hellaswag, read_questions, read_tokens, text_loss
    from gptjax.inference.language_model import LanguageModel

    host.prepare()
    paths = {name: Path(path) for name in ("text", "hellaswag") if (path := getattr(arguments, name))}
    if not paths:
        raise UserError("nothing to evaluate: pass --text FILE or --hellaswag FILE")
    for name, path in paths.items():
        if not path.is_file():
            raise UserError(f"{name}={path}: there is no such file")
    questions = read_questions(paths["hellaswag"]) if "hellaswag" in paths else []
    model = LanguageModel.load(arguments.model, arguments.checkpoint, arguments.dtype)
    results: dict[str, Any] = {"model": model.name}
    for name, path in paths.items():
        start = time.perf_counter()
        if name == "text":
            result = text_loss(model, read_tokens(model, path), arguments.block_size, arguments.stride)
        else:
            result = hellaswag(model, questions)
        results[name] = {"file": str(path)} | result | {"seconds": round(time.perf_counter() - start, 3)}
    if arguments.json:
        print(json.dumps(results))
        return
    print(f"model: {model.name}")
    for name in paths:
        print(f"{name}:")
        for key, value in results[name].items():
            print(f"  {key.replace('_', ' ')}: {value:,.5g}" if isinstance(value, float) else f"  {key}: {value}")


if __name__ == "__main__":
    run_command("evaluate")
