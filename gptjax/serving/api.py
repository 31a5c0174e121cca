"""OpenAI's HTTP API in Starlette, with limits on all that a client sends, health, metrics and the page."""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gptjax.serving.engine import Closing, Piece, QueueFull, Request
from gptjax.serving.metrics import ServerMetrics
from gptjax.serving.page import PAGE, page_data, page_headers
from gptjax.serving.protocol import ApiError, Reply, parse
from gptjax.serving.served import Limits, Served

BODY_SECONDS = 30.0  # in which a request's body has to arrive
SENDING_SECONDS = 30.0  # after which a client that reads nothing of its stream is dropped
OPEN_PATHS = ("/", "/healthz")  # need no token, since they tell nothing about the models
LOCAL_HOSTS = frozenset({"127.0.0.1", "localhost", "::1"})
FAILURES: dict[str | None, tuple[int, str]] = {  # by the end of a piece: the status, and the message
    "timeout": (504, "the request took longer than {:g} s"),
    "closing": (503, "the server stopped before the answer was complete"),
    "error": (500, "the model failed; the server's log has more"),
}
MODEL, OUTCOME = "gptjax.model", "gptjax.outcome"  # in a request's scope, for the metrics


class Disconnected(Exception):
    """The client has left."""


def create_app(models: Sequence[Served], limits: Limits, token: str | None, local: bool = True) -> Starlette:
    """The application. With a token every request needs it; a `local` one answers to the names of this machine only."""
    api = Api(models, limits)
    handlers: dict[Any, Any] = {
        ApiError: lambda http, error: error_response(error),
        HTTPException: lambda http, error: error_response(ApiError(error.status_code, str(error.detail))),
        Disconnected: _nobody,
        ClientDisconnect: _nobody,
        Exception: lambda http, error: error_response(ApiError(500, "the server made a mistake; its log has more")),
    }
    middleware = [
        Middleware(Guard, token=token, hosts=LOCAL_HOSTS if local else None),
        Middleware(Counted, api.metrics),
    ]
    return Starlette(routes=api.routes(), middleware=middleware, exception_handlers=handlers)


class Json(Response):
    """A JSON response in ASCII, which can hold every text that a client sends."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The bytes of the body; NaN and infinity, which JSON does not have, raise `ValueError`."""
        return json.dumps(content, allow_nan=False).encode()


def error_response(error: ApiError) -> Response:
    """The error in OpenAI's form, with its status and headers."""
    return Json(error.body(), error.status, error.headers)


async def _nobody(http: HttpRequest, error: Exception) -> Response:
    """The response to a client that has left."""
    http.scope[OUTCOME] = 499
    return Response(status_code=400)


class Api:
    """The endpoints for some models."""

    def __init__(self, models: Sequence[Served], limits: Limits) -> None:
        self.models, self.limits, self.metrics = models, limits, ServerMetrics(models)
        self._html = PAGE.read_bytes()

    def routes(self) -> list[Route]:
        """The paths, and the endpoint of each."""
        return [
            Route("/", self.page),
            Route("/page.json", self.page_data),
            Route("/healthz", self.health),
            Route("/metrics", self.show_metrics),
            Route("/v1/models", self.list_models),
            Route("/v1/models/{name:path}", self.one_model),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.complete, methods=["POST"]),
        ]

    async def page(self, http: HttpRequest) -> Response:
        """The page to talk to models."""
        return Response(self._html, headers=page_headers(self._html))

    async def page_data(self, http: HttpRequest) -> Response:
        """What the page shows of the models."""
        return Json(await asyncio.to_thread(page_data, self.models))

    async def health(self, http: HttpRequest) -> Response:
        """Status 200 while all engines run, else 503."""
        ok = all(served.engine.alive for served in self.models)
        return Json({"status": "ok" if ok else "an engine has stopped"}, 200 if ok else 503)

    async def show_metrics(self, http: HttpRequest) -> Response:
        """The metrics in Prometheus's text format."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def list_models(self, http: HttpRequest) -> Response:
        """All models, as OpenAI's API lists them."""
        return Json({"object": "list", "data": [_model_object(served) for served in self.models]})

    async def one_model(self, http: HttpRequest) -> Response:
        """The model that the path names."""
        return Json(_model_object(self.find(http.path_params["name"])))

    async def chat(self, http: HttpRequest) -> Response:
        """The next message of a conversation."""
        return await self._answer(http, chat=True)

    async def complete(self, http: HttpRequest) -> Response:
        """Continuations of prompts."""
        return await self._answer(http, chat=False)

    def find(self, name: str | None) -> Served:
        """The model of this name. Raises `ApiError` 404, or 400 if no name is given."""
        names = ", ".join(served.name for served in self.models)
        if name is None:
            raise ApiError(400, f"model is missing; this server has {names}", "model")
        for served in self.models:
            if name == served.name or name in served.aliases:
                return served
        raise ApiError(404, f"there is no model {name[:200]!r}; this server has {names}", "model", "model_not_found")

    async def _answer(self, http: HttpRequest, chat: bool) -> Response:
        """Answer one call, whole or as a stream. A failure before the first text has a status of its own."""
        arrived = time.monotonic()
        deadline = arrived + self.limits.seconds
        call = parse(await read_body(http, self.limits.body_bytes), chat)
        served = self.find(call.model)
        http.scope[MODEL] = served.name
        prompts = await asyncio.to_thread(served.encode, call)
        requests = served.requests(call, prompts, self.limits, deadline)
        answers = Answers(served, requests, http.receive, self.limits.seconds)
        try:
            first = await anext(answers)
            self.metrics.first_token.labels(served.name).observe(time.monotonic() - arrived)
            reply = Reply(call, served.name, lambda token: served.model.tokenizer.decode([token]), len(requests))
            if call.stream:
                return EventStream(_events(reply, first, answers), answers.close)
            pieces = [first, *[each async for each in answers]]
        except BaseException:
            answers.close()
            raise
        answers.close()
        return Json(reply.whole(pieces, answers.usage()))


def _model_object(served: Served) -> dict[str, Any]:
    return {"id": served.name, "object": "model", "created": served.started, "owned_by": "gptjax"}


async def read_body(http: HttpRequest, most: int) -> bytes:
    """The body of a request of JSON. Raises `ApiError` 408, 413 or 415; what is above `most` bytes is never kept."""
    if http.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "send JSON, with the header Content-Type: application/json")
    too_large = ApiError(413, f"the body is larger than {most:,} bytes")
    length = http.headers.get("content-length", "0")
    if length.isascii() and length.isdecimal() and int(length[:20]) > most:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in http.stream():
                body += part
                if len(body) > most:
                    raise too_large
    except TimeoutError as error:
        raise ApiError(408, f"the body did not arrive within {BODY_SECONDS:g} s") from error
    return bytes(body)


def _put(loop: asyncio.AbstractEventLoop, queue: asyncio.Queue[Any], item: Any) -> None:
    loop.call_soon_threadsafe(queue.put_nowait, item)


class Answers:
    """The pieces of a call's answers as they come, each with the number of its answer.

    Raises `Disconnected` when the client leaves, which frees its slots at once, and `ApiError` where an answer fails or
    the queue is full.
    """

    def __init__(self, served: Served, requests: Sequence[Request], receive: Receive, seconds: float) -> None:
        self._engine, self._requests, self._seconds = served.engine, requests, seconds
        self._queue, self._left = asyncio.Queue[tuple[int, Piece | None]](), len(requests)
        self._held: tuple[int, Piece | None] | None = None  # what came behind the last piece
        loop = asyncio.get_running_loop()

        def deliver_to(i: int) -> Callable[[Piece], None]:
            return lambda piece: _put(loop, self._queue, (i, piece))

        try:
            self._tickets = self._engine.submit(requests, [deliver_to(i) for i in range(len(requests))])
        except QueueFull as error:
            raise ApiError(429, f"{served.name}: {error}", code="queue_full", retry_after=error.retry_after) from error
        except Closing as error:
            raise ApiError(503, "the server is stopping", code="stopping", retry_after=10) from error
        self._watching = asyncio.create_task(self._watch(receive))

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._cancel()
        self._queue.put_nowait((0, None))

    def _cancel(self) -> None:
        for ticket in self._tickets:
            self._engine.cancel(ticket)

    def close(self) -> None:
        """Free what is still in use."""
        self._watching.cancel()
        self._cancel()

    def __aiter__(self) -> "Answers":
        return self

    async def __anext__(self) -> tuple[int, Piece]:
        if not self._left:
            raise StopAsyncIteration
        try:
            async with asyncio.timeout(self._seconds + SENDING_SECONDS):  # for an engine that has stopped
                i, piece = self._held or await self._queue.get()
        except TimeoutError as error:
            raise ApiError(504, "the engine does not answer", code="timeout") from error
        self._held = None
        # Pieces that have come meanwhile are sent as one, so a busy server sends fewer events.
        while piece and not piece.end and not self._queue.empty():
            j, following = self._queue.get_nowait()
            if j != i or following is None or following.end in FAILURES:
                self._held = j, following
                break
            piece = Piece(piece.text + following.text, piece.tokens + following.tokens, following.end)
        if piece is None:
            raise Disconnected
        if piece.end in FAILURES:
            status, message = FAILURES[piece.end]
            raise ApiError(status, message.format(self._seconds), code=piece.end)
        self._left -= piece.end is not None
        return i, piece

    def usage(self) -> dict[str, Any]:
        """The tokens so far; those of a prompt count once, however many answers it has."""
        firsts = {id(ticket.request.prompt): ticket for ticket in reversed(self._tickets)}.values()
        n_prompt, n_drawn = sum(len(t.request.prompt) for t in firsts), sum(t.n_drawn for t in self._tickets)
        counts = {"prompt_tokens": n_prompt, "completion_tokens": n_drawn, "total_tokens": n_prompt + n_drawn}
        return counts | {"prompt_tokens_details": {"cached_tokens": sum(ticket.n_cached for ticket in firsts)}}


async def _events(reply: Reply, first: tuple[int, Piece], answers: Answers) -> AsyncIterator[bytes]:
    """The server-sent events of a stream. A failure in its middle is an event too, since the status is sent already."""
    try:
        for chunk in reply.first_chunks():
            yield _event(chunk)
        yield _event(reply.chunk(*first))
        async for i, piece in answers:
            yield _event(reply.chunk(i, piece))
        if reply.call.stream_usage:
            yield _event(reply.usage_chunk(answers.usage()))
    except ApiError as error:
        yield _event(error.body())
    yield b"data: [DONE]\n\n"


def _event(content: Any) -> bytes:
    return b"data: " + json.dumps(content, allow_nan=False).encode() + b"\n\n"


class EventStream(Response):
    """A response of server-sent events, for a client that reads them; `close` is called at its end."""

    def __init__(self, events: AsyncIterator[bytes], close: Callable[[], None]) -> None:
        super().__init__(None, headers={"Cache-Control": "no-store"}, media_type="text/event-stream")
        del self.headers["content-length"]
        self._events, self._close = events, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for event in self._events:
                async with asyncio.timeout(SENDING_SECONDS):
                    await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        except (Disconnected, TimeoutError):  # the connection is closed, as the response has no end
            scope[OUTCOME] = 499
        finally:
            self._close()


class Guard:
    """Refuses requests without the token and, to a local server, those whose Host is another name than its own.

    The latter prevents DNS rebinding: a web page whose domain comes to resolve to 127.0.0.1 sends that domain as Host.
    """

    def __init__(self, app: ASGIApp, token: str | None, hosts: frozenset[str] | None) -> None:
        self._app, self._token, self._hosts = app, token, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app: Callable[[Scope, Receive, Send], Awaitable[None]] = self._app
        if scope["type"] == "http" and (error := self._error(scope["path"], Headers(scope=scope))):
            app = error_response(error)
        await app(scope, receive, send)

    def _error(self, path: str, headers: Headers) -> ApiError | None:
        if self._hosts and _host_name(headers.get("host", "")) not in self._hosts:
            return ApiError(421, "this server answers to localhost and 127.0.0.1 only; start it with --host for others")
        if self._token is None or path in OPEN_PATHS:
            return None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and secrets.compare_digest(given.strip().encode(), self._token.encode()):
            return None
        return ApiError(401, "send the server's key, with the header Authorization: Bearer KEY", code="invalid_api_key")


def _host_name(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


class Counted:
    """Counts the requests for answers by model and status."""

    def __init__(self, app: ASGIApp, metrics: ServerMetrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self._app(scope, receive, send)
        status = 500

        async def note(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self._app(scope, receive, note)
        finally:
            self._metrics.requests.labels(scope.get(MODEL, ""), str(scope.get(OUTCOME, status))).inc()
