"""What can go wrong between us and RabbitMQ.

inferq.schemas.Outage
├── BrokerUnavailable   not connected, or no confirm in time: whether the broker has it is not known
├── PublishRejected     the broker refused the message (a queue at its length limit)
└── Unroutable          no queue is bound for the message's routing key: part of the topology is gone
inferq.schemas.InferqError
└── TopologyMismatch    the broker has a queue or exchange of that name with other arguments
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from inferq.schemas import InferqError, Outage

if TYPE_CHECKING:
    from inferq.broker.messages import Message


class BrokerUnavailable(Outage):
    """RabbitMQ cannot be reached, is blocked by an alarm, or did not confirm in time."""

    code = "broker_unavailable"
    retry_after = 5.0


class PublishRejected(Outage):
    """RabbitMQ refused messages, most likely because their queue is at its length limit.

    `refused` are the refused messages of a call that published several; the others are confirmed.
    """

    code = "publish_rejected"
    retry_after = 30.0

    def __init__(self, message: str, *, refused: Sequence[Message] = ()) -> None:
        super().__init__(message)
        self.refused = list(refused)


class Unroutable(Outage):
    """No queue is bound for a message's routing key."""

    code = "unroutable"


class TopologyMismatch(InferqError):
    """The broker's queues or exchanges are not those that inferq needs."""

    code = "topology_mismatch"
