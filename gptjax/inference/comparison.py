"""Answers of several models to the same prompts, side by side as a page and as Markdown."""

import base64
import html
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass

from gptjax.errors import UserError
from gptjax.inference.language_model import CHAT, Answer, LanguageModel
from gptjax.inference.sampling import Sampling
from gptjax.page import definitions, page
from gptjax.progress import working


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


def ask(
    model: LanguageModel,
    name: str,
    prompts: Sequence[str],
    temperatures: Sequence[float],
    most_tokens: int,
    system: str | None,
    seed: int,
) -> Column:
    """The column `name` with a model's answers to every prompt at every temperature."""
    picture = path.read_bytes() if (path := model.folder / "loss.png").exists() else None
    column = Column(name, model.card(), picture, {}, {})
    for prompt in prompts:
        try:
            with working(f"{model.name}: {prompt}", say=True):
                for temperature in temperatures:
                    column.replies[prompt, temperature] = reply(model, prompt, temperature, most_tokens, system, seed)
        except UserError as error:
            column.problems[prompt] = str(error)
    return column


def reply(
    model: LanguageModel, prompt: str, temperature: float, most_tokens: int, system: str | None, seed: int
) -> Reply:
    """One answer, timed after its first few tokens have been drawn once to compile."""
    if model.template is None:
        ids = model.tokenizer.prompt(prompt, special=False)
    else:
        first = [{"role": "system", "content": system}] if system else []
        ids = model.chat_prompt([*first, {"role": "user", "content": prompt}])
    options = ([ids], most_tokens, Sampling(temperature=temperature), [seed])
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
