"""The status index: the state of each task, in Redis. Fast and shared, but Redis may lose it.

Every change is one Lua script, so it is atomic. It carries an order number, so it is idempotent, and a late or
repeated message never moves a task backwards. The scripts compute some of their keys, so they need a single Redis
(or a failover pair), not a Redis Cluster.
"""

from __future__ import annotations

from typing import Self
from urllib.parse import urlsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from inferq.schemas import InstallationError, check_server_url
from inferq.storage.settings import StorageSettings
from inferq.storage.status.cancels import Cancels
from inferq.storage.status.connection import StatusOutage
from inferq.storage.status.lookup import Lookup
from inferq.storage.status.runs import Begun, Runs
from inferq.storage.status.submissions import Submission, Submissions
from inferq.storage.status.usage import UsageRecords

__all__ = ["Begun", "StatusIndex", "StatusOutage", "Submission"]


class StatusIndex(Submissions, Runs, Cancels, Lookup, UsageRecords):
    """The status of every task. `retention` is in seconds, from a task's last change."""

    @classmethod
    def from_settings(cls, settings: StorageSettings) -> Self:
        form = "redis://[:password@]host:port/database or unix:///path/of/its.sock"
        if not settings.redis_url.startswith("unix:"):
            check_server_url("INFERQ_REDIS_URL", settings.redis_url, schemes=("redis", "rediss"), form=form)
            database = urlsplit(settings.redis_url).path.strip("/")
            if database and not database.isdecimal():  # redis-py would use database 0
                raise InstallationError(
                    f"INFERQ_REDIS_URL names no database by its number; give {form}", code="bad_settings"
                )
        try:
            client = redis.Redis.from_url(
                settings.redis_url,
                decode_responses=True,
                socket_timeout=settings.redis_timeout,
                socket_connect_timeout=settings.redis_timeout,
                # A pooled connection may have died since: one more try, but never a second wait.
                retry=Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,)),
                max_connections=1000,
            )
        except ValueError as error:
            # The parser's message may quote a part of the password.
            raise InstallationError(
                f"INFERQ_REDIS_URL cannot be read; give {form}, with special characters of the password "
                "percent-encoded",
                code="bad_settings",
            ) from error
        return cls(client, retention=settings.status_retention)

    @staticmethod
    def channel(tenant: str, task_id: str) -> str:
        """The pub/sub channel that carries a task's events, each the JSON of an inferq.schemas.Event."""
        return f"inferq:events:{tenant}:{task_id}"
