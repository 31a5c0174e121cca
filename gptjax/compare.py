"""Compare models' answers to the same prompts: python -m gptjax.compare out/shakespeare Qwen/Qwen2.5-0.5B-Instruct

Writes compare.html, a self-contained page, and compare.md. An instruction model is prompted through its chat template,
any other model continues the prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gptjax import host
from gptjax.__main__ import run_command
from gptjax.cli import CHECKPOINT_HELP, DTYPE_HELP, Dtype, Which, parse_arguments, program
from gptjax.config import MODEL_HELP, Section, argument, option
from gptjax.errors import UserError
from gptjax.files import PROMPTS, write_atomically

# What needs JAX is imported where it is used: --help and a mistake in an option do not wait for it.


@dataclass(frozen=True)
class Arguments(Section):
    """The options of `gptjax compare`."""

    models: tuple[str, ...] = argument(f"each is {MODEL_HELP}", many=True)
    prompts: str = option(str(PROMPTS), "file of prompts, one on each line", metavar="PATH")
    temperature: tuple[float, ...] = option((0.0, 0.8), "one answer at each; 0: always the likeliest token")
    max_new_tokens: int = option(100, "the most tokens in an answer")
    system: str | None = option(None, "the system message of instruction models", prose=True)
    seed: int = option(1337, "the same seed gives the same answers")
    out: str = option("compare", "the pages are named OUT.html and OUT.md", metavar="OUT")
    checkpoint: Which = option("best", CHECKPOINT_HELP)
    dtype: Dtype = option("auto", DTYPE_HELP)

    def validate(self) -> None:
        self.require(self.max_new_tokens > 0, "max_new_tokens", "is not positive")
        self.require(all(t >= 0 for t in self.temperature), "temperature", "has a negative value")
        self.require(0 <= self.seed < 2**32, "seed", "is not in [0, 2**32)")

    def read_prompts(self) -> list[str]:
        """The lines of the file that are not empty."""
        from gptjax.data.corpora import read_text

        lines = "".join(read_text(Path(self.prompts))).splitlines()
        if not (prompts := [line.strip() for line in lines if line.strip()]):
            raise UserError(f"prompts={self.prompts} has no prompts")
        return prompts


def main(argv: Sequence[str]) -> None:
    """Ask each model each prompt at each temperature, and write both pages."""
    arguments = parse_arguments(program("compare"), __doc__, argv, Arguments())
    from gptjax.hub.weights import locate, open_weights
    from gptjax.inference.comparison import Column, ask, to_html, to_markdown
    from gptjax.inference.language_model import LanguageModel
    from gptjax.run_dir import holds_run

    host.prepare()
    prompts = arguments.read_prompts()
    out = arguments.out.removesuffix(".html").removesuffix(".md")
    pages = [Path(f"{out}.html"), Path(f"{out}.md")]
    pages[0].parent.mkdir(parents=True, exist_ok=True)
    for path in pages:
        if path.is_dir():
            raise UserError(f"out={arguments.out}: {path} is a folder; name another file")
    for name in arguments.models:  # report a mistake in any name before the first model answers
        path = locate(name)
        if not holds_run(path):
            open_weights(path)
    columns: list[Column] = []
    for name in arguments.models:
        model = LanguageModel.load(name, arguments.checkpoint, arguments.dtype).for_sampling()
        unique = sum(Path(other).name == Path(name).name for other in arguments.models) == 1
        options = (arguments.max_new_tokens, arguments.system, arguments.seed)
        columns.append(ask(model, model.name if unique else name, prompts, arguments.temperature, *options))
        write_atomically(pages[0], to_html(columns, prompts, arguments.temperature))
        write_atomically(pages[1], to_markdown(columns, prompts, arguments.temperature))
    print(f"wrote {pages[0]} and {pages[1]}")


if __name__ == "__main__":
    run_command("compare")
