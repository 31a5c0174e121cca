"""Samples and conversations in a terminal: a text grows as its tokens are drawn."""

import io
import sys
from collections.abc import Iterator, Sequence

from gptjax.data.corpora import decoded
from gptjax.errors import UserError
from gptjax.inference.generate import PrefixCache
from gptjax.inference.language_model import Answer, LanguageModel
from gptjax.inference.sampling import Sampling
from gptjax.progress import working


def read_prompt(file: str) -> str:
    """The text of a file, or with "-" of standard input."""
    if file == "-" and sys.stdin is None:
        raise UserError("prompt_file=-: standard input is closed")
    with open(0 if file == "-" else file, "rb", closefd=file != "-") as stream:
        return "".join(decoded(stream, file))


def complete(
    model: LanguageModel,
    draft: LanguageModel | None,
    max_new_tokens: int,
    sampling: Sampling,
    stop: Sequence[str],
    texts: Sequence[str],
    seeds: Sequence[int],
    *,
    special: bool = False,
    log_probs: bool = False,
) -> None:
    """Print a continuation of each text for each seed, the first as it grows."""
    begins = [text for text in texts for _ in seeds]
    prompts = [model.tokenizer.prompt(text, special=special) for text in begins]
    stream = model.answer(prompts, max_new_tokens, sampling, [*seeds] * len(texts), stop, draft=draft)
    if log_probs:
        with working("sampling"):
            *_, answers = stream
        print("\n\n".join(table(model, answer) for answer in answers))
        return
    answers = show(stream, begins[0])
    for text, answer in zip(begins[1:], answers[1:], strict=True):
        print(f"\n---------------\n{text}{answer.text}", end="")
    print()


def show(stream: Iterator[list[Answer]], begin: str = "") -> list[Answer]:
    """Print `begin` and the first answer as it grows, and return all of them."""
    with working("reading the prompt"):  # and compiling, the first time
        answers = next(stream)
    print(begin + answers[0].text, end="", flush=True)
    n_shown = len(answers[0].text)
    for answers in stream:
        print(answers[0].text[n_shown:], end="", flush=True)
        n_shown = len(answers[0].text)
    return answers


def table(model: LanguageModel, answer: Answer) -> str:
    """A line for each token: its log-probability and its text."""
    pieces = [model.tokenizer.decode([token]) for token in answer.tokens]
    return "\n".join(f"{nats:9.4f}  {piece!r}" for nats, piece in zip(answer.log_probs, pieces, strict=True))


def chat(
    model: LanguageModel,
    draft: LanguageModel | None,
    max_new_tokens: int,
    sampling: Sampling,
    stop: Sequence[str],
    system: str | None,
    seed: int,
) -> None:
    """Hold a conversation in the terminal. Each turn reads only its new tokens."""
    messages = [{"role": "system", "content": system}] if system else []
    model.chat_prompt([*messages, {"role": "user", "content": ""}])  # fails before the first question
    prefix = PrefixCache()
    if isinstance(sys.stdin, io.TextIOWrapper):
        encoding = None if sys.stdin.isatty() else "utf-8"
        sys.stdin.reconfigure(encoding=encoding, errors="replace")  # bytes that are no text do not end a conversation
    while question := ask():
        messages.append({"role": "user", "content": question})
        prompt = model.chat_prompt(messages)
        [answer] = show(model.answer([prompt], max_new_tokens, sampling, [seed], stop, prefix, draft))
        print()
        messages.append({"role": "assistant", "content": answer.text})
        seed += 1


def ask() -> str:
    """The user's next line, empty at the end of the input."""
    if sys.stdin is None:
        return ""
    try:
        return input("> " if sys.stdin.isatty() else "").removeprefix("\ufeff").strip()
    except EOFError:
        return ""
