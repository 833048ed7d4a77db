"""The Celery application that runs the light jobs: callbacks, feeding of batches, nightly starts.

It uses the same broker as the tasks, with quorum queues and late acks. Delayed jobs wait in the quorum queues of
Celery's native delayed delivery, not in a worker's memory. RabbitMQ keeps rejected jobs in `inference.unroutable`.
https://docs.celeryq.dev/en/stable/getting-started/backends-and-brokers/rabbitmq.html
"""

from __future__ import annotations

import inspect
import logging
import ssl
from collections.abc import Callable
from typing import Any, get_type_hints
from urllib.parse import quote

from celery import Celery, Task, signals
from celery.worker.consumer import Consumer
from celery.worker.consumer.delayed_delivery import DelayedDelivery
from kombu.entity import Exchange, Queue
from kombu.transport import TRANSPORT_ALIASES
from kombu.transport.pyamqp import SSLTransport
from pika import PlainCredentials
from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from inferq.broker.jobs import JobHeaders
from inferq.broker.settings import BrokerSettings
from inferq.broker.topology import JOB_QUEUES, JOBS, job_queue_arguments
from inferq.schemas import InstallationError

_log = logging.getLogger(__name__)

_TLS_SCHEME = "inferq-amqps"


def celery_app(settings: BrokerSettings) -> Celery:
    """An application without jobs. The functions in entry-point group `inferq.jobs` add them."""
    signals.setup_logging.connect(_keep_log)
    app = Celery("inferq", set_as_current=False)
    exchange = Exchange(JOBS, type="topic")
    # Only what differs from Celery's defaults. Celery consumes and never publishes: jobs are sent by our own
    # Publisher, so nothing here concerns publishing.
    app.conf.update(
        broker_url=[_url(settings, number) for number in range(len(settings.connections("jobs")))],
        broker_use_ssl=_tls(settings),
        broker_heartbeat=settings.amqp_heartbeat,
        broker_connection_timeout=settings.amqp_connect_timeout,
        # By default Celery ends after 100 attempts, in an outage of less than an hour.
        broker_connection_max_retries=None,
        # RabbitMQ closes the channel if a job outlasts consumer_timeout. By default Celery then ends.
        broker_channel_error_retry=True,
        # Quorum queues, declared with the arguments of our topology: others would be refused.
        task_queues=[
            Queue(name, exchange, routing_key=name, queue_arguments=job_queue_arguments())
            for name in JOB_QUEUES
        ],
        # A job is acknowledged once it is done, so a killed process loses none.
        task_acks_late=True,
        # An unforeseen error rejects the job: the broker keeps it in inference.unroutable.
        task_acks_on_failure_or_timeout=False,
        worker_consumer="inferq.broker.celery_app:KeepingConsumer",
        # Remote control needs queues that are neither durable nor quorum; RabbitMQ deprecates those.
        worker_enable_remote_control=False,
    )
    return app


def _keep_log(**_about: object) -> None:
    """Keep Celery from setting up a log of its own, and the level of the process's log."""


class UnreadableJob(Exception):
    """The message is not a job of this process."""


class DelayedQueues(DelayedDelivery):  # type: ignore[misc]
    """Declares the queues of delayed delivery, unless the broker user may not declare: then they exist already.

    Celery would log as critical that delayed delivery is not available.
    """

    def include_if(self, c: Consumer) -> bool:
        return super().include_if(c) and not any(queue.no_declare for queue in c.app.amqp.queues.values())


class KeepingConsumer(Consumer):  # type: ignore[misc]
    """Rejects a message that is not a job of this process, so RabbitMQ keeps it.

    Celery's own consumer acknowledges messages that it cannot decode, and some malformed messages end it
    (tests/jobs/test_unreadable.py).
    """

    class Blueprint(Consumer.Blueprint):  # type: ignore[misc]
        default_steps = (
            *(step for step in Consumer.Blueprint.default_steps if not step.endswith(":DelayedDelivery")),
            DelayedQueues,
        )

    def create_task_handler(self, *args: Any, **more: Any) -> Callable[[Any], None]:
        handle: Callable[[Any], None] = super().create_task_handler(*args, **more)
        arguments = {
            name: _arguments_model(task)
            for name, task in self.app.tasks.items()
            if not name.startswith("celery.")
        }

        def on_message(message: Any) -> None:
            try:
                message.headers = read_job(message, arguments).model_dump()
            except UnreadableJob as error:
                self._reject(message, error)
            else:
                handle(message)

        return on_message

    def on_decode_error(self, message: Any, exc: Exception) -> None:
        self._reject(message, exc)

    def _reject(self, message: Any, error: Exception) -> None:
        _log.error(
            "rejected message %r, which is not a job of this process: %s", message.headers.get("id"), error
        )
        message.reject_log_error(_log, self.connection_errors)


def read_job(message: Any, arguments: dict[str, type[BaseModel]]) -> JobHeaders:
    """Check a kombu message against the jobs and their arguments; return its headers.

    Raises UnreadableJob. The error names the wrong fields, never their values, which may be private.
    """
    try:
        headers = JobHeaders.model_validate(message.headers)
    except ValidationError as error:
        raise UnreadableJob(f"invalid headers: {_places(error)}") from None
    if headers.task not in arguments:
        raise UnreadableJob(f"job {headers.task!r} is unknown")
    try:
        body = message.decode()
    except Exception as error:  # each content type has its own decoder, which may raise anything
        raise UnreadableJob(f"cannot decode the body: {type(error).__name__}") from None
    match body:
        case [[], dict(given), dict(embedded)] if not any(embedded.values()):
            pass
        case _:
            raise UnreadableJob("the body is not [[], {argument: value}, {}]")
    try:
        arguments[headers.task].model_validate(given)
    except ValidationError as error:
        raise UnreadableJob(f"invalid arguments of {headers.task}: {_places(error)}") from None
    return headers


def _places(error: ValidationError) -> str:
    return ", ".join(".".join(map(str, fault["loc"]))[:100] for fault in error.errors()[:3])


def _arguments_model(task: Task) -> type[BaseModel]:
    """A pydantic model of a job's keyword arguments, from its signature."""
    parameters = inspect.signature(task.run).parameters.values()
    hints = get_type_hints(task.run, include_extras=True)
    named = [one for one in parameters if one.kind is not one.VAR_KEYWORD]
    fields: dict[str, Any] = {
        one.name: (hints.get(one.name, Any), ... if one.default is one.empty else one.default)
        for one in named
    }
    config = ConfigDict(extra="forbid" if len(named) == len(parameters) else "allow", strict=True)
    return create_model(task.name, __config__=config, **fields)


class CheckingTransport(SSLTransport):
    """Kombu's TLS transport that checks the certificate of each node against the node's own host name.

    Kombu checks no name by default. With `server_hostname` it checks the first node's name for all nodes.
    """

    def establish_connection(self) -> Any:
        client: Any = self.client
        hostname = client.hostname
        client.ssl = {**client.ssl, "server_hostname": hostname}
        try:
            return super().establish_connection()  # type: ignore[no-untyped-call]
        finally:
            client.hostname = hostname  # kombu replaces localhost by an address


# Kombu chooses the transport of the next node by the URL's scheme alone.
TRANSPORT_ALIASES[_TLS_SCHEME] = f"{__name__}:{CheckingTransport.__name__}"


def _url(settings: BrokerSettings, number: int) -> str:
    """The node's URL for Celery, without the query: pika and Celery read it differently."""
    parameters = settings.connections("jobs")[number]
    credentials = parameters.credentials
    if not isinstance(credentials, PlainCredentials):
        raise InstallationError("INFERQ_AMQP_URL has no user and password, and Celery needs them")
    user = quote(credentials.username, safe="")
    password = quote(credentials.password, safe="")
    host = f"[{parameters.host}]" if ":" in parameters.host else parameters.host
    vhost = quote(parameters.virtual_host, safe="")
    scheme = _TLS_SCHEME if parameters.ssl_options is not None else "amqp"
    return f"{scheme}://{user}:{password}@{host}:{parameters.port}/{vhost}"


def _tls(settings: BrokerSettings) -> dict[str, Any] | None:
    if all(parameters.ssl_options is None for parameters in settings.connections("jobs")):
        return None
    files = {
        "ca_certs": settings.amqp_ca_file,
        "certfile": settings.amqp_cert_file,
        "keyfile": settings.amqp_key_file,
    }
    named = {name: str(path) for name, path in files.items() if path is not None}
    return {"cert_reqs": ssl.CERT_REQUIRED, **named}
