"""The job `callbacks.deliver`. It gets a thread only while its target is under the limit."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from functools import cached_property, lru_cache
from typing import Any

from celery import Celery, Task
from celery.exceptions import Reject
from celery.worker.strategy import default as celery_strategy
from prometheus_client import CollectorRegistry
from pydantic import ValidationError
from structlog.contextvars import bound_contextvars

from inferq.broker import (
    CALLBACK_JOB,
    BrokerSettings,
    Message,
    Publisher,
    backoff,
    delayed,
    job_copy,
    job_topology,
)
from inferq.broker.spans import processing_job
from inferq.consumers.callbacks.delivery import Delivery, Job
from inferq.consumers.callbacks.metrics import metrics_in
from inferq.consumers.callbacks.sending import Sender
from inferq.consumers.callbacks.settings import CallbackSettings
from inferq.consumers.callbacks.targets import Target, Targets
from inferq.consumers.probes.registry import REGISTRY
from inferq.schemas import InvalidTask, Outage, tracing
from inferq.schemas.http_url import parse_http_url
from inferq.schemas.tracing import NO_SPAN, Span, Value
from inferq.storage import (
    CallbackRecords,
    StatusIndex,
    StorageSettings,
    WebhookSecrets,
    WebhookSettings,
    open_store,
)

_log = logging.getLogger(__name__)

_BROKER_PATIENCE_SECONDS = 120.0
_ENDINGS = 4
"""Threads that record hopeless callbacks as failed; the pool's threads send."""


def add_jobs(app: Celery) -> None:
    """Add the delivery of callbacks to an application. Raises InstallationError for bad settings."""
    jobs = CallbackJobs(
        CallbackSettings.load(), BrokerSettings.load(), StorageSettings.load(), WebhookSettings.load()
    )

    def deliver(_task: Task, **arguments: Any) -> None:
        jobs.deliver(Job.model_validate(arguments))

    app.task(name=CALLBACK_JOB, bind=True, max_retries=None, Strategy=jobs.strategy, shared=False)(deliver)


class CallbackJobs:
    """What the jobs of one process share: metrics from the start, and services, created with the first job."""

    def __init__(
        self,
        settings: CallbackSettings,
        broker: BrokerSettings,
        storage: StorageSettings,
        webhooks: WebhookSettings,
        *,
        clock: Callable[[], float] = time.monotonic,
        registry: CollectorRegistry = REGISTRY,
    ) -> None:
        self._settings = settings
        self._broker = broker
        self._storage = storage
        self._webhooks = webhooks
        self._lock = threading.Lock()
        self._targets = Targets(
            threads=1,
            limit=settings.callback_target_limit,
            slow=settings.callback_timeout / 2,
            clock=clock,
        )
        self._metrics = metrics_in(registry)
        self._metrics.in_flight.set_function(lambda: float(self._targets.busy))
        self._endings = ThreadPoolExecutor(_ENDINGS, thread_name_prefix="endings")

    def strategy(self, task: Task, app: Celery, consumer: Any) -> Callable[..., None]:
        """Celery's strategy (message to pool), preceded by a check of the target.

        It runs on Celery's consuming thread, before a pool thread is taken. A thousand callbacks for a dead
        target are deferred as fast as the broker confirms (tests/callbacks/test_delivery.py).
        """
        targets = self._targets
        targets.threads = consumer.pool.limit
        deferred = self._metrics.deferred
        if "inference.callbacks" in app.amqp.queues.consume_from:
            self._delivery  # noqa: B018 - created before the first callback needs it
            self._publisher.wait_connected(_BROKER_PATIENCE_SECONDS)
        to_pool = celery_strategy(task, app, consumer)

        def handle(message: Any, body: Any, ack: Callable[..., None], reject: Callable[..., None],
                   callbacks: Any) -> None:  # fmt: skip
            def settle(put: Future[None]) -> None:
                error = put.exception()
                if error is None:
                    ack(_log, consumer.connection_errors)
                elif isinstance(error, InvalidTask):
                    _log.error("job %r cannot be published again: %s", message.headers.get("id"), error)
                    reject(_log, consumer.connection_errors)
                else:
                    _log.warning("a callback could not be deferred or failed, requeued: %s", error)
                    reject(_log, consumer.connection_errors, True)

            try:
                # Read only the URL: a deferred message is published again unchanged.
                document = json.loads(message.body)
                target = _target(document[1]["callback"]["url"])
            except (ValueError, TypeError, LookupError, RecursionError):
                document, target = None, _NO_TARGET
            delay = targets.enter(target)
            # Otherwise the backlog of a hanging target gets one attempt at a time, for months.
            hopeless = delay is not None and self._delivery.hopeless(_since(document), targets.hung(target))
            if delay is None or hopeless:
                try:
                    job = _read(message.body)
                except (ValueError, TypeError, LookupError, RecursionError) as error:
                    _log.error("job %r is not a callback, rejected: %s", message.headers.get("id"), error)
                    if delay is None:
                        targets.leave(target, None)
                    reject(_log, consumer.connection_errors)
                else:
                    if hopeless:
                        self._endings.submit(self._expire, job).add_done_callback(settle)
                    else:
                        to_pool(message, body, ack, reject, callbacks)
                return
            deferred.inc()
            body_seen = _seen(document) or bytes(message.body)
            copy = job_copy("inference.callbacks", body_seen, message.headers)
            self._put_aside(copy, delay).add_done_callback(settle)

        return handle

    def _put_aside(self, message: Message, seconds: float) -> Future[None]:
        try:
            return self._publisher.publish(delayed(message, seconds))
        except (Outage, InvalidTask) as error:
            failed: Future[None] = Future()
            failed.set_exception(error)
            return failed

    def deliver(self, job: Job) -> None:
        """Make one attempt on a pool thread; the target's slot is already reserved."""
        with bound_contextvars(**_context(job)):
            self._deliver(job)

    def _deliver(self, job: Job) -> None:
        sent = None
        try:
            with _processing(job):
                sent = self._delivery.attempt(job)
        except Outage as error:
            # The broker redelivers it, perhaps to a process that can reach the service.
            _log.warning("%s requeued: %s", job.callback.callback_id, error)
            raise Reject(error, requeue=True) from error
        except Exception as error:
            _log.exception("%s: internal error during delivery", job.callback.callback_id)
            self._put_off(job, error)
        finally:
            # Only the attempt's own time counts: a slow store does not make the target slow.
            tried = sent if sent is not None and sent.tried else None
            self._targets.leave(
                _target(job.callback.url),
                tried.attempt.seconds if tried else None,
                timed_out=tried is not None and tried.timed_out,
            )

    def _expire(self, job: Job) -> None:
        with bound_contextvars(**_context(job)):
            try:
                self._delivery.expire(job)
            except Outage:
                raise
            except Exception as error:
                _log.exception("%s: internal error while recording the failure", job.callback.callback_id)
                self._delivery.put_off(job, error)

    def _put_off(self, job: Job, error: Exception) -> None:
        try:
            self._delivery.put_off(job, error)
        except Outage:
            raise Reject(error, requeue=True) from error

    def _publish(self, message: Message) -> None:
        """Publish, and retry for two minutes. Raises Outage if RabbitMQ stays unavailable."""
        ends = time.monotonic() + _BROKER_PATIENCE_SECONDS
        failures = 0
        while True:
            try:
                self._publisher.publish(message).result()
            except Outage:
                failures += 1
                if time.monotonic() > ends:
                    raise
                time.sleep(backoff(failures))
            else:
                return

    @cached_property
    def _publisher(self) -> Publisher:
        with self._lock:
            made = self.__dict__.get("_publisher")
            if made is None:
                made = Publisher(self._broker, name="callbacks", topology=job_topology())
                made.start()
                self.__dict__["_publisher"] = made
            publisher: Publisher = made
            return publisher

    @cached_property
    def _delivery(self) -> Delivery:
        index = StatusIndex.from_settings(self._storage)
        return Delivery(
            settings=self._settings,
            secrets=WebhookSecrets(self._webhooks.webhook_secrets_file),
            sender=Sender(self._settings),
            records=CallbackRecords(open_store(self._storage), index),
            metrics=self._metrics,
            publish=self._publish,
        )


def _context(job: Job) -> dict[str, object]:
    """What the log's lines about a callback have in common."""
    callback = job.callback
    task = callback.subject_kind == "task"
    return {
        "tenant": callback.tenant,
        "task_id": callback.subject_id if task else None,
        "batch_id": None if task else callback.subject_id,
        "attempt": len(job.attempts) + 1,
        "trace_id": job.trace_context and job.trace_context.trace_id,
        "callback_id": callback.callback_id,
    }


def _processing(job: Job) -> Span:
    if not tracing.on():
        return NO_SPAN
    callback = job.callback
    about: dict[str, Value] = {
        "inferq.tenant": callback.tenant,
        f"inferq.{callback.subject_kind}.id": callback.subject_id,
        "inferq.event": callback.event,
        "inferq.attempt": len(job.attempts) + 1,
        "messaging.message.id": callback.callback_id,
    }
    return processing_job("inference.callbacks", CALLBACK_JOB, job.trace_context, about)


def _read(body: bytes | str) -> Job:
    """The arguments of a job's message. Raises ValueError, TypeError or LookupError."""
    try:
        return Job.model_validate(json.loads(body)[1])
    except ValidationError as error:
        # Pydantic's message would quote the task's values.
        places = ", ".join(".".join(map(str, fault["loc"])) for fault in error.errors()[:3])
        raise ValueError(f"wrong in {places}") from None


def _since(document: Any) -> datetime | None:
    """When the callback was first seen, from the job's message; None if it does not say."""
    try:
        since = datetime.fromisoformat(document[1]["since"])
    except (ValueError, TypeError, LookupError):
        return None
    return since if since.tzinfo is not None else None


def _seen(document: Any) -> bytes | None:
    """The message body with `since` set to now; None if it is set already or cannot be."""
    if document is None or _since(document) is not None:
        return None
    document[1]["since"] = datetime.now(UTC).isoformat()
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")


_NO_TARGET: Target = ("", "", 0)
"""The target of an invalid URL. Sending refuses it without opening a connection."""


@lru_cache(4096)
def _target(url: str) -> Target:
    try:
        return parse_http_url(url).origin
    except InvalidTask:
        return _NO_TARGET
