"""The Celery application: callbacks, the feeding of batches, nightly starts.

It runs on the same broker as the tasks: quorum queues, confirmed publishes, late acks, and delays by Celery's
native delayed delivery, whose messages rest in quorum queues of the broker and not in anybody's memory.
What is rejected, such as a job that nobody knows here, the broker keeps in `inference.unroutable`.
https://docs.celeryq.dev/en/stable/getting-started/backends-and-brokers/rabbitmq.html
"""

from __future__ import annotations

import inspect
import logging
import ssl
from collections.abc import Callable
from typing import Any, get_type_hints
from urllib.parse import quote

from celery import Celery, Task
from celery.worker.consumer import Consumer
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
    """An application without jobs; those are added by the functions in entry-point group `inferq.jobs`."""
    app = Celery("inferq", set_as_current=False)
    exchange = Exchange(JOBS, type="topic")
    app.conf.update(
        broker_url=[_url(settings, number) for number in range(len(settings.connections("jobs")))],
        broker_use_ssl=_tls(settings),
        broker_heartbeat=settings.amqp_heartbeat,
        broker_connection_timeout=settings.amqp_connect_timeout,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        # RabbitMQ closes the channel on which a job lasts longer than its consumer_timeout: Celery would end.
        broker_channel_error_retry=True,
        broker_transport_options={"confirm_publish": True},
        task_queues=[
            Queue(name, exchange, routing_key=name, queue_arguments=job_queue_arguments())
            for name in JOB_QUEUES
        ],
        task_default_queue=JOB_QUEUES[0],
        task_default_queue_type="quorum",
        task_default_exchange=JOBS,
        task_default_exchange_type="topic",
        task_create_missing_queues=False,
        task_acks_late=True,
        # What a job itself did not foresee (arguments of another version, say) is kept, not thrown away.
        task_acks_on_failure_or_timeout=False,
        task_reject_on_worker_lost=True,
        task_ignore_result=True,
        task_publish_retry=True,
        worker_prefetch_multiplier=1,
        worker_consumer="inferq.broker.celery_app:KeepingConsumer",
        # They would need queues that are neither durable nor quorum, which RabbitMQ is about to give up.
        worker_enable_remote_control=False,
        worker_send_task_events=False,
        worker_hijack_root_logger=False,
        accept_content=["json"],
        timezone="UTC",
    )
    return app


class UnreadableJob(Exception):
    """The message is no job that this process knows."""


class KeepingConsumer(Consumer):  # type: ignore[misc]
    """Celery's consumer, except that it rejects whatever is no job of its own: the broker keeps that.

    Celery's acknowledges what it cannot decode, and ends on a message that is not as its own would be.
    """

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
                self._put_aside(message, error)
            else:
                handle(message)

        return on_message

    def on_decode_error(self, message: Any, exc: Exception) -> None:
        self._put_aside(message, exc)

    def _put_aside(self, message: Any, error: Exception) -> None:
        _log.error("message %r is no job, the broker keeps it: %s", message.headers.get("id"), error)
        message.reject_log_error(_log, self.connection_errors)


def read_job(message: Any, arguments: dict[str, type[BaseModel]]) -> JobHeaders:
    """The headers of kombu's message, if it is one of these jobs with its arguments.

    Raises UnreadableJob, which names what is wrong, and not what stands there: it may be somebody's.
    """
    try:
        headers = JobHeaders.model_validate(message.headers)
    except ValidationError as error:
        raise UnreadableJob(f"wrong in its headers: {_places(error)}") from None
    if headers.task not in arguments:
        raise UnreadableJob(f"the job {headers.task!r} is not known here")
    try:
        body = message.decode()
    except Exception as error:  # whatever the decoder of a content type that anybody may name raises
        raise UnreadableJob(f"its body cannot be decoded: {type(error).__name__}") from None
    match body:
        case [[], dict(given), dict(embedded)] if not any(embedded.values()):
            pass
        case _:
            raise UnreadableJob("its body is not [[], {argument: value}, {}]")
    try:
        arguments[headers.task].model_validate(given)
    except ValidationError as error:
        raise UnreadableJob(f"wrong in the arguments of {headers.task}: {_places(error)}") from None
    return headers


def _places(error: ValidationError) -> str:
    return ", ".join(".".join(map(str, fault["loc"]))[:100] for fault in error.errors()[:3])


def _arguments_model(task: Task) -> type[BaseModel]:
    """A model of a job's keyword arguments, by its signature: what it takes has the types that it says."""
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
    """Kombu's TLS, except that each node of the broker has to show a certificate for its own name.

    Kombu checks no name unless it is told one, and then the first node's for all of them.
    """

    def establish_connection(self) -> Any:
        client: Any = self.client
        hostname = client.hostname
        client.ssl = {**client.ssl, "server_hostname": hostname}
        try:
            return super().establish_connection()  # type: ignore[no-untyped-call]
        finally:
            client.hostname = hostname  # kombu makes an address of localhost, which is another name


# The scheme is all that kombu goes by when it moves on to the next node.
TRANSPORT_ALIASES[_TLS_SCHEME] = f"{__name__}:{CheckingTransport.__name__}"


def _url(settings: BrokerSettings, number: int) -> str:
    """The URL as Celery reads it: without the query, which means other things there."""
    parameters = settings.connections("jobs")[number]
    credentials = parameters.credentials
    if not isinstance(credentials, PlainCredentials):
        raise InstallationError("INFERQ_AMQP_URL names no user and password, which Celery needs")
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
