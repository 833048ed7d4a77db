"""Whether beat could start a run now."""

from __future__ import annotations

from inferq.broker import Publisher
from inferq.producer.nightly.beat import Beat
from inferq.schemas.probe_server import Readiness
from inferq.storage import StoreWatch


def beat_readiness(beat: Beat, publisher: Publisher, store: StoreWatch) -> Readiness:
    """The services that beat waits for.

    Beat uses RabbitMQ and the object store only when a run is due; this check finds an outage before that.
    """
    broker = None if publisher.connected else "RabbitMQ"
    if publisher.blocked_reason is not None:
        broker = f"RabbitMQ: it takes no messages ({publisher.blocked_reason})"
    waiting = [*beat.state.waiting_for, *(each for each in (broker, store.waiting_for) if each)]
    return Readiness(not waiting, tuple(waiting))
