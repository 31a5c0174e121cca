"""Evaluate a model: loss and bits per byte of a text, and accuracy on HellaSwag."""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.data.corpora import read_text
from gptjax.data.token_files import Tokens, dtype_for
from gptjax.errors import UserError
from gptjax.inference.language_model import LanguageModel
from gptjax.inference.sampling import TokenIds
from gptjax.progress import track

_BATCH = 64  # windows or questions that are scored between two steps of the progress bar


def read_tokens(model: LanguageModel, path: Path) -> TokenIds:
    """The ids of a text file, after the token (if any) that the tokenizer puts before a text; or those of a .bin file.

    Raises `UserError` for fewer than two tokens, or for one that the model does not have.
    """
    if path.suffix == ".bin":
        tokens = Tokens([path], dtype_for(model.tokenizer.vocab_size))
        ids = np.asarray(tokens.window(0, len(tokens)), np.int32)
    else:
        ids = np.concatenate([model.tokenizer.begin, *model.tokenizer.encode_chunks(read_text(path))])
    if len(ids) < 2:
        raise UserError(f"{path} is too short: it needs two tokens, one to read and one to predict")
    if ids.max() >= model.config.vocab_size:
        raise UserError(f"{path} has token {ids.max()}; the model has {model.config.vocab_size}: another tokenizer's?")
    return ids


def text_loss(model: LanguageModel, tokens: TokenIds, block_size: int, stride: int | None = None) -> dict[str, Any]:
    """Loss and perplexity of all tokens but the first, which has no context.

    Windows have `block_size` input tokens, at most the model's. Every window after the first scores its last `stride`.
    """
    block_size = min(block_size, model.config.block_size)
    stride = min(stride or block_size, block_size)
    nats, n_tokens = 0.0, len(tokens) - 1
    ends = [block_size, *range(block_size + stride, n_tokens + stride, stride)]

    def window(end: int) -> tuple[TokenIds, TokenIds]:
        first = 1 if end == block_size else end - stride + 1
        return tokens[max(end - block_size, 0) : first], tokens[first : min(end, n_tokens) + 1]

    for batch in _batches(ends, "predicting"):
        scores = model.score([window(end) for end in batch])
        nats -= sum(float(log_probs.sum(dtype=np.float64)) for log_probs in scores)
    first, whole = [len(model.tokenizer.decode(part).encode()) for part in (tokens[:1], tokens)]
    n_bytes = max(1, whole - first)
    return {
        "tokens": n_tokens,
        "bytes": n_bytes,
        "nats_per_token": nats / n_tokens,
        "perplexity_per_token": math.exp(min(nats / n_tokens, 700)),  # JSON has no infinity
        "bits_per_byte": nats / n_bytes / math.log(2),
    }


def hellaswag(model: LanguageModel, questions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Accuracy of choosing the likeliest ending, by the sum of log-probabilities and by their sum per character.

    These are acc and acc_norm of lm-evaluation-harness.
    """
    correct = np.zeros(2, int)
    for batch in _batches(questions, "choosing"):
        pairs = [_pair(model, question["ctx"], " " + ending) for question in batch for ending in question["endings"]]
        scores = iter(model.score(pairs))
        for question in batch:
            sums = np.array([float(next(scores).sum()) for _ in question["endings"]])
            per_character = sums / [len(ending) for ending in question["endings"]]
            correct += [np.argmax(values) == int(question["label"]) for values in (sums, per_character)]
    accuracy, accuracy_per_character = (correct / len(questions)).tolist()
    return {"questions": len(questions), "accuracy": accuracy, "accuracy_per_character": accuracy_per_character}


def read_questions(path: Path) -> list[dict[str, Any]]:
    """The questions of a file with one JSON object a line. Raises `UserError` for a line that is not a question."""
    questions = []
    for number, line in enumerate("".join(read_text(path)).split("\n"), 1):
        if line.strip():
            try:
                questions.append(_parse(line))
            except (ValueError, KeyError, TypeError) as error:
                reason = f"{type(error).__name__} {error}"
                raise UserError(f"{path}, line {number}, is not a question of HellaSwag: {reason}") from error
    if not questions:
        raise UserError(f"{path} has no questions")
    return questions


def _parse(line: str) -> dict[str, Any]:
    question = json.loads(line)
    texts = [question["ctx"], *question["endings"]]
    if not isinstance(question["endings"], list) or not all(isinstance(text, str) and text for text in texts):
        raise ValueError("ctx and endings must be texts that are not empty")
    if not 0 <= int(question["label"]) < len(question["endings"]):
        raise ValueError(f"label {question['label']} is not the index of an ending")
    return question


def _pair(model: LanguageModel, context: str, continuation: str) -> tuple[TokenIds, TokenIds]:
    """The ids of both, encoded as one text."""
    before, ids = [model.tokenizer.prompt(text, special=False) for text in (context, context + continuation)]
    n_context = len(before)
    n, most = len(ids) - n_context, model.config.block_size
    if n > most:
        raise UserError(f"{continuation[:40]!r}... has {n} tokens, and {model.name} sees {most}: remove that question")
    return ids[:n_context], ids[n_context:]


def _batches(items: Sequence[Any], description: str) -> Iterator[Sequence[Any]]:
    batches = (items[i : i + _BATCH] for i in range(0, len(items), _BATCH))
    return track(batches, description, len(items), len)
