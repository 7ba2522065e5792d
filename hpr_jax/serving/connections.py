"""What uvicorn lacks: connections that are not waited for without end, and signals that are left to the caller."""

import asyncio
import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from hpr_jax.serving.limits import FAREWELL_SECONDS, HEAD_SECONDS, MORE_CONNECTIONS, Limits


def make_server(app: ASGIApp, limits: Limits) -> "Server":
    """A server of an application, which runs when its `serve` is called with sockets."""
    settings = uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        # Nothing here depends on the address of a client, which a proxy would tell.
        proxy_headers=False,
        limit_concurrency=limits.requests + MORE_CONNECTIONS,
        timeout_graceful_shutdown=FAREWELL_SECONDS,
    )
    # It would log what strangers send, and that it starts and ends.
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)
    return Server(settings)


class Server(uvicorn.Server):
    """uvicorn's server without handlers of signals: in the end its own send what they got again, to those of the console."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Connection(H11Protocol):
    """uvicorn's connection, which is closed if the head of a request does not come in time. uvicorn itself waits forever,
    and connections that send a byte now and then would take all the places."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, error: Exception | None) -> None:
        self._stop_watching()
        super().connection_lost(error)

    def _watch(self) -> None:
        """Begins to wait for the head of a request, goes on waiting, or ends it."""
        if self.conn.their_state is not h11.IDLE:
            self._stop_watching()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _stop_watching(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
