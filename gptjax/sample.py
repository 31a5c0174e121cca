"""Generate text, streamed as it grows: python sample.py --prompt "ROMEO:", or --chat with an instruction model."""

from collections.abc import Sequence
from dataclasses import dataclass

from gptjax.__main__ import run_command
from gptjax.cli import CHECKPOINT_HELP, DTYPE_HELP, Dtype, Which, parse_arguments, program
from gptjax.config import MODEL_HELP, Section, option

# What needs JAX is imported where it is used: --help and a mistake in an option do not wait for it.


@dataclass(frozen=True)
class Arguments(Section):
    """The options of `gptjax sample`."""

    run: str | None = option(None, f"{MODEL_HELP}; none: the newest run", metavar="MODEL")
    draft: str | None = option(
        None, "a smaller model with the same tokenizer, for speculative decoding", metavar="MODEL"
    )
    checkpoint: Which = option("best", CHECKPOINT_HELP)
    dtype: Dtype = option("auto", DTYPE_HELP)
    prompt: tuple[str, ...] = option((), "text to continue, or several texts at once; none: a new line", prose=True)
    prompt_file: str | None = option(None, "file to read the prompt from; -: standard input", metavar="PATH")
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

    @property
    def rules(self) -> dict[str, float]:
        """The sampling rules that the command line gives."""
        names = ("temperature", "top_k", "top_p", "repetition_penalty", "min_p")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @property
    def seeds(self) -> list[int]:
        """Of the samples of one prompt."""
        return [self.seed + i for i in range(self.num_samples)]


def main(argv: Sequence[str]) -> None:
    """Continue a prompt, or hold a conversation."""
    arguments = parse_arguments(program("sample"), __doc__, argv, Arguments())
    from gptjax import host
    from gptjax.inference import terminal
    from gptjax.inference.language_model import LanguageModel
    from gptjax.run_dir import newest_run

    def load(name: str) -> LanguageModel:
        return LanguageModel.load(name, arguments.checkpoint, arguments.dtype).for_sampling()

    host.prepare()
    model = load(arguments.run or str(newest_run()))
    draft = load(arguments.draft) if arguments.draft else None
    if draft:
        model.require_same_tokens(draft)
    rules = (arguments.max_new_tokens, model.sampling(**arguments.rules), arguments.stop)
    if arguments.chat:
        terminal.chat(model, draft, *rules, arguments.system, arguments.seed)
        return
    texts = [terminal.read_prompt(arguments.prompt_file)] if arguments.prompt_file else arguments.prompt or [""]
    terminal.complete(
        model, draft, *rules, texts, arguments.seeds, special=arguments.special, log_probs=arguments.log_probs
    )


if __name__ == "__main__":
    run_command("sample")
