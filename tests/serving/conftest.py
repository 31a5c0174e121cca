"""Small models to serve: one that continues texts and one that chats, with an engine for each."""

import json
import shutil
import signal
import socket
import threading
import time

import httpx
import jax.numpy as jnp
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from gptjax.chat import sandbox
from gptjax.chat import template as chat
from gptjax.config import ModelConfig
from gptjax.hub.export import export
from gptjax.inference.language_model import LanguageModel
from gptjax.serving.api import create_app
from gptjax.serving.engine import Engine
from gptjax.serving.served import Limits, Served
from gptjax.serving.server import Server, listen, warm_up
from gptjax.tokenizer import Tokenizer

TEMPLATE = "{% for message in messages %}<{{ message.role[0] }}>{{ message.content }}\n{% endfor %}<a>"
BLOCK = 160  # of tokens, three chunks at most


@pytest.fixture(scope="session")
def base(tmp_path_factory, scramble):
    """A folder with a model that attends far back and does not soon repeat itself."""
    folder = tmp_path_factory.mktemp("models") / "base"
    folder.mkdir()
    tokenizer = Tokenizer.train_bpe(["abc, abc why? be that the is to be " * 9], 280)
    sizes = {"vocab_size": tokenizer.vocab_size, "block_size": BLOCK, "n_layer": 1, "n_head": 2, "n_embd": 32}
    config = ModelConfig(**sizes, bias=True, tied_head=False, dtype="float32")
    params = scramble(config)
    for name, factor in (("query", 4), ("key", 4), ("out", 3)):
        params["layers"]["attention"][name]["kernel"] *= factor
    params["position_embedding"] *= 2
    params["head"] = jnp.asarray(params["head"]) * 3
    export(folder, config, params, "float32")
    # Another name of the only special token, so that it is none that ends an answer.
    (folder / "tokenizer.json").write_text(tokenizer.to_json().replace("<|endoftext|>", "<|other|>"))
    return folder


@pytest.fixture(scope="session")
def instruct(base):
    """The same with a chat template and a run's losses."""
    folder = base.with_name("instruct")
    shutil.copytree(base, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    columns = "step,tokens,seconds,train_loss,val_loss,grad_norm,learning_rate,tokens_per_second"
    (folder / "metrics.csv").write_text(f"{columns}\n10,80,1,3.6,3.5,1,1,9\n20,160,2,3.1,3.0,1,1,9\n")
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.9, "top_p": 0.95}))
    return folder


@pytest.fixture(scope="session")
def models(base, instruct):
    return [LanguageModel.load(str(folder)).for_sampling() for folder in (base, instruct)]


@pytest.fixture(autouse=True)
def templates_in_this_process(monkeypatch):
    """For time; test_chat_template.py has the templates' process."""
    monkeypatch.setattr(chat, "render", lambda template, messages, _: sandbox.text(template, {"messages": messages}))


class Running:
    """A server in a thread of this process, as `python -m gptjax.serve` has one in its main thread."""

    def __init__(self, models, limits=None, token=None, slots=4, queue=32, grace=5.0, local=True):
        self.served = [Served(m.name, m, Engine(m, slots, queue), (str(m.folder),)) for m in models]
        self.app = create_app(self.served, limits or Limits(), token, local)
        self.server = Server(self.app, self.served, grace)
        listening = listen("127.0.0.1", 0)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)  # so that unread answers are noticed
        self.port = listening.getsockname()[1]
        self.url, self._clients = f"http://127.0.0.1:{self.port}", []
        warm_up(self.served)
        self._thread = threading.Thread(target=self.server.serve_at, args=(listening,), daemon=True)
        self._thread.start()
        while not self.server.started:
            time.sleep(0.01)

    def client(self, key="none", **options):
        client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=120, **options)
        self._clients.append(client)
        return client

    def metric(self, name, **labels):
        """The sum of a metric's values with these labels."""
        families = text_string_to_metric_families(httpx.get(f"{self.url}/metrics").text)
        samples = [sample for family in families for sample in family.samples if sample.name == name]
        return sum(s.value for s in samples if labels.items() <= s.labels.items())

    @property
    def busy(self):
        return sum(served.engine.n_in_use + served.engine.n_waiting for served in self.served)

    def wait_until_idle(self, seconds=60):
        end = time.monotonic() + seconds
        while self.busy and time.monotonic() < end:
            time.sleep(0.01)
        assert not self.busy, "a slot is leaked"

    def stop(self):
        self.server.handle_exit(signal.SIGTERM, None)
        self._thread.join(60)
        assert not self._thread.is_alive()
        for client in self._clients:  # or a later test would get the warning about their sockets
            client.close()


@pytest.fixture(scope="session")
def running(models):
    """One server for tests that leave it as it is, with both models."""
    server = Running(models)
    yield server
    server.wait_until_idle()
    server.stop()
    assert all(served.engine.n_failures == 0 for served in server.served)


@pytest.fixture
def start(models):
    """Starts a server with options of its own, which is stopped at the end of the test."""
    servers = []

    def start(names=("base",), **options):
        servers.append(Running([model for model in models if model.name in names], **options))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()
