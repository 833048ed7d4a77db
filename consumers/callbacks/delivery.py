"""Delivers callbacks: one attempt, then its record, the next attempt or the failure."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from pydantic import AwareDatetime, JsonValue

from inferq.broker import Message, callback_message, delayed
from inferq.broker.spans import job_trace
from inferq.consumers.callbacks.decision import (
    JITTER,
    MAX_RETRY_AFTER,
    Again,
    Decision,
    Delivered,
    GivenUp,
    after_attempt,
)
from inferq.consumers.callbacks.metrics import CallbackMetrics
from inferq.consumers.callbacks.sending import Sender, Sent
from inferq.consumers.callbacks.settings import CallbackSettings
from inferq.schemas import (
    Callback,
    CallbackAttempt,
    CallbackRecord,
    CallbackState,
    InferqError,
    InvalidTask,
    Outage,
    Record,
    tracing,
)
from inferq.schemas.http_url import parse_http_url
from inferq.schemas.logs import fields
from inferq.schemas.trace_context import TraceContext
from inferq.schemas.tracing import Span
from inferq.storage import CallbackRecords, WebhookSecrets

_log = logging.getLogger(__name__)

_CARRIED_RESPONSE = 200
"""Characters of each response that travel with a callback, which may have dozens of attempts."""

_LATER_SECONDS = 30.0
"""Seconds until the next try to record a failure while the object store is unavailable."""

_AFTER_FAULT_SECONDS = 60.0

_HUNG_SECONDS = 6 * 3600.0
"""How long every attempt at a target must have timed out before its overdue callbacks fail."""


class Job(Record):
    """The arguments of the job `callbacks.deliver`.

    `since`: when this process group first saw the callback. `trace`: the headers of a trace.
    """

    callback: Callback
    attempts: tuple[CallbackAttempt, ...] = ()
    resent_at: AwareDatetime | None = None
    since: AwareDatetime | None = None
    trace: JsonValue = None

    @property
    def trace_context(self) -> TraceContext | None:
        """The span that sent the callback: every attempt is its child."""
        return job_trace(self.trace)

    def message(self) -> Message:
        return callback_message(
            self.callback,
            attempts=self.attempts,
            resent_at=self.resent_at,
            since=self.since or datetime.now(UTC),
            more=self.model_extra or {},
            trace=self.trace_context,
        )


@dataclass(frozen=True)
class Delivery:
    """Makes single attempts. `publish` returns once the broker has confirmed the message."""

    settings: CallbackSettings
    secrets: WebhookSecrets
    sender: Sender
    records: CallbackRecords
    metrics: CallbackMetrics
    publish: Callable[[Message], None]

    def attempt(self, job: Job) -> Sent | None:
        """Make one attempt and record or schedule what follows. The job can be acknowledged afterwards.

        Returns the attempt, or None if nothing was sent. Raises Outage if the broker did not confirm the next
        attempt's message.
        """
        schedule = self.settings.callback_schedule
        if job.attempts:
            if self._is_delivered(job):
                return None
            decision = after_attempt(job.attempts, schedule)
            if isinstance(decision, GivenUp):  # decided before, but the failure could not be recorded
                self._follow(job, decision)
                return None
        sent = self._send(job)
        # The attempts travel with the callback, since Redis may lose them.
        job = job.model_copy(update={"attempts": (*job.attempts, _carried(sent.attempt))})
        chance = random.random()  # noqa: S311 - jitter, not a secret
        decision = after_attempt(job.attempts, schedule, retry_after=sent.retry_after, chance=chance)
        self._follow(job, decision)
        _log_attempt(job, sent.attempt, decision)
        return sent

    def overdue(self, since: datetime | None) -> bool:
        """Whether a callback first seen at `since` is past its schedule and the longest `Retry-After`."""
        return since is not None and datetime.now(UTC) - since > timedelta(seconds=self._patience)

    def hopeless(self, since: datetime | None, hung: float) -> bool:
        """Whether to fail an overdue callback whose target has timed out for `hung` seconds.

        After an outage on our side all callbacks are overdue; the target then gets time to accept them.
        """
        return hung > min(self._patience, _HUNG_SECONDS) and self.overdue(since)

    @property
    def _patience(self) -> float:
        return sum(self.settings.callback_schedule) * (1 + JITTER) + MAX_RETRY_AFTER

    def expire(self, job: Job) -> None:
        """Record a hopeless callback as failed. Raises Outage, like `attempt`."""
        seen = f" since {job.since:%Y-%m-%d %H:%M} UTC" if job.since is not None else ""
        self._give_up(
            job,
            f"its target keeps timing out, and other callbacks wait for it: {len(job.attempts)} attempts{seen}",
        )

    def put_off(self, job: Job, error: Exception) -> None:
        """Retry later after an internal error. It counts as an attempt, so the schedule still ends.

        Raises Outage if the broker did not confirm the next attempt's message.
        """
        why = _internal(error)
        if len(job.attempts) < len(self.settings.callback_schedule):
            job = job.model_copy(update={"attempts": (*job.attempts, _unsent(why).attempt)})
        self.publish(delayed(job.message(), _AFTER_FAULT_SECONDS))
        due = datetime.now(UTC) + timedelta(seconds=_AFTER_FAULT_SECONDS)
        try:
            self._note(_record(job, "waiting", next_at=due, reason=why))
        except Exception:  # it may be the same error, and the next attempt is already published
            _log.exception("%s: the retry is not recorded", job.callback.callback_id)

    def _send(self, job: Job) -> Sent:
        try:
            return self._sign_and_send(job.callback, job.trace_context)
        except Exception as error:
            _log.exception("%s: internal error during an attempt", job.callback.callback_id)
            return _unsent(_internal(error))

    def _sign_and_send(self, callback: Callback, trace: TraceContext | None) -> Sent:
        try:
            secrets = self.secrets.of(callback.tenant)
        except InferqError as error:
            return _unsent(error.message)
        if not secrets:
            return _unsent(
                f"no_secret: tenant {callback.tenant!r} has no webhook secret, and callbacks are never sent unsigned; "
                f"create one: inferq secrets rotate {callback.tenant}"
            )
        with tracing.span("POST", "client", attributes=lambda: {"http.request.method": "POST"}) as span:
            sent = self.sender.send(callback, secrets, trace=span.context or trace)
            _describe(span, callback, sent.attempt)
        self.metrics.seconds.observe(sent.attempt.seconds)
        return sent

    def _follow(self, job: Job, decision: Decision) -> None:
        match decision:
            case Delivered():
                self._note(_record(job, "delivered"))
                last = len(job.attempts) >= len(self.settings.callback_schedule)
                if job.resent_at is not None or last or self.overdue(job.since):
                    # A crash between recording a failure and the ack leaves a failure record.
                    self._drop(job)
                self.metrics.outcomes.labels("delivered").inc()
            case Again(seconds):
                # Publish the next attempt, then ack. A crash in between sends it twice with the same id.
                self.publish(delayed(job.message(), seconds))
                due = datetime.now(UTC) + timedelta(seconds=seconds)
                self._note(_record(job, "waiting", next_at=due, reason=job.attempts[-1].error))
                self.metrics.outcomes.labels("again").inc()
            case GivenUp(reason):
                self._give_up(job, reason)

    def _is_delivered(self, job: Job) -> bool:
        """Whether another copy of the job, or a resent one, was delivered meanwhile."""
        try:
            known = self.records.known(job.callback)
        except Outage:
            return False
        if known is None or known.state != "delivered":
            return False
        return job.resent_at is None or (known.resent_at is not None and known.resent_at >= job.resent_at)

    def _give_up(self, job: Job, reason: str) -> None:
        if self._is_delivered(job):
            return
        record = _record(job, "failed", reason=reason)
        callback = job.callback
        try:
            self.records.keep(record)
        except Outage as error:
            _log.warning("%s: the failure cannot be recorded, retrying: %s", callback.callback_id, error)
            self.publish(delayed(job.message(), _LATER_SECONDS))
            return
        _log.warning(
            "callback %s of %s %r (%s) failed for good",
            callback.callback_id, callback.subject_kind, callback.subject_id, callback.event,
        )  # fmt: skip
        self._note(record)
        self.metrics.outcomes.labels("failed").inc()

    def _note(self, record: CallbackRecord) -> None:
        try:
            self.records.note(record)
        except Outage as error:  # only an index
            _log.debug("not recorded in Redis: %s", error)

    def _drop(self, job: Job) -> None:
        try:
            self.records.drop(_record(job, "delivered"))
        except Outage as error:
            what = job.callback.callback_id
            _log.warning("%s was delivered, but its failure record could not be deleted: %s", what, error)


def _log_attempt(job: Job, attempt: CallbackAttempt, decision: Decision) -> None:
    """One line, without the URL. The error names only its kind: what follows the colon may quote the URL."""
    match decision:
        case Delivered():
            outcome, wait = "delivered", None
        case Again(seconds):
            outcome, wait = "again", round(seconds)
        case GivenUp():
            outcome, wait = "failed", None
    more = fields(
        outcome=outcome,
        next_seconds=wait,
        event=job.callback.event,
        status=attempt.status,
        error=attempt.error.partition(": ")[0] if attempt.error else None,
        seconds=attempt.seconds,
    )
    _log.info("callback %s", outcome, extra=more)


def _describe(span: Span, callback: Callback, attempt: CallbackAttempt) -> None:
    """Say in the span whom it called and what came back; of the URL only the host, as the rest may be a secret."""
    if not span.recording:
        return
    with suppress(InvalidTask):
        url = parse_http_url(callback.url)
        span.set("server.address", url.host)
        span.set("server.port", url.port)
    span.set("http.response.status_code", attempt.status)
    if attempt.status is None or attempt.status >= 400:
        span.fail(str(attempt.status or "no_response"))


def _internal(error: Exception) -> str:
    """Only the error's type: the task's owner sees it, and the message may name internals."""
    return f"internal: {type(error).__name__}"


def _unsent(why: str) -> Sent:
    return Sent(CallbackAttempt(at=datetime.now(UTC), seconds=0.0, error=why), tried=False)


def _carried(attempt: CallbackAttempt) -> CallbackAttempt:
    response = attempt.response
    return attempt.model_copy(update={"response": response[:_CARRIED_RESPONSE]}) if response else attempt


def _record(
    job: Job, state: CallbackState, *, next_at: datetime | None = None, reason: str | None = None
) -> CallbackRecord:
    return CallbackRecord(
        **job.callback.model_dump(include=set(Callback.model_fields)),
        state=state,
        attempts=job.attempts,
        next_at=next_at,
        reason=reason,
        resent_at=job.resent_at,
        updated_at=datetime.now(UTC),
    )
