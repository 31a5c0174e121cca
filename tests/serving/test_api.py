"""OpenAI's API by its own Python client: answers are those of sample.py, and each mistake has its status and reason."""

import concurrent.futures
import json
import math
import time

import httpx
import numpy as np
import openai
import pytest

from gptjax.chat.template import Renderer
from gptjax.inference.sampling import Sampling
from gptjax.serving.served import Limits

MESSAGES = [{"role": "system", "content": "be that"}, {"role": "user", "content": "abc, why?"}]


@pytest.fixture(scope="module")
def client(running):
    with running.client() as client:
        yield client


def expected(model, ids, n, sampling, seed=0, stop=()):
    *_, [answer] = model.answer([np.asarray(ids, np.int32)], n, sampling, [seed], stop)
    return answer


def test_the_models_are_listed(client, base):
    assert [model.id for model in client.models.list()] == ["base", "instruct"]
    assert client.models.retrieve("instruct").owned_by == "gptjax"
    assert client.models.retrieve(str(base)).id == "base"
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-5'; this server has base, instruct"):
        client.models.retrieve("gpt-5")


def test_a_completion_is_that_of_sample(client, models):
    """Seeded and greedy; without rules those of sample.py hold, with its default of 200 for top_k."""
    ids = models[0].tokenizer.prompt("abc why", special=False)
    for rules, sampling in (
        ({"temperature": 0}, Sampling(temperature=0.0)),
        ({}, Sampling(temperature=0.8, top_k=200)),
        ({"temperature": 1.2, "top_p": 0.8, "extra_body": {"top_k": 30, "min_p": 0.02, "repetition_penalty": 1.2}},
         Sampling(temperature=1.2, top_p=0.8, top_k=30, min_p=0.02, repetition_penalty=1.2)),
    ):  # fmt: skip
        answer = client.completions.create(model="base", prompt="abc why", max_tokens=40, seed=5, **rules)
        reference = expected(models[0], ids, 40, sampling, 5)
        assert answer.choices[0].text == reference.text
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage.prompt_tokens == len(ids) and answer.usage.completion_tokens == 40
    tokens = client.completions.create(model="base", prompt=ids.tolist(), max_tokens=40, seed=5, **rules)
    assert tokens.choices[0].text == answer.choices[0].text


def test_a_chat_is_that_of_sample_with_its_makers_rules(client, models):
    answer = client.chat.completions.create(model="instruct", messages=MESSAGES, max_tokens=30, seed=3)
    ids = models[1].chat_prompt(MESSAGES)
    reference = expected(models[1], ids, 30, models[1].sampling(), 3)
    assert models[1].sampling() == Sampling(temperature=0.9, top_p=0.95)
    assert answer.choices[0].message.content == reference.text and answer.choices[0].message.role == "assistant"
    assert answer.usage.prompt_tokens == len(ids)
    parts = [{"role": "developer", "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "that"}]}]
    again = client.chat.completions.create(model="instruct", messages=parts + MESSAGES[1:], max_tokens=30, seed=3)
    assert again.choices[0].message.content == reference.text


@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_joins_to_the_whole_answer(client, n):
    options = {"model": "instruct", "messages": MESSAGES, "max_tokens": 40, "seed": 8, "n": n, "logprobs": True}
    whole = client.chat.completions.create(**options, top_logprobs=2)
    texts, tokens, ends, roles = [""] * n, [[] for _ in range(n)], [None] * n, set()
    usage = None
    for chunk in client.chat.completions.create(
        **options, top_logprobs=2, stream=True, stream_options={"include_usage": True}
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            tokens[choice.index] += choice.logprobs.content if choice.logprobs else []
            ends[choice.index] = choice.finish_reason or ends[choice.index]
            roles.add((choice.index, choice.delta.role))
    assert texts == [choice.message.content for choice in whole.choices]
    assert tokens == [choice.logprobs.content for choice in whole.choices]
    assert ends == [choice.finish_reason for choice in whole.choices] == ["length"] * n
    assert usage.completion_tokens == whole.usage.completion_tokens == 40 * n
    assert {(i, "assistant") for i in range(n)} <= roles


def test_several_answers_have_consecutive_seeds_and_several_prompts_are_one_call(client):
    def texts(seed, prompt, n=1):
        answer = client.completions.create(model="base", prompt=prompt, max_tokens=12, seed=seed, n=n)
        assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
        return [choice.text for choice in answer.choices]

    assert texts(4, "abc", n=3) == [*texts(4, "abc"), *texts(5, "abc"), *texts(6, "abc")]
    assert texts(4, ["abc", "why"], n=2) == [*texts(4, "abc", n=2), *texts(4, "why", n=2)]


def test_stop_strings_end_an_answer(client, models):
    text = client.completions.create(model="base", prompt="abc", max_tokens=60, seed=1).choices[0].text
    word = text[15:18]
    answer = client.completions.create(model="base", prompt="abc", max_tokens=60, seed=1, stop=[word, "~~"], logprobs=0)
    assert answer.choices[0].text == text[: text.index(word)] and answer.choices[0].finish_reason == "stop"
    places = answer.choices[0].logprobs.text_offset
    assert places == sorted(places) and places[-1] < len(answer.choices[0].text)
    assert answer.usage.completion_tokens < 60


def test_log_probabilities_in_both_forms(client):
    options = {"max_tokens": 8, "temperature": 0}
    chat_tokens = client.chat.completions.create(
        model="instruct", messages=MESSAGES, logprobs=True, top_logprobs=20, **options
    ).choices[0].logprobs.content  # fmt: skip
    for token in chat_tokens:
        assert len(token.top_logprobs) == 20 and token.top_logprobs[0].token == token.token
        assert token.logprob == pytest.approx(token.top_logprobs[0].logprob, abs=1e-5)
        assert math.fsum(math.exp(other.logprob) for other in token.top_logprobs) < 1 + 1e-5
        assert token.bytes is None or bytes(token.bytes).decode() == token.token
    choice = client.completions.create(model="base", prompt="abc", logprobs=3, **options).choices[0]
    table = choice.logprobs
    assert len(table.tokens) == len(table.token_logprobs) == len(table.top_logprobs) == len(table.text_offset) == 8
    for token, log_prob, likeliest in zip(table.tokens, table.token_logprobs, table.top_logprobs, strict=True):
        assert likeliest[token] == pytest.approx(log_prob, abs=1e-5) and len(likeliest) <= 3
    for token, place in zip(table.tokens, table.text_offset, strict=True):
        if "\ufffd" in choice.text[: place + 1] + token:
            break  # parts of characters, whose text and place are not known one by one
        assert choice.text.startswith(token, place)


def test_special_tokens_in_a_text_are_text(running, models):
    text = "abc<|other|>"
    body = {"model": "base", "prompt": text, "max_tokens": 1}
    usage = httpx.post(f"{running.url}/v1/completions", json=body, timeout=60).json()["usage"]
    assert (
        usage["prompt_tokens"]
        == len(models[0].tokenizer.encode(text))
        > len(models[0].tokenizer.encode(text, special=True))
    )


IMAGE = {"type": "image_url", "image_url": {"url": "http://evil.example"}}
COMPLETION = {"model": "base", "prompt": "abc", "max_tokens": 2}
CHAT = {"model": "instruct", "messages": MESSAGES, "max_tokens": 2}


@pytest.mark.parametrize(
    ("path", "body", "status", "words", "param"),
    [
        ("completions", CHAT | {"model": "base"}, 400, "prompt is missing", "prompt"),
        ("chat/completions", CHAT | {"model": "base"}, 400, "base has no chat template", "messages"),
        ("chat/completions", CHAT | {"messages": []}, 400, "messages is missing or empty", "messages"),
        ("chat/completions", CHAT | {"messages": [{"role": "tool", "content": "a"}]}, 400, "role is not", None),
        ("chat/completions", CHAT | {"messages": [{"role": "user", "content": None}]}, 400, "is not text", None),
        ("chat/completions", CHAT | {"messages": [{"role": "user", "content": [IMAGE]}]}, 400, "not text", None),
        ("chat/completions", CHAT | {"messages": ["hello"]}, 400, "role is not", None),
        ("chat/completions", CHAT | {"top_logprobs": 2}, 400, "needs logprobs", "top_logprobs"),
        ("chat/completions", CHAT | {"tools": [{"type": "function"}]}, 400, "does not support tools", "tools"),
        ("completions", COMPLETION | {"model": None}, 400, "model is missing; this server has base", "model"),
        ("completions", COMPLETION | {"model": "other"}, 404, "no model 'other'", "model"),
        ("completions", COMPLETION | {"model": "\ud800"}, 404, "no model", "model"),
        ("completions", COMPLETION | {"prompt": "a\ud800"}, 400, "no Unicode at index 1", "prompt"),
        ("completions", COMPLETION | {"prompt": [1, 273]}, 400, "no token 273", None),
        ("completions", COMPLETION | {"prompt": [1, -1]}, 400, "prompt is not", "prompt"),
        ("completions", COMPLETION | {"prompt": []}, 400, "empty array", "prompt"),
        ("completions", COMPLETION | {"prompt": {}}, 400, "prompt is not", "prompt"),
        ("completions", COMPLETION | {"prompt": [5] * 161}, 400, "161 tokens; base takes at most 160", "prompt"),
        ("completions", COMPLETION | {"prompt": ["a"] * 33, "n": 2}, 400, "more than 64 answers", "n"),
        ("completions", COMPLETION | {"max_tokens": 0}, 400, "max_tokens is not in", "max_tokens"),
        ("completions", COMPLETION | {"max_tokens": 5000}, 400, "above this server's limit of 4096", "max_tokens"),
        ("completions", COMPLETION | {"max_tokens": 4096, "n": 20, "logprobs": 20}, 400, "more than 1,048,576", None),
        ("completions", COMPLETION | {"temperature": -1}, 400, "temperature is not in [0, 100]", "temperature"),
        ("completions", COMPLETION | {"temperature": "hot"}, 400, "temperature is not a number", "temperature"),
        ("completions", COMPLETION | {"temperature": True}, 400, "temperature is not a number", "temperature"),
        ("completions", COMPLETION | {"top_p": 1.5}, 400, "top_p is not in [0, 1]", "top_p"),
        ("completions", COMPLETION | {"seed": 1.5}, 400, "seed is not an integer", "seed"),
        ("completions", COMPLETION | {"stop": [""]}, 400, "stop is not up to 16 texts", "stop"),
        ("completions", COMPLETION | {"logprobs": 21}, 400, "logprobs is not in [0, 20]", "logprobs"),
        ("completions", COMPLETION | {"stream": 1}, 400, "stream is not true or false", "stream"),
        ("completions", COMPLETION | {"temprature": 1}, 400, "unrecognized request argument: temprature", "temprature"),
        ("completions", COMPLETION | {"logit_bias": {"5": 10}}, 400, "does not support logit_bias", "logit_bias"),
    ],
)  # fmt: skip
def test_a_mistake_has_its_status_and_names_its_field(running, path, body, status, words, param):
    data = json.dumps(body).encode()
    response = httpx.post(f"{running.url}/v1/{path}", content=data, headers={"Content-Type": "application/json"})
    error = response.json()["error"]
    assert response.status_code == status and words in error["message"]
    assert error["type"] == "invalid_request_error" and (param is None or error["param"] == param)
    assert "Traceback" not in response.text


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not JSON"),
        (b"{'model': 1}", "not JSON"),
        (b'{"model": "base"', "not JSON"),
        (b'"base"', "not a JSON object"),
        (b'{"model": "base", "prompt": "\xff"}', "not UTF-8 at byte 29"),
        (b'{"model": "base", "prompt": "a", "temperature": NaN}', "NaN is not a number of JSON"),
        (b'{"model": "base", "prompt": "a", "temperature": 1e999}', "temperature is not in"),
        (b'{"model": "base", "seed": ' + b"9" * 5000 + b"}", "not JSON"),
        (b"[" * 100_000, "not JSON: it is nested too deep"),
        (b"\x00" * 100, "not JSON"),
    ],
)
def test_a_body_that_is_no_request_is_refused(running, data, words):
    response = httpx.post(
        f"{running.url}/v1/completions", content=data, headers={"Content-Type": "application/json; charset=utf-8"}
    )
    assert response.status_code == 400 and words in response.json()["error"]["message"]


def test_other_methods_paths_and_types_are_refused_in_the_same_form(running):
    assert httpx.get(f"{running.url}/v1/nothing").json()["error"]["message"] == "Not Found"
    assert httpx.get(f"{running.url}/v1/completions").status_code == 405
    plain = httpx.post(f"{running.url}/v1/completions", content=b"{}", headers={"Content-Type": "text/plain"})
    assert plain.status_code == 415 and "Content-Type: application/json" in plain.json()["error"]["message"]


def test_no_other_site_can_use_the_server(running):
    """No header of CORS, no answer to a preflight request, and none to another name that leads here."""
    headers = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    preflight = httpx.options(f"{running.url}/v1/completions", headers=headers)
    answer = httpx.post(f"{running.url}/v1/completions", json=COMPLETION, headers=headers, timeout=60)
    assert preflight.status_code == 405
    for response in (preflight, answer):
        assert not [name for name in response.headers if name.startswith("access-control")]
    for host in ("evil.example", "127.0.0.1.evil.example", "", "[::1"):
        rebound = httpx.get(f"{running.url}/v1/models", headers={"Host": host})
        assert rebound.status_code == 421
    assert httpx.get(f"{running.url}/v1/models", headers={"Host": "localhost:8000"}).status_code == 200


def test_a_key_is_needed_where_there_is_one(start):
    server = start(token="secret", local=False)
    for key in ("wrong", "secret2", "sécret".encode().decode("latin-1")):
        response = httpx.get(f"{server.url}/v1/models", headers={b"Authorization": b"Bearer " + key.encode("latin-1")})
        assert response.status_code == 401 and response.headers["content-type"] == "application/json"
    with (
        server.client("other") as client,
        pytest.raises(openai.AuthenticationError, match="Authorization: Bearer KEY"),
    ):
        client.completions.create(**COMPLETION)
    with server.client("secret") as client:
        assert client.completions.create(**COMPLETION).choices
        assert [model.id for model in client.models.list()] == ["base"]
    for path, status in (("/", 200), ("/healthz", 200), ("/metrics", 401), ("/page.json", 401), ("/v1/models", 401)):
        assert httpx.get(server.url + path).status_code == status


def test_a_full_queue_is_429_with_a_time_to_wait(start):
    server = start(slots=1, queue=1)
    with server.client() as client, concurrent.futures.ThreadPoolExecutor(2) as pool:
        streams = [
            pool.submit(client.completions.create, model="base", prompt="abc", max_tokens=4000, stream=True)
            for _ in range(2)
        ]
        first = next(iter(concurrent.futures.as_completed(streams))).result()
        while server.busy < 2:
            time.sleep(0.01)
        with pytest.raises(openai.RateLimitError, match="queue is full") as raised:
            client.completions.create(**COMPLETION)
        assert 1 <= int(raised.value.response.headers["retry-after"]) <= 60
        first.close()  # then the other one has the slot
        for stream in streams:
            stream.result().close()
    server.wait_until_idle()
    assert server.metric("gptjax_requests_total", status="429") == 1


def test_a_request_that_takes_too_long_is_504_or_an_error_in_its_stream(start):
    server = start(limits=Limits(seconds=0.6))
    with server.client() as client:
        with pytest.raises(openai.InternalServerError, match="longer than 0.6 s") as raised:
            client.completions.create(model="base", prompt="abc", max_tokens=4096, n=4)
        assert raised.value.status_code == 504 and raised.value.body["type"] == "timeout_error"
        with pytest.raises(openai.APIError, match="longer than 0.6 s"):
            list(client.completions.create(model="base", prompt="abc", max_tokens=4096, n=4, stream=True))
    server.wait_until_idle()


def test_a_template_that_refuses_a_conversation_is_a_400(client, monkeypatch):
    render = Renderer.render
    refusing = "{{ raise_exception('roles must alternate') }}"
    monkeypatch.setattr(Renderer, "render", lambda self, _, *arguments: render(self, refusing, *arguments))
    with pytest.raises(openai.BadRequestError, match="rejects these messages: roles must alternate"):
        client.chat.completions.create(**CHAT)


def test_health_and_metrics(running, client):
    assert httpx.get(f"{running.url}/healthz").json() == {"status": "ok"}
    names = {
        "gptjax_requests_total": {"model": "base", "status": "200"},
        "gptjax_time_to_first_token_seconds_count": {"model": "base"},
        "gptjax_generated_tokens_total": {"model": "base"},
        "gptjax_prompt_tokens_total": {"model": "base"},
    }
    before = {name: running.metric(name, **labels) for name, labels in names.items()}
    client.completions.create(model="base", prompt="abc", max_tokens=7)
    after = {name: running.metric(name, **labels) for name, labels in names.items()}
    gained = [after[name] - before[name] for name in names]
    assert gained[:3] == [1, 1, 7] and gained[3] > 0
    assert running.metric("gptjax_slots", model="base") == 4
    assert running.metric("gptjax_queue_length") == running.metric("gptjax_slots_in_use") == 0
    assert running.metric("gptjax_tokens_per_second", model="base") > 0
