"""What clients and networks do wrong: no slot is leaked, no memory is kept, and other clients are served."""

import concurrent.futures
import contextlib
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import openai
import pytest

from gptjax import serve
from gptjax.errors import UserError
from gptjax.serving import api, server

ROOT = Path(__file__).parents[2]
LONG = {"model": "base", "prompt": "abc", "max_tokens": 4096, "stream": True}


def raw(port, body, length=None, read=0):
    """A connection on which a request is sent whose answer nobody reads, with a small buffer for it."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", port))
    data = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {length or len(data)}\r\n\r\n".encode() + data)
    return connection


def is_served(running):
    return httpx.post(
        f"{running.url}/v1/completions", json={"model": "base", "prompt": "abc", "max_tokens": 2}, timeout=60
    ).is_success


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def resident():
    """Bytes of this process's memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot(running, stream):
    before = running.metric("gptjax_requests_total", status="499")
    connections = [raw(running.port, LONG | {"stream": stream}) for _ in range(3)]
    wait_for(lambda: running.busy == 3)
    if stream:
        for connection in connections:
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
    drawn = running.served[0].engine.n_drawn
    for connection in connections:
        connection.close()
    running.wait_until_idle(20)
    wait_for(lambda: running.metric("gptjax_requests_total", status="499") == before + 3)
    assert running.served[0].engine.n_drawn < drawn + 3 * 4000, "the answers were drawn to their ends"
    assert is_served(running)


def test_a_client_that_leaves_the_queue_gets_no_slot(start):
    running = start(slots=1)
    first, second = raw(running.port, LONG), None
    wait_for(lambda: running.busy == 1)
    second = raw(running.port, LONG)
    wait_for(lambda: running.busy == 2)
    second.close()
    wait_for(lambda: running.busy == 1)
    first.close()
    running.wait_until_idle()


def test_half_open_connections_are_closed(start, monkeypatch):
    """Nothing sent, half of the headers, half of a body; meanwhile others are served."""
    monkeypatch.setattr(server, "HEADER_SECONDS", 0.5)
    monkeypatch.setattr(api, "BODY_SECONDS", 0.5)
    running = start()
    with contextlib.ExitStack() as stack:
        silent = stack.enter_context(socket.create_connection(("127.0.0.1", running.port)))
        begun = stack.enter_context(socket.create_connection(("127.0.0.1", running.port)))
        begun.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: 127.0")
        body = stack.enter_context(raw(running.port, LONG, length=5000))
        assert is_served(running)
        for connection, answer in ((silent, b""), (begun, b""), (body, b"HTTP/1.1 408")):
            connection.settimeout(20)
            assert connection.recv(12) == answer
    assert not running.busy


def test_a_client_that_does_not_read_holds_no_slot_and_is_dropped(start, monkeypatch):
    monkeypatch.setattr(api, "SENDING_SECONDS", 1.0)
    running = start()
    connections = [raw(running.port, LONG | {"logprobs": 20, "max_tokens": 4000}) for _ in range(3)]
    wait_for(lambda: running.busy == 3)
    assert is_served(running)
    wait_for(lambda: running.metric("gptjax_requests_total", status="499") == 3, 120)
    running.wait_until_idle()
    for connection in connections:
        connection.settimeout(20)
        received = b""
        with connection, contextlib.suppress(ConnectionResetError):
            while part := connection.recv(1 << 16):
                received += part
        assert received.startswith(b"HTTP/1.1 200") and not received.endswith(b"0\r\n\r\n")


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_of_100_mb_is_refused_and_not_kept(running, announced):
    parts = [b" " * (1 << 20)] * 100
    headers = {"Content-Type": "application/json"}
    if announced:
        headers["Content-Length"] = str(100 << 20)
    before = resident()
    response = httpx.post(f"{running.url}/v1/completions", content=iter(parts), headers=headers, timeout=60)
    assert response.status_code == 413
    assert response.json()["error"]["message"] == "the body is larger than 1,048,576 bytes"
    assert resident() - before < 30 << 20
    assert is_served(running)


def test_what_is_not_http_is_refused(running):
    for data in (b"\x16\x03\x01\x02\x00\x01\x00", b"GET / HTTP/9.9\r\n\r\n", b"\r\n" * 10, b"A" * 100_000):
        with socket.create_connection(("127.0.0.1", running.port)) as connection:
            connection.settimeout(30)
            with contextlib.suppress(ConnectionError):
                connection.sendall(data + b"\r\n\r\n")
                connection.recv(1000)
    assert is_served(running)


def load(running, n, seed):
    """`n` requests from 8 clients: short and long, streamed and whole, a fifth of them left in the middle."""

    def one(i):
        rng = random.Random(seed + i)
        options = {"model": rng.choice(["base", "instruct"]), "prompt": "abc why? " * rng.randrange(1, 9)}
        options |= {
            "max_tokens": rng.randrange(1, 30),
            "temperature": rng.choice([0, 1]),
            "logprobs": rng.choice([None, 5]),
        }
        if rng.random() < 0.2:
            stream = client.completions.create(**options | {"max_tokens": 4000}, stream=True)
            next(iter(stream))
            stream.close()
        elif rng.random() < 0.5:
            list(client.completions.create(**options, stream=True))
        else:
            client.completions.create(**options)

    with running.client() as client, concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(n)))
    running.wait_until_idle()


@pytest.mark.parametrize("n", [100, pytest.param(10_000, marks=pytest.mark.endurance)])
def test_many_requests_leak_no_slot_and_no_memory(start, n):
    running = start(names=("base", "instruct"))
    load(running, max(100, n // 20), seed=0)
    before = resident()
    load(running, n, seed=10**6)
    assert resident() - before < 40 << 20
    assert all(served.engine.n_failures == 0 for served in running.served)
    wait_for(lambda: len(running.server.server_state.tasks) <= 1)


@pytest.fixture
def command(base, tmp_path):
    """`python -m gptjax.serve` in a process of its own, and a client of it."""
    processes, clients = [], []

    def start(*options):
        environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        process = subprocess.Popen(
            [sys.executable, "-m", "gptjax.serve", str(base), "--port", "0", *map(str, options)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        )  # fmt: skip
        processes.append(process)
        line = process.stdout.readline()
        assert line.startswith("serving base at http://127.0.0.1:"), process.stderr.read()
        clients.append(openai.OpenAI(base_url=f"{line.split()[-1]}/v1", api_key="none", max_retries=0, timeout=60))
        return process, clients[-1]

    yield start
    for client in clients:
        client.close()
    for process in processes:
        process.kill()
        process.communicate()


def test_sigterm_lets_a_stream_end_and_takes_no_more(command):
    process, client = command()
    stream = iter(client.completions.create(**LONG | {"max_tokens": 3000}))
    n_seen = bool(next(stream).choices[0].text)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    with pytest.raises(openai.APIConnectionError):
        client.models.list()
    *_, last = stream
    assert last.choices[0].finish_reason == "length" and n_seen
    assert process.wait(30) == 0
    assert len(process.stderr.read().splitlines()) == 1  # "loaded ..."


def test_after_the_grace_period_streams_end_with_an_error(command):
    process, client = command("--grace", 0.5, "--max_new_tokens", 10**6)
    stream = iter(client.completions.create(**LONG | {"max_tokens": 10**6}))
    next(stream)
    process.send_signal(signal.SIGTERM)
    with pytest.raises(openai.APIError, match="stopped before the answer was complete"):
        list(stream)
    assert process.wait(30) == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--host 0.0.0.0", "others can reach it; set a key with --api_key or $GPTJAX_API_KEY"),
        ("--port 65536", "port=65536 is not in"),
        ("--slots 0", "slots=0 is not in [1, 1,024]"),
        ("--timeout 0", "timeout=0.0 is not in"),
        ("--api_key=", "api_key='' is empty"),
        ("--api_key é", "has characters that no header holds"),
        ("--host 203.0.113.7 --api_key a", "cannot listen at 203.0.113.7 port 8000"),
        ("--port 0", "'nowhere/at/all' does not exist"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(options, words, monkeypatch):
    monkeypatch.delenv("GPTJAX_API_KEY", raising=False)
    with pytest.raises(UserError) as raised:
        serve.main(["nowhere/at/all", *options.split()])
    assert words in str(raised.value) and "\n" not in str(raised.value)


def test_a_port_in_use_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot listen at 127.0.0.1 port {port}.*pass another --port"):
            serve.main(["nowhere/at/all", "--port", str(port)])


def test_a_key_may_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("GPTJAX_API_KEY", "secret")
    assert serve.Arguments(models=("a",), host="0.0.0.0").key == "secret"
    assert serve.Arguments(models=("a",), host="0.0.0.0", api_key="other").key == "other"
