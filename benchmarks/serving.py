"""The server under load, against the same requests one at a time: python -m benchmarks.serving --model smollm2 [--json]

200 requests from 32 clients, with prompts and answers of different lengths and with different rules and seeds. Every
answer has to equal the one that the same server gives to the request alone. Printed are milliseconds a token, and the
median and the 95th percentile of the time to the first token, under load and alone.
"""

import json
import os
import random
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx

from benchmarks.paired import ROOT, Result, parser, show

WORDS = "the king and his sword of the night shall speak to a lady in Rome, for honour is no word but love".split()


@dataclass(frozen=True)
class Done:
    """One answer: its text, its number of tokens, and the seconds to its first token."""

    text: str
    n_tokens: int
    first: float


def request(i: int, model: str, longest: int) -> dict[str, Any]:
    rng = random.Random(i)
    rules = [{"temperature": 0}, {"temperature": 0.8, "top_k": 50}, {"temperature": 1, "top_p": 0.9}, {"min_p": 0.05}]
    prompt = " ".join(rng.choices(WORDS, k=rng.randint(1, 60)))
    fixed = {"model": model, "prompt": prompt, "seed": i, "stream": True, "stream_options": {"include_usage": True}}
    return fixed | {"max_tokens": rng.randint(longest // 4, longest)} | rng.choice(rules)


def ask(client: httpx.Client, body: dict[str, Any]) -> Done:
    """Read one stream. A failed request ends the benchmark."""
    start, first, text, n_tokens = time.perf_counter(), 0.0, "", 0
    with client.stream("POST", "/v1/completions", json=body) as response:
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line[6:])
            first = first or time.perf_counter() - start
            text += "".join(choice["text"] for choice in chunk["choices"])
            n_tokens = (chunk.get("usage") or {}).get("completion_tokens", n_tokens)
    if not n_tokens:
        raise SystemExit(f"no answer to {body}: {response.status_code} {text}")
    return Done(text, n_tokens, first)


def ask_all(url: str, bodies: list[dict[str, Any]], n_clients: int) -> tuple[list[Done], float]:
    """The answers to all requests from so many clients at once, and the seconds that they took."""
    limits = httpx.Limits(max_connections=n_clients, max_keepalive_connections=n_clients)
    with httpx.Client(base_url=url, timeout=600, limits=limits) as client, ThreadPoolExecutor(n_clients) as pool:
        start = time.perf_counter()
        answers = list(pool.map(lambda body: ask(client, body), bodies))
        return answers, time.perf_counter() - start


def main() -> None:
    options = parser(__doc__, ("load",))
    options.add_argument("--model", default="smollm2")
    options.add_argument("--requests", type=int, default=200)
    options.add_argument("--clients", type=int, default=32)
    options.add_argument("--slots", type=int, default=8)
    options.add_argument("--tokens", type=int, default=48, help="in the longest answer")
    arguments = options.parse_args()
    command = [sys.executable, "-m", "gptjax.serve", arguments.model, "--port", "0", "--slots", str(arguments.slots)]
    process = subprocess.Popen(
        [*command, "--queue", str(arguments.requests), "--timeout", "100000"],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    try:
        line = process.stdout.readline()
        url = line.split()[-1]
        name = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
        bodies = [request(i, name, arguments.tokens) for i in range(arguments.requests)]
        ask_all(url, bodies[: arguments.slots], arguments.slots)  # compiles what is not compiled yet
        loaded, loaded_seconds = ask_all(url, bodies, arguments.clients)
        alone, alone_seconds = ask_all(url, bodies, 1)
    finally:
        process.terminate()
        process.wait(60)
    wrong = sum(one.text != other.text for one, other in zip(loaded, alone, strict=True))
    if wrong:
        raise SystemExit(f"{wrong} of {len(bodies)} answers differ from those of the same request alone")
    n_tokens = sum(done.n_tokens for done in loaded)
    work = f"serving {name}, {len(bodies)} requests, {arguments.slots} slots, {arguments.clients} clients against 1"
    firsts = [sorted(1e3 * done.first for done in answers) for answers in (loaded, alone)]
    results = [Result(work, 1e3 * loaded_seconds / n_tokens, 1e3 * alone_seconds / n_tokens, "ms a token")]
    results += [
        Result(f"{work}: first token, median", *(statistics.median(each) for each in firsts), "ms"),
        Result(f"{work}: first token, 95%", *(each[int(0.95 * len(each))] for each in firsts), "ms"),
    ]
    show(results, arguments)


if __name__ == "__main__":
    main()
