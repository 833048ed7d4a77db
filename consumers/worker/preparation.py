"""What comes before a run: gathers the facts, fetches inputs early, and records that the run begins."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial

from inferq.broker import Delivery
from inferq.consumers.runtime.process import LOOK_SECONDS, RunAborted
from inferq.consumers.worker.computation import Computation
from inferq.consumers.worker.decision import (
    LEASE_SECONDS,
    MAX_WAITS,
    SAME_WORK_PATIENCE,
    TAKE_OVER_SECONDS,
    Facts,
    Run,
    WaitForSameWork,
    before_run,
)
from inferq.consumers.worker.endings import Endings
from inferq.consumers.worker.engine_supervisor import EngineLease, NotStarted
from inferq.consumers.worker.inputs import Inputs
from inferq.consumers.worker.services import WorkerServices
from inferq.schemas import Task, tracing
from inferq.storage import CommandGroup

SAME_WORK_LOOK_SECONDS = 0.1
"""How often the result cache is looked into while a run of another task computes the same."""


class Preparation:
    """Prepares one run; `run` is its token.

    `started_at` is the time of the run's latest beginning. `has_task_lease` says whether the status index gave the
    run the lease of its task. `patience_ends`: until when (monotonic) a run of another task that computes the same is
    waited for on the spot.
    """

    def __init__(
        self,
        services: WorkerServices,
        engine_lease: EngineLease,
        delivery: Delivery,
        computation: Computation,
        *,
        task: Task,
        digest: str,
        run: str,
        endings: Endings,
        started_at: datetime,
        trace_id: str | None = None,
    ) -> None:
        self._services = services
        self._engine_lease = engine_lease
        self._delivery = delivery
        self._computation = computation
        self._task = task
        self._digest = digest
        self._run = run
        self._trace_id = trace_id
        self._load_end = partial(endings.load, task.tenant, task.task_id, computation.require_message)
        self._begun = False
        self.started_at = started_at
        self.has_task_lease = False
        self.patience_ends = float("-inf")

    def first_facts(self) -> Facts:
        """What the task and its delivery say."""
        return Facts(
            task=self._task,
            digest=self._digest,
            type_name=self._services.task_type.name,
            redrives=self._delivery.redrives,
            now=self.started_at,
            deliveries=self._delivery.deliveries,
            waits=self._delivery.waits,
        )

    def facts(self) -> tuple[Facts, Future[Inputs] | None]:
        """The facts that decide whether to run, and the inputs if they were fetched early.

        Raises NotStarted, GracePassed and UnreadableResult.
        """
        services, task, delivery = self._services, self._task, self._delivery
        facts = self.first_facts()
        # A download must not keep the engine from a task that is ready for it. The cache knows a task by its inputs.
        fetches_first = bool(task.inputs()) and (
            services.settings.take_ahead
            or self._engine_lease.group_size > 1
            or self._computation.may_be_cached
        )
        if not fetches_first and self._engine_lease.acquire(alone=delivery.redelivered):
            # The engine reads the task, and the store is asked, while Redis answers.
            facts, fetched = self._gather_and_fetch(facts, self._begin())
        else:
            # The run begins once the engine is this task's. Everything that needs no engine is done before.
            self._engine_lease.step_aside()
            facts, fetched = self._gather_and_fetch(facts, _as_is)
            if isinstance(before_run(facts), Run) and not failed_to_fetch(fetched):
                self.await_engine()
            facts = self.begin(facts, fetched)()
        if facts.other_run and delivery.redelivered and facts.ended is None:
            facts = self._watch_other_run(facts)
        elif isinstance(before_run(facts), WaitForSameWork):
            facts = self._await_same_work(facts, fetched)
        return facts, fetched

    def await_engine(self) -> bool:
        """Wait until the engine is held; False if the task is cancelled first. Raises NotStarted."""
        with tracing.span("wait for engine"):
            while True:
                if self._services.stopping:
                    raise NotStarted("the worker is stopping")
                self._computation.require_message()
                if self._engine_lease.acquire(LOOK_SECONDS, alone=self._delivery.redelivered):
                    return True
                if self._computation.abort_reason() == "cancelled":
                    return False

    def release_run(self, *, keep_run: bool = False) -> None:
        """Say that the run is not orphaned, if it has begun; `keep_run` as in `Computation.release_run`."""
        if self._begun:
            self._computation.release_run(keep_run=keep_run)

    def begin(
        self, facts: Facts, fetched: Future[Inputs] | None, group: CommandGroup | None = None
    ) -> Callable[[], Facts]:
        """The run begins now, with the facts that are known. Calling the result completes them by the index's reply.

        With a `group`, the request is sent with the group.
        """
        self.started_at = datetime.now(UTC)
        with_record = self._begin(fetched, group)

        def completed() -> Facts:
            complete = with_record(replace(facts, now=self.started_at))
            if complete.ended is None and complete.orphaned_runs is None:
                # The index did not count the run: another copy of the task may have ended meanwhile.
                complete = replace(complete, ended=self._load_end())
            return complete

        return completed

    def _begin_now(self, facts: Facts) -> Facts:
        self.started_at = datetime.now(UTC)
        return self._begin()(replace(facts, now=self.started_at))

    def _begin(
        self, fetched: Future[Inputs] | None = None, group: CommandGroup | None = None
    ) -> Callable[[Facts], Facts]:
        """Record in the status index that a run begins. Returns a function that adds the index's reply."""
        services, task, delivery = self._services, self._task, self._delivery
        reply = None
        if task.task_type == services.task_type.name:
            first, self._begun = not self._begun, True
            if first:
                self._computation.start_renewing()
            reply = services.best_effort(
                partial(
                    services.status.begin_pipelined,
                    task,
                    attempt=delivery.attempt,
                    redrives=delivery.redrives,
                    worker=services.settings.worker_name,
                    started_at=self.started_at,
                    digest=self._digest,
                    run=self._run,
                    silence=TAKE_OVER_SECONDS if delivery.redelivered else LEASE_SECONDS,
                    repeats=delivery.waits >= MAX_WAITS,
                    trace_id=self._trace_id,
                    work=None if failed_to_fetch(fetched) else self._computation.work(fetched),
                    work_seconds=self._computation.time_limit + 60,
                    work_silence=LEASE_SECONDS,
                    group=group,
                )
            )
            if first and group is None and self._engine_lease.held:
                self._engine_lease.engine.prepare(delivery.body.decode())

        def with_record(facts: Facts) -> Facts:
            begun = services.call_or_skip(reply) if reply else None
            if begun is None:
                return replace(facts, other_run="", past=False, same_work=None)
            self.has_task_lease = not (begun.other_run or begun.past or begun.same_work is not None)
            if begun.same_work is not None:
                self.patience_ends = time.monotonic() + SAME_WORK_PATIENCE - begun.same_work
            return replace(
                facts,
                recorded_digest=begun.digest,
                cancel_requested=begun.cancel_requested,
                orphaned_runs=begun.orphaned_runs,
                other_run=begun.other_run,
                past=begun.past,
                same_work=begun.same_work,
            )

        return with_record

    def _watch_other_run(self, facts: Facts) -> Facts:
        """Look again until the other run gives a sign of life, or is silent for so long that this one begins.

        The message was redelivered: the worker of the other run was killed, or it lost its connection and goes on.
        """
        seen = facts.other_run
        while facts.other_run == seen:
            self._computation.require_message()
            self._services.sleep(LOOK_SECONDS, self._services.unless_stopping)
            facts = self._begin_now(facts)
        # It may have ended meanwhile.
        return replace(facts, ended=self._load_end())

    def _await_same_work(self, facts: Facts, fetched: Future[Inputs] | None) -> Facts:
        """Wait a moment for the answer of the run that computes the same, and begin with it.

        The engine is free meanwhile.
        """
        self._engine_lease.release()
        try:
            while not self._computation.find():
                if time.monotonic() >= self.patience_ends or self._services.stopping:
                    return facts
                self._services.sleep(SAME_WORK_LOOK_SECONDS, self._computation.checkpoint)
        except RunAborted as aborted:
            if aborted.reason == "cancelled":
                return replace(facts, cancel_requested=True)
            raise
        return self.begin(facts, fetched)()

    def _gather_and_fetch(
        self, facts: Facts, with_record: Callable[[Facts], Facts]
    ) -> tuple[Facts, Future[Inputs] | None]:
        """Add an earlier result and `with_record` to the facts, and fetch the inputs at the same time.

        Mostly there is no earlier result. The inputs are None if there are none, or if no run will need them.
        """
        if self._services.store.remote:
            # The index may spare the round trip.
            facts = with_record(facts)
            with_record = _as_is
            if self._is_new(facts):
                fetches = facts.task.inputs() and isinstance(before_run(facts), Run)
                return facts, self._computation.fetch_early() if fetches else None
        if not facts.task.inputs():
            # Another thread would cost a small task more than it saves.
            ended = self._load_end()
            return replace(with_record(facts), ended=ended), None
        looked_up = self._services.in_background(self._load_end)
        facts = with_record(facts)
        fetched = self._computation.fetch_early() if isinstance(before_run(facts), Run) else None
        return replace(facts, ended=looked_up.result()), fetched

    def _is_new(self, facts: Facts) -> bool:
        """Whether the task has no earlier end: the index knows it, and knows of no run before this one."""
        if not self.may_be_new:
            return False
        if facts.recorded_digest is not None:
            return facts.recorded_digest == self._digest and facts.orphaned_runs == 0
        task = self._task
        are_new = partial(self._services.status.are_new, [(task.tenant, task.task_id, self._digest)])
        return self._services.best_effort(are_new) == [True]

    @property
    def may_be_new(self) -> bool:
        """Whether its delivery is the first one of the task, as far as RabbitMQ knows."""
        delivery = self._delivery
        return not delivery.redelivered and delivery.attempt == 1 and delivery.redrives == 0


def _as_is(facts: Facts) -> Facts:
    return facts


def failed_to_fetch(fetched: Future[Inputs] | None) -> bool:
    """Whether the inputs were fetched early and that failed: the engine is not needed to say so."""
    return fetched is not None and fetched.exception() is not None
