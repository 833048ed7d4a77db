"""Running the gateway with uvicorn."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import uvicorn
from fastapi import FastAPI

from inferq.producer.descriptors import raise_descriptor_limit
from inferq.producer.gateway.app import create_app
from inferq.producer.gateway.connections import ConnectionGuard, GuardedProtocol, default_limit
from inferq.producer.gateway.services import Services
from inferq.producer.gateway.settings import GatewaySettings
from inferq.schemas import probe_server

_BACKLOG = 2048
_ACCEPTED_AT_ONCE = 64
"""Connections that asyncio accepts before it looks at them: they must not use up the descriptors."""
_KEEP_ALIVE_SECONDS = 30


class Server(uvicorn.Server):
    """uvicorn that ends event streams and waiting requests when it stops."""

    def __init__(self, app: FastAPI, *, grace: float) -> None:
        self._services: Services = app.state.services
        settings = self._services.settings
        limit = settings.max_connections or default_limit(raise_descriptor_limit())
        self._guard = ConnectionGuard(
            limit,
            settings.max_connections_per_address or max(1, limit // 2),
            proxies=settings.trusted_proxies,
        )
        self._watch: asyncio.Task[None] | None = None
        config = uvicorn.Config(
            app,
            http=partial(GuardedProtocol, guard=self._guard),  # type: ignore[arg-type] # it makes protocols
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            ws="none",
            lifespan="on",
            backlog=_ACCEPTED_AT_ONCE,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=max(1, round(grace)),
        )
        super().__init__(config)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for each in sockets or ():
            each.listen(_BACKLOG)  # asyncio has set its own
        self._watch = asyncio.create_task(self._guard.watch(), name="connections")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._services.closing.set()
        self._services.event_bus.wake()
        await super().shutdown(sockets)
        if self._watch is not None:
            self._watch.cancel()


def serve(
    host: str | None = None,
    port: int | None = None,
    *,
    on_listening: Callable[[str], None] | None = None,
) -> None:
    """Run the gateway until SIGTERM or SIGINT; requests in flight get `shutdown_grace` seconds to finish.

    Port 0 takes a free port; `on_listening` is called with the URL. Raises InstallationError if the address is
    in use or not allowed.
    """
    settings = GatewaySettings.load()
    host = settings.gateway_host if host is None else host
    port = settings.gateway_port if port is None else port
    listener = listen(host, port)
    if threading.current_thread() is threading.main_thread():
        # When it is done, uvicorn raises the signal that stopped it again; SIGTERM would kill the process.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    with listener, suppress(KeyboardInterrupt):
        server = Server(create_app(settings), grace=settings.shutdown_grace)
        if on_listening is not None:
            on_listening(url_of(listener))
        server.run(sockets=[listener])


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on the address. Raises InstallationError."""
    listener = probe_server.listen(
        host,
        port,
        what="the gateway",
        settings="INFERQ_GATEWAY_HOST and INFERQ_GATEWAY_PORT",
        backlog=_BACKLOG,
    )
    # Connections inherit it. Without it an answer's body, sent as a packet of its own after the headers,
    # waits up to 40 ms for the client's acknowledgement. asyncio sets it on its own sockets only.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def url_of(listener: socket.socket) -> str:
    """The HTTP URL of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
