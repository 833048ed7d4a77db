"""The figures of `inferq monitor` in Redis, where the gateway reads them.

inferq:monitor           the JSON of the last Stats; it expires when it is too old to be believed
inferq:monitor:waiting   since when messages wait in each lane, for the next monitor
"""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from inferq.schemas.encoding import to_json
from inferq.schemas.monitor import Stats
from inferq.storage.callbacks import ALL_FAILURES
from inferq.storage.status.index import StatusIndex

_STATS = "inferq:monitor"
_WAITING = "inferq:monitor:waiting"


class MonitorFigures:
    """Saves and loads the figures. Every method may raise StatusOutage."""

    def __init__(self, index: StatusIndex) -> None:
        self._index = index

    def save(self, stats: Stats, waiting: str, *, seconds: float) -> None:
        """Keep the figures for some seconds, and `waiting` (JSON) for the next monitor."""

        def both(connection: Any) -> None:
            with connection.pipeline(transaction=False) as pipeline:
                pipeline.set(_STATS, to_json(stats), ex=max(1, round(seconds)))
                pipeline.set(_WAITING, waiting, ex=self._index.retention)
                pipeline.execute()

        self._index.write(both)

    def load(self) -> Stats | None:
        """The last figures; None if no monitor has saved any lately, or only one of another version."""
        (text,) = self._index.read(("GET", _STATS))
        try:
            return None if text is None else Stats.model_validate_json(text)
        except ValidationError:
            return None

    def waiting(self) -> str | None:
        """What the last monitor saved with its figures."""
        (text,) = self._index.read(("GET", _WAITING))
        return None if text is None else str(text)

    def callbacks_given_up(self, now: float) -> int:
        """Callbacks of all tenants that were given up and not delivered since, within the retention of statuses.

        `now` is in Unix seconds.
        """
        since = now - self._index.retention
        (count,) = self._index.read(("ZCOUNT", ALL_FAILURES, since, "+inf"))
        return int(count)
