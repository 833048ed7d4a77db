"""How messages travel: RabbitMQ's topology, connections, publishing and consuming.

topology           exchanges and queues, and how they differ from the broker's
connection         a connection on a thread of its own, which reconnects
publisher          publishing with confirms
consumer           consuming from the lanes of one task type, one delivery at a time or a group
lanes              which lane delivers to a consumer, and when a higher one is asked
pipelined_channel  a channel that sends each method at once
messages           tasks, retries and dead letters as AMQP messages
retry              the retry levels
dead               listing, redriving and purging dead letters
spans              the spans of messages, for tracing
jobs, celery_app   light jobs: callbacks, batches, nightly runs
errors             the errors of all these
settings           the address of RabbitMQ, and time limits
"""

from inferq.broker.connection import connect
from inferq.broker.consumer import Consumer
from inferq.broker.dead import DeadLetter, DeadLetters, Filter
from inferq.broker.errors import BrokerUnavailable, PublishRejected, TopologyMismatch, Unroutable
from inferq.broker.jobs import (
    ASSEMBLE_JOB,
    CALLBACK_JOB,
    FEED_JOB,
    JOB_ENTRY_POINTS,
    NIGHT_START_JOB,
    NIGHT_WATCH_JOB,
    QUEUE_JOBS,
    assemble_message,
    callback_message,
    delayed,
    feed_message,
    job_copy,
    job_message,
)
from inferq.broker.messages import (
    Delivery,
    Message,
    dead_message,
    deferred_message,
    dropped_message,
    named_id,
    retry_message,
    task_message,
    waiting_message,
)
from inferq.broker.publisher import Publisher
from inferq.broker.retry import RETRY_LEVELS, backoff, retry_level
from inferq.broker.settings import BrokerSettings
from inferq.broker.topology import (
    DROPPED,
    JOB_QUEUES,
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
    "DROPPED",
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
    "Filter",
    "JobQueue",
    "Message",
    "PublishRejected",
    "Publisher",
    "Topology",
    "TopologyMismatch",
    "Unroutable",
    "assemble_message",
    "backoff",
    "callback_message",
    "connect",
    "dead_message",
    "dead_queue",
    "deferred_message",
    "delayed",
    "dropped_message",
    "feed_message",
    "job_copy",
    "job_message",
    "job_topology",
    "named_id",
    "retry_level",
    "retry_message",
    "routing_key",
    "task_message",
    "topology_for",
    "waiting_message",
    "work_queue",
]

if __name__ != "inferq.broker":
    raise ImportError(f"import inferq.broker instead of {__name__}, which would be a second copy of it")
