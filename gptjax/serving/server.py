"""The process that serves: a socket, uvicorn with limits on connections, and an orderly end."""

import asyncio
import contextlib
import logging
import socket
import threading
import time
from collections.abc import Sequence
from functools import partial
from types import FrameType
from typing import Any

import numpy as np
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from gptjax.errors import UserError
from gptjax.inference.sampling import Sampling
from gptjax.serving.engine import Piece, Request
from gptjax.serving.served import Served
from gptjax.serving.slots import PROMPT_CHUNK

HEADER_SECONDS = 20.0  # in which a connection has to bring the headers of its next request
CONNECTIONS = 1000  # more are answered with 503
UNREAD_SECONDS = 60  # after which a connection is dropped whose client takes nothing of what is sent


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises `UserError` if the address is not there or in use."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot listen at {host} port {port}: {reason}; pass another --port or --host") from error
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # on Linux; accepted connections inherit both
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * UNREAD_SECONDS)
    return listening


def warm_up(models: Sequence[Served]) -> None:
    """Start the engines, and let each compile the programs that short prompts take."""
    for served in models:
        served.engine.start()
        for n in sorted({min(n, served.model.config.block_size) for n in (1, PROMPT_CHUNK // 2, PROMPT_CHUNK)}):
            request, done = Request(np.zeros(n, np.int32), 1, Sampling(), seed=0), threading.Event()
            served.engine.submit([request], [partial(_note_end, done)])
            done.wait()


def _note_end(done: threading.Event, piece: Piece) -> None:
    if piece.end:
        done.set()


class Protocol(H11Protocol):
    """HTTP/1.1 that closes a connection which brings no request in time."""

    def connection_made(self, transport: Any) -> None:
        """Begin to wait for the first request."""
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        """Read a part of a request; after its response wait for the next."""
        super().data_received(data)
        if (self.cycle is None or self.cycle.response_complete) and self.timeout_keep_alive_task is None:
            self._wait()

    def _wait(self) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(HEADER_SECONDS, self.timeout_keep_alive_handler)


class Server(uvicorn.Server):
    """uvicorn's server. SIGINT and SIGTERM let what runs end within `grace` seconds, and a second one ends it now."""

    def __init__(self, app: ASGIApp, models: Sequence[Served], grace: float) -> None:
        config = uvicorn.Config(
            app,
            http=Protocol,
            ws="none",
            lifespan="off",
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=CONNECTIONS,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=int(grace) + 5,  # the engines have ended by then; what is left is not read
        )
        super().__init__(config)
        self._models, self._grace = models, grace
        logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # a client's invalid request is no warning of ours

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Refuse new requests and give the others their time."""
        now = self.should_exit
        self.should_exit, self.force_exit = True, now
        for served in self._models:
            served.engine.close(time.monotonic() + (0 if now else self._grace))

    def serve_at(self, listening: socket.socket) -> None:
        """Serve until a signal, and until the engines have ended."""
        with listening, contextlib.suppress(asyncio.CancelledError):
            self.run(sockets=[listening])
        for served in self._models:
            served.engine.close(time.monotonic())
            served.engine.join(10.0)
            served.close()
