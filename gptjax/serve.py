"""Serve models over OpenAI's HTTP API, with a page to talk to them: python -m gptjax.serve out/shakespeare smollm2

Requests share a batch of slots, and each is answered as if it were alone. The page is at the address that is printed.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gptjax import host
from gptjax.__main__ import run_command
from gptjax.cli import CHECKPOINT_HELP, DTYPE_HELP, Dtype, Which, parse_arguments, program
from gptjax.config import MODEL_HELP, Section, argument, option
from gptjax.errors import UserError

# What needs JAX is imported where it is used: --help and a mistake in an option do not wait for it.

KEY_VARIABLE = "GPTJAX_API_KEY"
MAX_SLOTS = 1024


@dataclass(frozen=True)
class Arguments(Section):
    """The options of `gptjax serve`."""

    models: tuple[str, ...] = argument(f"each is {MODEL_HELP}", many=True)
    port: int = option(8000, "port to listen at; 0: any that is free")
    host: str = option("127.0.0.1", "address to listen at, such as 0.0.0.0 for all of this machine; needs a key")
    api_key: str | None = option(
        None, f"clients have to send this key as a bearer token; none: ${KEY_VARIABLE}, or no key", prose=True
    )
    slots: int = option(8, "requests that a model answers at once")
    queue: int = option(64, "requests that may wait for a slot; a further one gets status 429")
    max_prompt_tokens: int | None = option(None, "the most tokens in a prompt; none: the model's context")
    max_new_tokens: int = option(4096, "the most tokens in an answer")
    max_body: int = option(1 << 20, "the most bytes in a request")
    timeout: float = option(300.0, "seconds that a request may take, with its time in the queue")
    grace: float = option(30.0, "seconds that running requests have to end, once the server is told to stop")
    checkpoint: Which = option("best", CHECKPOINT_HELP)
    dtype: Dtype = option("auto", DTYPE_HELP)

    def validate(self) -> None:
        self.require_within(0, 65535, "port")
        self.require_within(1, MAX_SLOTS, "slots")
        self.require_within(0, 1_000_000, "queue")
        self.require_within(1, 2**30, "max_prompt_tokens max_new_tokens max_body")
        for name in ("timeout", "grace"):
            self.require(0 < getattr(self, name) <= 1e6, name, "is not in (0, 1000000]")
        self.require(self.api_key is None or self.api_key.isascii(), "api_key", "has characters that no header holds")
        self.require(self.api_key != "", "api_key", "is empty")

    @property
    def key(self) -> str | None:
        """The key that clients have to send. Raises `UserError` if others than this machine are served without one."""
        key = self.api_key or os.environ.get(KEY_VARIABLE) or None
        if key is None and not self.local:
            raise UserError(f"host={self.host}: others can reach it; set a key with --api_key or ${KEY_VARIABLE}")
        return key

    @property
    def local(self) -> bool:
        """Whether this machine alone can reach the address."""
        return self.host in ("127.0.0.1", "localhost", "::1")


def main(argv: Sequence[str]) -> None:
    """Serve the models until a signal ends the server."""
    arguments = parse_arguments(program("serve"), __doc__, argv, Arguments())
    key = arguments.key
    from gptjax.inference.language_model import LanguageModel
    from gptjax.progress import working

    try:
        from gptjax.serving.api import create_app
        from gptjax.serving.engine import Engine
        from gptjax.serving.served import Limits, Served
        from gptjax.serving.server import Server, listen, warm_up
    except ModuleNotFoundError as error:
        raise UserError(f"serving needs {error.name}: pip install -e '.[serve]'") from error
    host.prepare()
    listening = listen(arguments.host, arguments.port)
    models: list[Served] = []
    for path in arguments.models:
        model = LanguageModel.load(path, arguments.checkpoint, arguments.dtype).for_sampling()
        unique = sum(Path(other).name == Path(path).name for other in arguments.models) == 1
        name = model.name if unique else path
        models.append(Served(name, model, Engine(model, arguments.slots, arguments.queue), (path,)))
    limits = Limits(arguments.max_body, arguments.max_prompt_tokens, arguments.max_new_tokens, arguments.timeout)
    server = Server(create_app(models, limits, key, arguments.local), models, arguments.grace)
    with working("compiling"):
        warm_up(models)
    shown = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
    names = ", ".join(served.name for served in models)
    print(f"serving {names} at http://{shown}:{listening.getsockname()[1]}", flush=True)
    server.serve_at(listening)


if __name__ == "__main__":
    run_command("serve")
