"""How it travels: topology, connection, publisher, consumer, retry levels, dead letters."""

from broker.connection import connect
from broker.consumer import Consumer
from broker.dead import DeadLetter, DeadLetters, Filter, NoDeadLetters
from broker.errors import BrokerUnavailable, PublishRejected, TopologyMismatch, Unroutable
from broker.jobs import (
    ASSEMBLE_JOB,
    CALLBACK_JOB,
    FEED_JOB,
    JOB_ENTRY_POINTS,
    NIGHT_START_JOB,
    NIGHT_WATCH_JOB,
    QUEUE_JOBS,
    callback_message,
    delayed,
    job_copy,
    job_message,
)
from broker.messages import (
    Delivery,
    Message,
    dead_message,
    named_id,
    redriven_message,
    retry_message,
    task_message,
)
from broker.publisher import Publisher
from broker.retry import RETRY_LEVELS, backoff, retry_level
from broker.settings import BrokerSettings
from broker.topology import (
    JOB_QUEUES,
    Difference,
    JobQueue,
    Topology,
    dead_queue,
    job_topology,
    routing_key,
    topology_for,
    work_queue,
)

__all__ = [
    "ASSEMBLE_JOB",
    "CALLBACK_JOB",
    "FEED_JOB",
    "JOB_ENTRY_POINTS",
    "JOB_QUEUES",
    "NIGHT_START_JOB",
    "NIGHT_WATCH_JOB",
    "QUEUE_JOBS",
    "RETRY_LEVELS",
    "BrokerSettings",
    "BrokerUnavailable",
    "Consumer",
    "DeadLetter",
    "DeadLetters",
    "Delivery",
    "Difference",
    "Filter",
    "JobQueue",
    "Message",
    "NoDeadLetters",
    "PublishRejected",
    "Publisher",
    "Topology",
    "TopologyMismatch",
    "Unroutable",
    "backoff",
    "callback_message",
    "connect",
    "dead_message",
    "dead_queue",
    "delayed",
    "job_copy",
    "job_message",
    "job_topology",
    "named_id",
    "redriven_message",
    "retry_level",
    "retry_message",
    "routing_key",
    "task_message",
    "topology_for",
    "work_queue",
]
