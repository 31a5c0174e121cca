"""Write a model for other programs: python -m gptjax.export out/shakespeare my-model[.gguf]

A folder is for transformers, and a .gguf file for llama.cpp. With --format stablehlo the folder has the model itself as
programs, for CPU, GPU and TPU, and an example that runs them with jax alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gptjax.__main__ import run_command
from gptjax.cli import CHECKPOINT_HELP, GgufType, parse_arguments, program
from gptjax.config import MODEL_HELP, Section, argument, option
from gptjax.errors import UserError

# What needs JAX is imported where it is used: --help and a mistake in an option do not wait for it.


@dataclass(frozen=True)
class Arguments(Section):
    """The options of `gptjax export`."""

    source: str = argument(MODEL_HELP)
    folder: str = argument("what to write: a folder that is new or empty, or a new FILE.gguf")
    format: Literal["auto", "huggingface", "gguf", "stablehlo"] = option(
        "auto",
        "weights for transformers, a file for llama.cpp, or programs for jax; auto: gguf for a .gguf, else huggingface",
    )
    checkpoint: Literal["best", "latest"] = option("best", CHECKPOINT_HELP)
    dtype: Literal["float32", "bfloat16", "float16"] = option("float32", "dtype of the weights in a folder")
    type: GgufType = option(
        "f32",
        "type of the matrices in a .gguf file; q4_0: with embedding and head in q8_0; in q4_0 and q8_0, matrices whose "
        "row length is not a multiple of 32 are f16",
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
    from gptjax.inference.export import write_folder, write_gguf
    from gptjax.inference.language_model import LanguageModel
    from gptjax.progress import working

    folder = Path(arguments.folder).absolute()
    to_file = folder.suffix == ".gguf"
    if folder.exists() and (to_file or not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already: name a folder that is not")
    model = LanguageModel.load(arguments.source, arguments.checkpoint, "float32")
    if to_file:
        with working(f"writing {folder}"):
            write_gguf(folder, model, arguments.type)
        what = f"{model.n_params:,} parameters in {arguments.type}, {folder.stat().st_size / 2**20:.1f} MiB"
    else:
        with working(f"writing {folder}"):
            family = write_folder(folder, model, None if arguments.format == "stablehlo" else arguments.dtype)
        what = f"{family}, {model.n_params:,} parameters in {arguments.dtype}"
    print(f"wrote {folder}: {what}")


if __name__ == "__main__":
    run_command("export")
