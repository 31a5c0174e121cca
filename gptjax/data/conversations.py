"""Read conversations from JSON lines or from Shakespeare's plays, and make token files of them.

A line is an object with OpenAI's "messages", ShareGPT's "conversations", or a "prompt" and a "response".
"""

import gzip
import itertools
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gptjax.chat.template import (
    DEFAULT_TEMPLATE,
    DEFAULT_TOKENS,
    Rendered,
    find_template,
    render_examples,
    special_tokens,
)
from gptjax.chat.tokens import Mask, Message, TokenIds, encode_example, text_of
from gptjax.config import DataConfig
from gptjax.data.corpora import download, plays, read_text, speeches
from gptjax.data.sources import chosen, files_below, format_of
from gptjax.errors import UserError
from gptjax.files import read_json
from gptjax.tokenizer import Tokenizer

DIALOGUES = "shakespeare-dialogues"
# Files that a run of conversations has beside tokenizer.json, as a Hugging Face folder has them.
CHAT_FILES = ("chat_template.jinja", "tokenizer_config.json", "generation_config.json")
_BATCH = 1000  # conversations that one process renders
_SHAREGPT = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_ROLES = ("system", "developer", "user", "assistant", "tool")
_FORMATS = "jsonl", "ndjson", "json", "jsonl.gz", "ndjson.gz", "json.gz"


class Conversations(NamedTuple):
    """Conversations in `files`, which can be read several times; each comes with its place, for errors."""

    name: str
    identity: str
    files: tuple[Path, ...]
    read_file: Callable[[Path], Iterator[tuple[str, list[Message]]]]

    def all(self) -> Iterator[tuple[str, list[Message]]]:
        """Yield all conversations, in the order of the files."""
        for path in self.files:
            yield from self.read_file(path)


class ChatFormat(NamedTuple):
    """How conversations become tokens: a chat template, its variables, and a tokenizer that has its special tokens."""

    tokenizer: Tokenizer
    template: str
    variables: dict[str, str]


def open_conversations(config: DataConfig) -> Conversations:
    """Return the conversations that `config.source` names, after downloading them if it is a URL."""
    source = config.source
    if source == DIALOGUES:
        return Conversations(source, source, plays(), _dialogues)
    if source.startswith(("http://", "https://")):
        name = source.rpartition("/")[2].partition("?")[0][-100:] or "page"
        return Conversations(name, source, (download(source, name, config),), read_conversations)
    path = Path(source).resolve()
    if not source or not path.exists():
        fix = f"pass JSON lines of messages, or {DIALOGUES}, as --data.source"
        raise UserError(f"file of conversations {source!r} does not exist: {fix}")
    if path.is_file():
        return Conversations(path.name.partition(".")[0], str(path), (path,), read_conversations)
    names = chosen(files_below(path), lambda name: format_of(name) in _FORMATS, str(path))
    if not names:
        raise UserError(f"{path} has no .jsonl or .json files of conversations: correct --data.source")
    return Conversations(path.name, str(path), tuple(sorted(path / name for name in names)), read_conversations)


def read_conversations(path: Path) -> Iterator[tuple[str, list[Message]]]:
    """Yield the conversations of a file with one JSON object a line, or with one array of objects.

    Raises `UserError` with file, line and message for one that is none.
    """
    lines = _lines(path)
    first = next(lines, "")
    if not first.lstrip().startswith("["):
        numbered = enumerate([first, *lines] if first else lines, 1)
        objects = ((f"{path}, line {i}", _parsed(line, f"{path}, line {i}")) for i, line in numbered if line.strip())
    else:
        values = _parsed(first + "\n" + "\n".join(lines), str(path))
        objects = ((f"{path}, conversation {i}", value) for i, value in enumerate(values, 1))
    for place, value in objects:
        yield place, parse(value, place)


def parse(value: Any, place: str) -> list[Message]:
    """Return the messages of a JSON value, up to the assistant's last. Raises `UserError` if it is no conversation."""
    if not isinstance(value, dict):
        raise UserError(f"{place} is not a JSON object: write one conversation a line, or one array of them")
    if "messages" in value:
        turns = _turns(value["messages"], "role", "content", place)
    elif "conversations" in value:
        turns = [
            (_SHAREGPT.get(str(role), role), text)
            for role, text in _turns(value["conversations"], "from", "value", place)
        ]
    elif "prompt" in value and "response" in value:
        turns = [("user", value["prompt"]), ("assistant", value["response"])]
    else:
        raise UserError(f'{place} has neither "messages" nor "conversations" nor "prompt" and "response"')
    messages: list[Message] = []
    for number, (role, content) in enumerate(turns, 1):
        here = f"{place}, message {number}"
        if role not in _ROLES:
            known = ", ".join(dict.fromkeys([*_ROLES, *_SHAREGPT] if "conversations" in value else _ROLES))
            raise UserError(f"{here}: the role {str(role)[:40]!r} is none of {known}: rename it or remove the message")
        if (text := text_of(content)) is None:
            raise UserError(f"{here}: its content is not a text, nor a list of parts of the type text")
        if role == "assistant" and not text.strip():
            raise UserError(f"{here}: the assistant's turn is empty; write an answer or remove the conversation")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise UserError(f"{here}: its content is no Unicode, as it has half of a surrogate pair")
        messages.append({"role": role, "content": text})
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if not messages:
        raise UserError(f"{place} has no message of the assistant to learn")
    return messages


def chat_format(config: DataConfig, conversations: Conversations, n_train: int) -> ChatFormat:
    """Return the tokenizer and the template of `config.tokenizer`; ChatML where it has no template.

    Special tokens of ChatML that the tokenizer lacks are added to it. A tokenizer of characters is made of all
    conversations as ChatML writes them, a BPE of the first `n_train`.
    """
    if config.tokenizer in ("char", "bpe"):
        texts = _texts(conversations)
        if config.tokenizer == "char":
            tokenizer = Tokenizer.characters(set(itertools.chain.from_iterable(texts)))
        else:
            tokenizer = Tokenizer.train_bpe(itertools.islice(texts, n_train), config.vocab_size)
        return ChatFormat(tokenizer.with_special_tokens(DEFAULT_TOKENS), DEFAULT_TEMPLATE, {})
    tokenizer, folder = Tokenizer.from_name_or_path(config.tokenizer), settings_folder(config.tokenizer)
    variables = special_tokens(folder) if folder else {}
    if folder and (template := find_template(folder)) is not None:
        return ChatFormat(tokenizer, template, variables)
    return ChatFormat(tokenizer.with_special_tokens(DEFAULT_TOKENS), DEFAULT_TEMPLATE, variables)


def settings_folder(tokenizer: str) -> Path | None:
    """Return the folder of a tokenizer's template and settings; `None` for a tokenizer that is no file."""
    if tokenizer in ("char", "bpe", "gpt2"):
        return None
    return Path(tokenizer) if Path(tokenizer).is_dir() else Path(tokenizer).parent


def encode(chat: ChatFormat, conversations: Iterable[tuple[str, list[Message]]]) -> Iterator[tuple[TokenIds, Mask]]:
    """Yield the ids of each conversation, and which of them are the assistant's.

    Raises `UserError`, with its place, for a conversation that the template rejects or writes without an answer.
    """
    ends = [name for name, is_special in chat.tokenizer.added_tokens.items() if is_special]
    for place, messages, rendered in _rendered(conversations, chat.template, chat.variables, ends):

        def render(each: Sequence[Message], messages: Any = messages, rendered: Rendered = rendered) -> Rendered:
            return rendered if each is messages else _render_one(chat, each, ends)

        try:
            ids, mask_T = encode_example(chat.tokenizer, chat.template, render, messages)
        except UserError as error:
            raise UserError(f"{place}: {error}") from error
        mask_T[:1] = False  # nothing precedes it
        if not mask_T.any():
            raise UserError(f"{place}: the chat template writes no text of the assistant, so there is nothing to learn")
        yield ids, mask_T


def side_files(chat: ChatFormat, folder: Path | None, example: tuple[TokenIds, Mask]) -> dict[str, str]:
    """Return the texts of CHAT_FILES: the template, the settings in `folder`, and the tokens that end an answer.

    These are those of the folder and the last special token of an example's answers.
    """
    ids, mask_T = example
    names = {chat.tokenizer.token_id(name): name for name, special in chat.tokenizer.added_tokens.items() if special}
    last = [token for token in ids[mask_T].tolist() if token in names][-1:]
    files = ("config.json", *CHAT_FILES[1:])
    values = {name: read_json(folder / name, missing_ok=True) if folder else {} for name in files}
    stops = values["generation_config.json"].get("eos_token_id", values["config.json"].get("eos_token_id"))
    stops = [stops] if isinstance(stops, int) else stops or []
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if last:
        settings["eos_token"] = names[last[0]]
    settings |= {name: value for name, value in values["tokenizer_config.json"].items() if name != "chat_template"}
    rules = values["generation_config.json"] | {"eos_token_id": sorted({*stops, *last})}
    return {
        "chat_template.jinja": chat.template,
        "tokenizer_config.json": json.dumps(settings, indent=2) + "\n",
        "generation_config.json": json.dumps(rules, indent=2) + "\n",
    }


def _rendered(
    conversations: Iterable[tuple[str, list[Message]]], template: str, variables: dict[str, str], ends: list[str]
) -> Iterator[tuple[str, list[Message], Rendered]]:
    """Yield the conversations with their texts. Raises `UserError`, with its place, where the template fails."""
    remaining = iter(conversations)
    while batch := list(itertools.islice(remaining, _BATCH)):
        texts = render_examples(template, [messages for _, messages in batch], variables, ends)
        for (place, messages), rendered in zip(batch, texts, strict=True):
            if isinstance(rendered, UserError):
                raise UserError(f"{place}: {rendered}") from rendered
            yield place, messages, rendered


def _render_one(chat: ChatFormat, messages: Sequence[Message], ends: list[str]) -> Rendered:
    [rendered] = render_examples(chat.template, [messages], chat.variables, ends)
    if isinstance(rendered, UserError):
        raise rendered
    return rendered


def _texts(conversations: Conversations) -> Iterator[str]:
    """Yield each conversation as ChatML writes it, without the special tokens."""
    for _, messages in conversations.all():
        yield "".join(f"{message['role']}\n{message['content']}\n" for message in messages)


def _turns(values: Any, role: str, content: str, place: str) -> list[tuple[Any, Any]]:
    if not isinstance(values, list) or not values:
        raise UserError(f"{place} has no list of messages")
    for number, message in enumerate(values, 1):
        for name in (role, content):
            if not isinstance(message, dict) or name not in message:
                raise UserError(f'{place}, message {number} has no "{name}": add it or remove the conversation')
    return [(message[role], message[content]) for message in values]


def _lines(path: Path) -> Iterator[str]:
    """Yield the lines of a text that may be compressed by gzip."""
    if path.suffix == ".gz":
        try:
            with gzip.open(path, "rt", encoding="utf-8-sig") as file:
                yield from (line.rstrip("\n") for line in file)
        except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
            raise UserError(f"{path} is not UTF-8 text compressed by gzip, or is damaged: {error}") from error
        return
    pending = ""
    for chunk in read_text(path):
        *lines, pending = (pending + chunk).split("\n")
        yield from lines
    if pending:
        yield pending


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        fix = "write one conversation a line, or one array of them"
        raise UserError(f"{place} is not JSON ({error}): {fix}") from error


def _dialogues(path: Path) -> Iterator[tuple[str, list[Message]]]:
    """Yield from a play each speech with the next speaker's reply, which may not be in another scene."""
    found = speeches(path.read_text(encoding="utf-8"))
    for number, (speech, reply) in enumerate(itertools.pairwise(found), 1):
        if speech.scene == reply.scene and speech.speaker != reply.speaker:
            turns = (("user", speech), ("assistant", reply))
            messages = [{"role": role, "content": "\n".join(each.lines)} for role, each in turns]
            yield f"{path}, speech {number}", messages
