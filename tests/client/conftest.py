from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from typing import Any

import httpx
import pytest

from inferq.producer.client.async_client import AsyncClient
from inferq.producer.client.sync_client import Client
from tests.gateway.conftest import (
    Gateway,
    gateway,
    lone_gateway,
    own_gateway,
    publisher,
    shared_gateway,
    shared_lone_gateway,
    shared_publisher,
)

__all__ = [
    "gateway",
    "lone_gateway",
    "own_gateway",
    "publisher",
    "shared_gateway",
    "shared_lone_gateway",
    "shared_publisher",
]


class AnyClient:
    """Either client, with methods to be awaited. A method that iterates returns a list."""

    def __init__(self, client: Client | AsyncClient) -> None:
        self.client = client

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        async def call(*args: Any, **kwargs: Any) -> Any:
            answer = getattr(self.client, name)(*args, **kwargs)
            if isinstance(answer, Awaitable):
                return await answer
            return (
                [item async for item in _each(answer)]
                if isinstance(answer, Iterator | AsyncIterator)
                else answer
            )

        return call

    def each(self, name: str, *args: Any) -> AsyncIterator[Any]:
        """The items that the method of this name iterates over, one by one."""
        return _each(getattr(self.client, name)(*args))


async def _each(items: Iterator[Any] | AsyncIterator[Any]) -> AsyncIterator[Any]:
    if isinstance(items, AsyncIterator):
        async for item in items:
            yield item
    else:
        for item in items:
            yield item


class Scripted(httpx.BaseTransport, httpx.AsyncBaseTransport):
    """A transport that answers from a list and keeps the requests."""

    def __init__(self, *answers: httpx.Response | Exception) -> None:
        self.answers = list(answers)
        self.requests: list[httpx.Request] = []

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        request.read()
        return self._answer(request)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        await request.aread()
        return self._answer(request)

    def _answer(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


class Pieces(httpx.SyncByteStream, httpx.AsyncByteStream):
    """The body of a response, for either client. An exception among the pieces is raised."""

    def __init__(self, *pieces: bytes | Exception) -> None:
        self._pieces = pieces

    def __iter__(self) -> Iterator[bytes]:
        for piece in self._pieces:
            if isinstance(piece, Exception):
                raise piece
            yield piece

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self:
            yield piece


def later(call: Callable[[], object], seconds: float = 0.2) -> None:
    """Do it on another thread, while the test waits for what comes of it."""
    threading.Timer(seconds, call).start()


Connect = Callable[..., AnyClient]


@pytest.fixture(params=["sync", "async"])
async def connect(request: pytest.FixtureRequest) -> AsyncIterator[Connect]:
    """Makes a client, of each kind in turn, and closes it at the end of the test."""
    async with AsyncExitStack() as stack:

        def make(*arguments: Any, **options: Any) -> AnyClient:
            if request.param == "sync":
                return AnyClient(stack.enter_context(Client(*arguments, **options)))
            client = AsyncClient(*arguments, **options)
            stack.push_async_exit(client)
            return AnyClient(client)

        yield make


@pytest.fixture
def client(connect: Connect, lone_gateway: Gateway) -> AnyClient:
    return connect(lone_gateway.url, lone_gateway.key, retries=2)
