"""Compare models' answers to the same prompts: python -m gptjax.compare out/shakespeare Qwen/Qwen2.5-0.5B-Instruct

Writes compare.html, a self-contained page, and compare.md. An instruction model is prompted through its chat template,
any other model continues the prompt.
"""

import base64
import html
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gptjax import host
from gptjax.cli import CHECKPOINT_HELP, DTYPE_HELP, MODEL_HELP, Dtype, Which, parse_arguments, program
from gptjax.config import Section, argument, option
from gptjax.data.corpora import read_text
from gptjax.errors import UserError, one_line_errors
from gptjax.files import shipped, write_atomically
from gptjax.hub.weights import locate, open_weights
from gptjax.inference.language_model import CHAT, Answer, LanguageModel
from gptjax.inference.sampling import Sampling
from gptjax.page import definitions, page
from gptjax.run_dir import holds_run

PROMPTS = shipped("prompts") / "case_study.txt"


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
        lines = "".join(read_text(Path(self.prompts))).splitlines()
        if not (prompts := [line.strip() for line in lines if line.strip()]):
            raise UserError(f"prompts={self.prompts} has no prompts")
        return prompts


@dataclass(frozen=True)
class Reply:
    """An answer and its speed: its tokens divided by the time of prefill and decoding."""

    answer: Answer
    tokens_per_second: float

    def __str__(self) -> str:
        end = "ended by itself" if self.answer.ended else "cut off"
        return f"{len(self.answer.tokens)} tokens, {end}, {self.tokens_per_second:,.0f} tokens/s"


@dataclass(frozen=True)
class Column:
    """One model's part of the pages. For a prompt that it cannot read there is only the reason, in `problems`."""

    name: str
    facts: dict[str, str]
    picture: bytes | None  # a run's loss.png
    replies: dict[tuple[str, float], Reply]  # by prompt and temperature
    problems: dict[str, str]


def main(argv: Sequence[str]) -> None:
    """Ask each model each prompt at each temperature, and write both pages."""
    arguments = parse_arguments(program("compare"), __doc__, argv, Arguments())
    host.prepare()
    prompts = arguments.read_prompts()
    pages = [Path(f"{arguments.out}.html"), Path(f"{arguments.out}.md")]
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
        columns.append(ask(name, prompts, arguments))
        write_atomically(pages[0], to_html(columns, prompts, arguments.temperature))
        write_atomically(pages[1], to_markdown(columns, prompts, arguments.temperature))
    print(f"wrote {pages[0]} and {pages[1]}")


def ask(name: str, prompts: Sequence[str], arguments: Arguments) -> Column:
    """Load a model and collect its answers to every prompt at every temperature."""
    model = LanguageModel.load(name, arguments.checkpoint, arguments.dtype).for_sampling()
    picture = path.read_bytes() if (path := model.folder / "loss.png").exists() else None
    unique = sum(Path(other).name == Path(name).name for other in arguments.models) == 1
    column = Column(model.name if unique else name, model.card(), picture, {}, {})
    for prompt in prompts:
        print(f"{model.name}: {prompt}", file=sys.stderr)
        try:
            for temperature in arguments.temperature:
                column.replies[prompt, temperature] = reply(model, prompt, temperature, arguments)
        except UserError as error:
            column.problems[prompt] = str(error)
    return column


def reply(model: LanguageModel, prompt: str, temperature: float, arguments: Arguments) -> Reply:
    """One answer, timed after its first few tokens have been drawn once to compile."""
    if model.template is None:
        ids = model.tokenizer.prompt(prompt, special=False)
    else:
        system = [{"role": "system", "content": arguments.system}] if arguments.system else []
        ids = model.chat_prompt([*system, {"role": "user", "content": prompt}])
    options = ([ids], arguments.max_new_tokens, Sampling(temperature=temperature), [arguments.seed])
    next(model.answer(*options))
    start = time.perf_counter()
    *_, [answer] = model.answer(*options)
    return Reply(answer, len(answer.tokens) / (time.perf_counter() - start))


def to_markdown(columns: Sequence[Column], prompts: Sequence[str], temperatures: Sequence[float]) -> str:
    """The comparison as Markdown: a table of cards, then the answers to each prompt."""
    rows = [["", *(column.name for column in columns)], ["---"] * (len(columns) + 1)]
    rows += [[name, *(column.facts[name] for column in columns)] for name in columns[0].facts]
    lines = ["# Models side by side", "", *("| " + " | ".join(map(_cell, row)) + " |" for row in rows)]
    for prompt in prompts:
        lines += ["", f"## {_cell(prompt)}"]
        for column in columns:
            lines += ["", f"### {_cell(column.name)}"]
            if prompt in column.problems:
                lines += ["", _cell(column.problems[prompt])]
                continue
            for temperature in temperatures:
                reply = column.replies[prompt, temperature]
                fence = "`" * max(3, 1 + max(map(len, re.findall("`+", reply.answer.text)), default=0))
                lines += ["", f"Temperature {temperature:g} ({reply}):", "", fence, reply.answer.text, fence]
    return "\n".join(lines) + "\n"


def to_html(columns: Sequence[Column], prompts: Sequence[str], temperatures: Sequence[float]) -> str:
    """The comparison as one page without scripts or external files."""
    row, sections = f'<div class="row" style="--n: {len(columns)}">', ""
    for prompt in prompts:
        answers = "".join(_answers(prompt, column, temperatures) for column in columns)
        sections += f"<section>\n<h2>{html.escape(prompt)}</h2>\n{row}{answers}</div>\n</section>\n"
    footer = (
        "<footer>Tokens per second: one answer at a time, with reading the prompt but without compilation. Made by "
        "gptjax.</footer>\n"
    )
    return page("Models side by side", f"{row}{''.join(map(_card, columns))}</div>\n{sections}{footer}")


def _card(column: Column) -> str:
    picture = ""
    if column.picture:
        data = base64.b64encode(column.picture).decode()
        picture = f'<img alt="training and validation loss" src="data:image/png;base64,{data}"/>'
    return f'<div class="card"><h2>{html.escape(column.name)}</h2>{definitions(column.facts)}{picture}</div>'


def _answers(prompt: str, column: Column, temperatures: Sequence[float]) -> str:
    body = f"<h3>{html.escape(column.name)}</h3>"
    if prompt in column.problems:
        return f'<div class="card">{body}<p class="problem">{html.escape(column.problems[prompt])}</p></div>'
    for temperature in temperatures:
        reply = column.replies[prompt, temperature]
        begin = "" if column.facts["asked as"] == CHAT else f'<span class="prompt">{html.escape(prompt)}</span>'
        body += f'<p class="small"><b>temperature {temperature:g}</b> · {reply}</p>'
        body += f"<pre>{begin}{html.escape(reply.answer.text)}</pre>"
    return f'<div class="card">{body}</div>'


def _cell(text: str) -> str:
    """Text escaped for Markdown, also in a cell of a table."""
    return text.replace("<", "\\<").replace("|", "\\|")


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
