"""Generate text, streamed as it grows: python sample.py --prompt "ROMEO:", or --chat with an instruction model."""

import io
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gptjax import host
from gptjax.cli import parse_arguments
from gptjax.config import Section, option
from gptjax.data.corpora import decoded
from gptjax.errors import UserError, one_line_errors
from gptjax.inference.generate import PrefixCache
from gptjax.inference.language_model import CHECKPOINT_HELP, DTYPE_HELP, MODEL_HELP, Answer, Dtype, LanguageModel, Which
from gptjax.inference.sampling import Sampling
from gptjax.run_dir import newest_run


@dataclass(frozen=True)
class Arguments(Section):
    run: str | None = option(None, f"{MODEL_HELP}; none: the newest run")
    draft: str | None = option(None, "a smaller model with the same tokenizer, for speculative decoding")
    checkpoint: Which = option("best", CHECKPOINT_HELP)
    dtype: Dtype = option("auto", DTYPE_HELP)
    prompt: tuple[str, ...] = option((), "text to continue, or several texts at once; none: a new line", prose=True)
    prompt_file: str | None = option(None, "file to read the prompt from; -: standard input")
    special: bool = option(
        False, "names of special tokens in a prompt, such as <|endoftext|>, are these tokens, not text"
    )
    chat: bool = option(False, "hold a conversation with an instruction model, line by line; an empty line ends it")
    system: str | None = option(None, "chat: the system message, which comes before the conversation", prose=True)
    num_samples: int = option(1, "samples of each prompt, drawn at once; the first is streamed")
    max_new_tokens: int = option(500, "the most tokens in a sample")
    stop: tuple[str, ...] = option((), "texts that end a sample, besides the model's own stop tokens", prose=True)
    temperature: float | None = option(None, "divides the logits; 0: likeliest token; none: the model's own, or 0.8")
    top_k: int | None = option(None, "draw from so many likeliest tokens; 0: from all; none: the model's own, or 200")
    top_p: float | None = option(
        None, "draw from the likeliest tokens whose probabilities add up to this; none: the model's own, or 1"
    )
    min_p: float = option(0.0, "draw from tokens with at least this fraction of the likeliest token's probability")
    repetition_penalty: float | None = option(None, "above 1: makes repeats less likely; none: the model's own, or 1")
    seed: int = option(1337, "the same seed gives the same text; each further sample has the next seed")
    log_probs: bool = option(False, "print each token with its log-probability in nats instead of the text")

    def validate(self) -> None:
        self.require_within(1, 2**16, "num_samples")
        for name in ("max_new_tokens", "repetition_penalty"):
            value = getattr(self, name)
            self.require(value is None or value > 0, name, "is not positive")
        for name in ("temperature", "top_k", "seed"):
            self.require((getattr(self, name) or 0) >= 0, name, "is negative")
        for name in ("top_p", "min_p"):
            self.require(0 <= (getattr(self, name) or 0) <= 1, name, "is not in [0, 1]")
        self.require(self.seed + self.num_samples <= 2**32, "seed", "is not below 2**32 with the other samples' seeds")
        self.require("" not in self.stop, "stop", "has an empty text, which every text contains")
        self.require(not (self.prompt and self.prompt_file), "prompt", "and prompt_file cannot both be given")
        one = self.num_samples == 1 and len(self.prompt) < 2
        self.require(self.draft is None or one, "draft", "works for one sample of one prompt")
        alone = not self.chat or (one and not (self.prompt or self.prompt_file or self.log_probs))
        self.require(alone, "chat", "reads its prompts from the terminal, and draws one sample of each")
        self.require(self.chat or self.system is None, "system", "needs --chat")
        self.require(not (self.chat and self.special), "special", "is for prompts; messages of a chat are always text")

    def prompts(self) -> Sequence[str]:
        """The prompts of --prompt, of the file or of standard input."""
        if self.prompt_file is None:
            return self.prompt or [""]
        if self.prompt_file == "-" and sys.stdin is None:
            raise UserError("prompt_file=-: standard input is closed")
        with open(0 if self.prompt_file == "-" else self.prompt_file, "rb", closefd=self.prompt_file != "-") as file:
            return ["".join(decoded(file, self.prompt_file))]

    def sampling(self, model: LanguageModel) -> Sampling:
        """The rules that are given, else those that the model's makers recommend, else the usual ones."""
        usual = {"temperature": 0.8, "top_k": 200, "top_p": 1.0, "repetition_penalty": 1.0}
        if model.defaults:
            usual |= {"top_k": 0} | model.defaults
        given = {name: getattr(self, name) for name in usual if getattr(self, name) is not None}
        return Sampling(**(usual | given), min_p=self.min_p)


def main(argv: Sequence[str]) -> None:
    arguments = parse_arguments("sample.py", __doc__, argv, Arguments())
    host.prepare()
    model = _load(arguments.run or str(newest_run()), arguments)
    draft = _load(arguments.draft, arguments) if arguments.draft else None
    if draft:
        model.require_same_tokens(draft)
    chat(model, draft, arguments) if arguments.chat else complete(model, draft, arguments)


def _load(name: str, arguments: Arguments) -> LanguageModel:
    return LanguageModel.load(name, arguments.checkpoint, arguments.dtype).for_sampling()


def complete(model: LanguageModel, draft: LanguageModel | None, arguments: Arguments) -> None:
    """Print a continuation of each prompt, the first sample as it grows."""
    texts = [text for text in arguments.prompts() for _ in range(arguments.num_samples)]
    prompts = [model.tokenizer.prompt(text, special=arguments.special) for text in texts]
    seeds = [arguments.seed + i % arguments.num_samples for i in range(len(texts))]
    options = (arguments.max_new_tokens, arguments.sampling(model), seeds, arguments.stop)
    stream = model.answer(prompts, *options, draft=draft)
    if arguments.log_probs:
        *_, answers = stream
        print("\n\n".join(table(model, answer) for answer in answers))
        return
    print(texts[0], end="", flush=True)
    answers = show(stream)
    for text, answer in zip(texts[1:], answers[1:], strict=True):
        print(f"\n---------------\n{text}{answer.text}", end="")
    print()


def show(stream: Iterator[list[Answer]]) -> list[Answer]:
    """Print the first answer as it grows, and return all of them."""
    n_shown = 0
    for answers in stream:
        print(answers[0].text[n_shown:], end="", flush=True)
        n_shown = len(answers[0].text)
    return answers


def table(model: LanguageModel, answer: Answer) -> str:
    """A line for each token: its log-probability and its text."""
    pieces = [model.tokenizer.decode([token]) for token in answer.tokens]
    return "\n".join(f"{nats:9.4f}  {piece!r}" for nats, piece in zip(answer.log_probs, pieces, strict=True))


def chat(model: LanguageModel, draft: LanguageModel | None, arguments: Arguments) -> None:
    """Hold a conversation in the terminal. Each turn reads only its new tokens."""
    messages = [{"role": "system", "content": arguments.system}] if arguments.system else []
    model.chat_prompt([*messages, {"role": "user", "content": ""}])  # fails before the first question
    prefix, seed = PrefixCache(), arguments.seed
    if isinstance(sys.stdin, io.TextIOWrapper):
        encoding = None if sys.stdin.isatty() else "utf-8"
        sys.stdin.reconfigure(encoding=encoding, errors="replace")  # bytes that are no text do not end a conversation
    rules = (arguments.max_new_tokens, arguments.sampling(model))
    while question := ask():
        messages.append({"role": "user", "content": question})
        prompt = model.chat_prompt(messages)
        [answer] = show(model.answer([prompt], *rules, [seed], arguments.stop, prefix, draft))
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


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
