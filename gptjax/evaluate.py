"""How well a model predicts a text, or chooses: python -m gptjax.evaluate out/shakespeare --text FILE

Any run, Hugging Face folder or ckpt.pt; losses are exact sums over every token, no samples of them.
"""

import itertools
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.progress import Progress

from gptjax import host
from gptjax.cli import Parser
from gptjax.config import Section, argument, option
from gptjax.data.corpora import read_text
from gptjax.data.token_files import Tokens, dtype_for
from gptjax.errors import UserError, one_line_errors
from gptjax.inference.generate import Ids
from gptjax.inference.language_model import Dtype, LanguageModel

_AT_ONCE = 64  # windows or questions scored between two steps of the progress bar


@dataclass(frozen=True)
class Arguments(Section):
    model: str = argument("a run's folder, a Hugging Face folder, the name of a model there, or nanoGPT's ckpt.pt")
    text: str | None = option(None, "file to predict: UTF-8 text, or a .bin of tokens that the model's tokenizer made")
    hellaswag: str | None = option(
        None, 'JSONL file of {"ctx": ..., "endings": [...], "label": ...}: choose the ending'
    )
    lambada: str | None = option(None, 'JSONL file of {"text": ...}: predict the last word')
    block_size: int = option(1024, "text: tokens that the model sees at once, at most its own block_size")
    stride: int | None = option(
        None, "text: tokens scored in each window, fewer give each more to go on; none: all, each window on its own"
    )
    checkpoint: Literal["best", "latest"] = option("best", "of a run: best by validation loss, or the latest")
    dtype: Dtype = option(
        "auto",
        "of activations, and of weights that no run made; int8: of weights alone; auto: float32 on CPU, else a run's "
        "own, or bfloat16",
    )
    json: bool = option(False, "print one JSON object in place of lines to read")

    def validate(self) -> None:
        self.require(self.block_size > 0, "block_size", "is not positive")
        fits = self.stride is None or 0 < self.stride <= self.block_size
        self.require(fits, "stride", f"is not in [1, block_size={self.block_size}]")


def main(argv: Sequence[str]) -> None:
    host.prepare()
    parser = Parser("python -m gptjax.evaluate", __doc__)
    parser.add_fields(Arguments())
    [arguments] = parser.parse(argv, Arguments())
    tasks = [(name, getattr(arguments, name)) for name in ("text", "hellaswag", "lambada") if getattr(arguments, name)]
    if not tasks:
        raise UserError("nothing to evaluate: pass --text FILE, --hellaswag FILE or --lambada FILE")
    for name, path in tasks:
        if not Path(path).is_file():
            raise UserError(f"{name}={path}: there is no such file")
    questions = {name: read_jsonl(Path(path), name) for name, path in tasks if name != "text"}
    model = LanguageModel.load(arguments.model, arguments.checkpoint, arguments.dtype)
    results: dict[str, Any] = {"model": model.name}
    for name, path in tasks:
        start = time.perf_counter()
        if name == "text":
            tokens = read_tokens(model, Path(path))
            result = text_loss(model, tokens, arguments.block_size, arguments.stride)
        else:
            result = {"hellaswag": hellaswag, "lambada": lambada}[name](model, questions[name])
        results[name] = {"file": path} | result | {"seconds": round(time.perf_counter() - start, 3)}
    if arguments.json:
        print(json.dumps(results))
        return
    print(f"model: {model.name}")
    for name, _ in tasks:
        print(f"{name}:")
        for key, value in results[name].items():
            print(f"  {key.replace('_', ' ')}: {value:,.5g}" if isinstance(value, float) else f"  {key}: {value}")


def read_tokens(model: LanguageModel, path: Path) -> Ids:
    """A text as the model's tokenizer reads it, behind the mark that it puts before one; or the ids of a .bin file."""
    if path.suffix == ".bin":
        tokens = Tokens([path], dtype_for(model.tokenizer.vocab_size))
        ids = np.asarray(tokens.window(0, len(tokens)), np.int32)
    else:
        ids = np.concatenate([model.tokenizer.begin, *model.tokenizer.encode_chunks(read_text(path))])
    if len(ids) < 2:
        raise UserError(f"{path} is too short: it takes two tokens, one to see and one to predict")
    if ids.max() >= model.config.vocab_size:
        raise UserError(f"{path} has token {ids.max()}; the model has {model.config.vocab_size}: another tokenizer's?")
    return ids


def text_loss(model: LanguageModel, tokens: Ids, block_size: int, stride: int | None = None) -> dict[str, Any]:
    """Loss and perplexity of all tokens but the first, which has nothing before it.

    A window has `block_size` tokens to see, or what the model can; of each but the first its last `stride` count.
    """
    block_size = min(block_size, model.config.block_size)
    stride = min(stride or block_size, block_size)
    nats, n_tokens = 0.0, len(tokens) - 1
    ends = [block_size, *range(block_size + stride, n_tokens + stride, stride)]

    def window(end: int) -> tuple[Ids, Ids]:
        first = 1 if end == block_size else end - stride + 1
        return tokens[max(end - block_size, 0) : first], tokens[first : min(end, n_tokens) + 1]

    for batch in _batches(ends, "predicting"):
        scores = model.score([window(end) for end in batch])
        nats -= sum(float(log_probs.sum(dtype=np.float64)) for log_probs, _ in scores)
    first, whole = [len(model.tokenizer.decode(part).encode()) for part in (tokens[:1], tokens)]
    n_bytes = max(1, whole - first)
    return {
        "tokens": n_tokens,
        "bytes": n_bytes,
        "nats_per_token": nats / n_tokens,
        "perplexity_per_token": _exp(nats / n_tokens),
        "perplexity_per_byte": _exp(nats / n_bytes),
        "bits_per_byte": nats / n_bytes / math.log(2),
    }


def hellaswag(model: LanguageModel, questions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How often the right ending is the likeliest, as it is and per character (lm-evaluation-harness's acc_norm)."""
    right = right_per_character = 0
    for batch in _batches(questions, "choosing"):
        pairs = [_pair(model, question["ctx"], " " + ending) for question in batch for ending in question["endings"]]
        scores = iter(model.score(pairs))
        for question in batch:
            sums = [float(next(scores)[0].sum()) for _ in question["endings"]]
            each = [total / len(ending) for total, ending in zip(sums, question["endings"], strict=True)]
            right += int(np.argmax(sums)) == int(question["label"])
            right_per_character += int(np.argmax(each)) == int(question["label"])
    n = len(questions)
    return {"questions": n, "accuracy": right / n, "accuracy_per_character": right_per_character / n}


def lambada(model: LanguageModel, questions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How often every token of the last word is the likeliest, and the perplexity of these words."""
    right, nats = 0, 0.0
    for batch in _batches(questions, "predicting"):
        parts = [question["text"].rsplit(" ", 1) for question in batch]
        for log_probs, likeliest in model.score([_pair(model, context, " " + word) for context, word in parts]):
            right += bool(likeliest.all())
            nats -= float(log_probs.sum())
    n = len(questions)
    return {"questions": n, "accuracy": right / n, "perplexity_per_word": _exp(nats / n)}


def read_jsonl(path: Path, task: str) -> list[dict[str, Any]]:
    """The questions of a file, one JSON object a line.

    Raises:
        UserError: a line is not such a question.
    """
    questions = []
    for number, line in enumerate("".join(read_text(path)).split("\n"), 1):
        if not line.strip():
            continue
        try:
            questions.append(_checked(json.loads(line), task))
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise UserError(
                f"{path}, line {number}, is no question of {task}: {type(error).__name__} {error}"
            ) from error
    if not questions:
        raise UserError(f"{path} has no questions")
    return questions


def _checked(question: dict[str, Any], task: str) -> dict[str, Any]:
    if task == "lambada":
        context, word = question["text"].strip().rsplit(" ", 1)
        return {"text": f"{context} {word}"}
    texts = [question["ctx"], *question["endings"]]
    if not isinstance(question["endings"], list) or not all(isinstance(text, str) and text for text in texts):
        raise ValueError("ctx and endings are not all texts")
    if not 0 <= int(question["label"]) < len(question["endings"]):
        raise ValueError(f"label {question['label']} is none of its endings")
    return question


def _pair(model: LanguageModel, context: str, continuation: str) -> tuple[Ids, Ids]:
    """The ids of both, encoded as one text, and cut in front to what the model can see."""
    n_context, ids = len(model.tokenizer.prompt(context)), model.tokenizer.prompt(context + continuation)
    if len(ids) - n_context > model.config.block_size:
        n, most = len(ids) - n_context, model.config.block_size
        raise UserError(
            f"{continuation[:40]!r}... has {n} tokens, and {model.name} sees {most}: leave that question out"
        )
    n_cut = max(0, len(ids) - model.config.block_size - 1)
    return ids[n_cut:n_context], ids[n_context:]


def _batches(items: Sequence[Any], what: str) -> Iterator[tuple[Any, ...]]:
    with Progress(disable=not sys.stderr.isatty(), transient=True) as bar:
        task, rest = bar.add_task(what, total=len(items)), iter(items)
        while batch := tuple(itertools.islice(rest, _AT_ONCE)):
            yield batch
            bar.advance(task, len(batch))


def _exp(nats: float) -> float | None:
    return math.exp(nats) if nats < 700 else None  # infinity is no JSON


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
