"""Where a batch stands, asked of Redis on the event loop itself."""

from __future__ import annotations

import redis
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from storage.batch_index import BatchIndex, Standing
from storage.batch_scripts import SOURCES


class BatchLook:
    """`BatchIndex.look` without a thread: on a busy machine each turn between threads may take milliseconds.

    `timeout` in seconds.
    """

    def __init__(self, url: str, index: BatchIndex, *, timeout: float) -> None:
        self._index = index
        self._redis = Redis.from_url(
            url,
            decode_responses=True,
            socket_timeout=timeout,
            socket_connect_timeout=timeout,
            retry=Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,)),
        )
        self._script = self._redis.register_script(SOURCES["look"])

    async def ask(self, tenant: str, batch_id: str) -> Standing | None:
        """As `BatchIndex.look`, but raises what redis does: whether it is away is for the index to say."""
        keys, arguments = self._index.look_call(tenant, batch_id)
        return self._index.standing_of(await self._script(keys=keys, args=arguments))

    async def close(self) -> None:
        await self._redis.aclose()
