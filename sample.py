"""Talk to a GPT, streamed as it answers: python sample.py --prompt "ROMEO:", or --chat with an instruction model."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gptjax import host
from gptjax.cli import Parser
from gptjax.config import Section, option
from gptjax.errors import UserError, one_line_errors
from gptjax.inference.generate import Memory, Sampling
from gptjax.inference.language_model import Answer, Dtype, LanguageModel
from gptjax.run_dir import newest_run


@dataclass(frozen=True)
class Arguments(Section):
    run: str | None = option(
        None, "a run's folder, a Hugging Face folder, a model's name there, or nanoGPT's ckpt.pt; none: the newest run"
    )
    draft: str | None = option(
        None, "a smaller model with the same tokens that guesses ahead: faster where it guesses well, else the same"
    )
    checkpoint: Literal["best", "latest"] = option("best", "of a run: best by validation loss, or the latest")
    dtype: Dtype = option(
        "auto",
        "of activations, and of weights that no run made; int8: of weights alone; auto: float32 on CPU, else a run's "
        "own, or bfloat16",
    )
    prompt: tuple[str, ...] = option((), "text to go on from, or several texts at once; none: a new line")
    prompt_file: str | None = option(None, "file to read the prompt from; -: standard input")
    chat: bool = option(False, "hold a conversation with an instruction model, line by line; an empty line ends it")
    system: str | None = option(None, "chat: what the model is told before the conversation")
    num_samples: int = option(1, "samples of each prompt, drawn at once; the first is streamed")
    max_new_tokens: int = option(500, "tokens in each, at most")
    stop: tuple[str, ...] = option((), "texts that end a sample, beside the model's own stop tokens")
    temperature: float | None = option(
        None, "below 1: safer, above 1: wilder; 0: always the likeliest token; none: as the model's makers say, or 0.8"
    )
    top_k: int | None = option(None, "draw from so many of the likeliest tokens; 0: from all; none: theirs, or 200")
    top_p: float | None = option(None, "draw from the likeliest tokens of this probability in all; none: theirs, or 1")
    min_p: float = option(0.0, "draw from tokens with at least this part of the likeliest one's probability")
    repetition_penalty: float | None = option(
        None, "above 1: tokens of the text so far are less likely; none: theirs, or 1"
    )
    seed: int = option(1337, "the same seed gives the same text; each further sample has the next seed")
    log_probs: bool = option(False, "print each token with its log-probability in nats, in place of the text")

    def validate(self) -> None:
        for name in ("num_samples", "max_new_tokens"):
            self.require(getattr(self, name) > 0, name, "is not positive")
        for name in ("temperature", "top_k", "seed"):
            self.require((getattr(self, name) or 0) >= 0, name, "is negative")
        for name in ("top_p", "min_p"):
            self.require(0 <= (getattr(self, name) or 0) <= 1, name, "is not in [0, 1]")
        self.require(
            self.repetition_penalty is None or self.repetition_penalty > 0, "repetition_penalty", "is not positive"
        )
        self.require(self.seed + self.num_samples <= 2**32, "seed", "is not below 2**32")
        self.require("" not in self.stop, "stop", "has an empty text, which is everywhere")
        self.require(not (self.prompt and self.prompt_file), "prompt", "and prompt_file cannot both be given")
        alone = not (self.prompt or self.prompt_file or self.log_probs) and self.num_samples == 1
        self.require(
            not self.chat or alone, "chat", "reads its prompts from the terminal, and draws one sample of each"
        )
        self.require(self.chat or self.system is None, "system", "is for --chat")
        one = self.num_samples == 1 and len(self.prompt) < 2
        self.require(self.draft is None or one, "draft", "guesses for one sample of one prompt")

    def prompts(self) -> Sequence[str]:
        """The prompts, wherever they come from."""
        if self.prompt_file is None:
            return self.prompt or [""]
        try:
            data = sys.stdin.buffer.read() if self.prompt_file == "-" else Path(self.prompt_file).read_bytes()
            return [data.decode("utf-8")]
        except OSError as error:
            raise UserError(f"prompt_file={self.prompt_file}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"prompt_file={self.prompt_file} is not UTF-8 at byte {error.start}") from error

    def sampling(self, model: LanguageModel) -> Sampling:
        """The rules: those given, else those that the model's makers recommend, else the usual ones."""
        usual = {"temperature": 0.8, "top_k": 200, "top_p": 1.0, "repetition_penalty": 1.0}
        if model.defaults:
            usual |= {"top_k": 0} | model.defaults
        given = {name: getattr(self, name) for name in usual if getattr(self, name) is not None}
        return Sampling(**(usual | given), min_p=self.min_p)


def main(argv: Sequence[str]) -> None:
    host.prepare()
    parser = Parser("sample.py", __doc__)
    parser.add_fields(Arguments())
    [arguments] = parser.parse(argv, Arguments())
    model = _load(arguments.run or str(newest_run()), arguments)
    draft = _load(arguments.draft, arguments) if arguments.draft else None
    if draft:
        model.require_same_tokens(draft)
    chat(model, draft, arguments) if arguments.chat else complete(model, draft, arguments)


def _load(name: str, arguments: Arguments) -> LanguageModel:
    return LanguageModel.load(name, arguments.checkpoint, arguments.dtype).for_sampling()


def complete(model: LanguageModel, draft: LanguageModel | None, arguments: Arguments) -> None:
    """Print what the model makes of each prompt, the first sample as it grows."""
    texts = [text for text in arguments.prompts() for _ in range(arguments.num_samples)]
    prompts = [model.tokenizer.prompt(text) for text in texts]
    seeds = [arguments.seed + i for i in range(arguments.num_samples)] * (len(texts) // arguments.num_samples)
    answers: list[Answer] = []
    shown = ""
    if not arguments.log_probs:
        print(texts[0], end="", flush=True)
    options = (arguments.max_new_tokens, arguments.sampling(model), seeds, arguments.stop)
    for answers in model.answer(prompts, *options, draft=draft):
        if not arguments.log_probs:
            print(answers[0].text[len(shown) :], end="", flush=True)
            shown = answers[0].text
    if arguments.log_probs:
        print("\n\n".join("\n".join(table(model, answer)) for answer in answers))
        return
    for text, answer in zip(texts[1:], answers[1:], strict=True):
        print(f"\n---------------\n{text}{answer.text}", end="")
    print()


def table(model: LanguageModel, answer: Answer) -> list[str]:
    """A line for each token: its log-probability and its text."""
    pieces = [model.tokenizer.decode([token]) for token in answer.tokens]
    return [f"{log_prob:9.4f}  {piece!r}" for log_prob, piece in zip(answer.log_probs, pieces, strict=True)]


def chat(model: LanguageModel, draft: LanguageModel | None, arguments: Arguments) -> None:
    """A conversation in the terminal; what was read of it stays in the cache from turn to turn."""
    messages = [{"role": "system", "content": arguments.system}] if arguments.system else []
    model.chat_prompt([*messages, {"role": "user", "content": ""}])  # a model that cannot says so before it asks
    memory, seed = Memory(), arguments.seed
    while question := ask():
        messages.append({"role": "user", "content": question})
        prompt, shown = model.chat_prompt(messages), ""
        stream = model.answer(
            [prompt], arguments.max_new_tokens, arguments.sampling(model), [seed], arguments.stop, memory, draft
        )
        for [answer] in stream:
            print(answer.text[len(shown) :], end="", flush=True)
            shown = answer.text
        print()
        messages.append({"role": "assistant", "content": shown})
        seed += 1


def ask() -> str:
    """The next line of the user, empty at the end."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
