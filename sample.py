"""Sample from a trained GPT, streamed as it is drawn: python sample.py --prompt "ROMEO:" """

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from gptjax.config import Parser, Section, option
from gptjax.errors import UserError, one_line_errors
from gptjax.generate import Sampling, generate
from gptjax.host import keep_freed_memory
from gptjax.run import load_run, newest_run


@dataclass(frozen=True)
class Arguments(Section):
    run: str | None = option(None, "folder of the run; none: the newest in out/")
    checkpoint: Literal["best", "latest"] = option("best", "parameters: best by validation loss, or the latest")
    prompt: str = option("", "text to go on from; none: a new line")
    prompt_file: str | None = option(None, "file to read the prompt from; -: standard input")
    num_samples: int = option(1, "samples drawn at once; the first is streamed")
    max_new_tokens: int = option(500, "tokens in each")
    temperature: float = option(0.8, "below 1: safer, above 1: wilder; 0: always the likeliest token")
    top_k: int = option(200, "draw from so many of the likeliest tokens; 0: from all")
    seed: int = option(1337, "the same seed gives the same text")
    context: Literal["refill", "exact"] = option(
        "refill",
        "past block_size tokens: 'refill' reads the last half again and goes on from its cache, fast; "
        "'exact' reads the last block_size tokens again for every token, as nanoGPT does",
    )

    def validate(self) -> None:
        for name in ("num_samples", "max_new_tokens"):
            self.require(getattr(self, name) > 0, name, "is not positive")
        for name in ("temperature", "top_k", "seed"):
            self.require(getattr(self, name) >= 0, name, "is negative")
        self.require(self.seed < 2**32, "seed", "is not below 2**32")
        self.require(not (self.prompt and self.prompt_file), "prompt", "and prompt_file cannot both be given")

    def text(self) -> str:
        """The prompt, wherever it comes from."""
        if self.prompt_file is None:
            return self.prompt
        try:
            data = sys.stdin.buffer.read() if self.prompt_file == "-" else Path(self.prompt_file).read_bytes()
            return data.decode("utf-8")
        except OSError as error:
            raise UserError(f"prompt_file={self.prompt_file}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"prompt_file={self.prompt_file} is not UTF-8 at byte {error.start}") from error


def main(argv: Sequence[str]) -> None:
    keep_freed_memory()
    parser = Parser("sample.py", __doc__)
    parser.add_fields(Arguments())
    [arguments] = parser.parse(argv, Arguments())
    config, params, tokenizer = load_run(Path(arguments.run) if arguments.run else newest_run(), arguments.checkpoint)
    prompt = arguments.text()
    prompt_BP = np.repeat(tokenizer.prompt(prompt)[None], arguments.num_samples, axis=0)
    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.context)
    chunks = generate(config.model, params, prompt_BP, arguments.max_new_tokens, sampling, arguments.seed)
    drawn: list[np.ndarray] = []

    def first_sample() -> Iterator[int]:
        for chunk_BC in chunks:
            drawn.append(chunk_BC)
            yield from chunk_BC[0]

    print(prompt, end="", flush=True)
    for text in tokenizer.decode_stream(first_sample()):
        print(text, end="", flush=True)
    for tokens in np.hstack(drawn)[1:]:
        print(f"\n---------------\n{prompt}{tokenizer.decode(tokens)}", end="")
    print()


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
