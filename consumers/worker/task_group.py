"""Several deliveries of one lane from their arrival to their acknowledgement, together.

The story of `task_run`, told for a group: what costs a round trip, a flush or a call of the engine is done once for
all. Each task still decides, fails, is cancelled and is recorded by itself. A task that began before and never ended is
computed alone: it may end its worker, and neighbours must not be blamed for that. With the result cache, one of those
that ask for the same is computed, and the others take its result.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial

from inferq.broker import Consumer
from inferq.consumers.runtime.messages import Alone, Done, Failed, Job
from inferq.consumers.runtime.runs import LOOK_SECONDS, AbortReason, BatchHooks, RunAborted
from inferq.consumers.worker.attempt import Answer, Attempt, Success
from inferq.consumers.worker.attempt_report import Outcome
from inferq.consumers.worker.decision import Facts, Run, WaitForSameWork, before_run
from inferq.consumers.worker.engine_supervisor import BatchEndedEngine, EngineLease, NotStarted
from inferq.consumers.worker.inputs import Inputs
from inferq.consumers.worker.preparation import SAME_WORK_LOOK_SECONDS
from inferq.consumers.worker.services import WorkerServices
from inferq.consumers.worker.task_run import TaskRun
from inferq.schemas import InvalidTask, Result, TransientFailure
from inferq.storage import CommandGroup, UnreadableResult

_PATIENCE_SECONDS = 1.0
"""How long a group waits for the engine before it leaves further tasks to other workers."""

_NO_INPUTS: Future[Inputs] = Future()
_NO_INPUTS.set_result(Inputs({}, 0.0))


@dataclass
class _Member:
    """A run of the group, and what is known of it so far. `follows`: another run computes the same."""

    run: TaskRun
    attempt: Attempt
    facts: Facts
    fetched: Future[Inputs] | None = None
    answer: Answer | Alone | None = None
    job: Job | None = None
    follows: bool = False


class TaskGroup:
    """Brings deliveries to their ends. `complete` settles them all, whatever happens on the way.

    `more` gives deliveries that have arrived since, at most as many as it is asked for: they join while the group
    waits for the engine.
    """

    def __init__(
        self,
        services: WorkerServices,
        consumer: Consumer,
        lease: EngineLease,
        runs: Sequence[TaskRun],
        more: Callable[[int], Sequence[TaskRun]],
    ) -> None:
        self._services = services
        self._consumer = consumer
        self._lease = lease
        self._more = more
        self.runs = list(runs)
        self._members: list[_Member] = []
        self._next_look = time.monotonic() + LOOK_SECONDS
        self._patience_ends = time.monotonic() + _PATIENCE_SECONDS
        self._leaving: list[Future[None]] = []

    def complete(self) -> None:
        """Do everything that these deliveries need, settle them, and log their ends."""
        self._together(partial(self._admit, self.runs))
        self._together(self._await_engine)
        self._together(self._begin)
        self._together(self._compute)
        self._lease.release()
        self._consumer.look_early()
        self._together(self._record)
        self._together(self._follow)
        self._settle()

    def _together(self, step: Callable[[], None]) -> None:
        """Take a step for all. What it raises ends every run that has not ended."""
        if self.runs and all(run.outcome is not None for run in self.runs):
            return
        try:
            step()
        except Exception as error:
            for run in self.runs:
                run.take(partial(_raise, error))

    @property
    def _open(self) -> list[_Member]:
        return [member for member in self._members if member.run.outcome is None]

    # Before the engine is theirs.

    def _admit(self, runs: Sequence[TaskRun]) -> None:
        """Read the messages, look for earlier results, and fetch the inputs side by side."""
        admitted = []
        for run in runs:
            if run.attempt is None:
                run.take(run.read)
            if run.may_end_workers:
                run.complete()
                continue
            run.joined = True
            if run.attempt is not None and run.outcome is None:
                admitted.append(_Member(run, run.attempt, run.attempt.preparation.first_facts()))
        self._members += admitted
        if not admitted:
            return
        looked_up = self._may_have_ended(admitted)
        tasks = [(member.attempt.task.tenant, member.attempt.task.task_id) for member in looked_up]
        load = partial(self._services.results.load_many, tasks)
        ends = self._services.retry_until_available("object store", load, self._services.unless_stopping)
        for member, end in zip(looked_up, ends, strict=True):
            if isinstance(end, Exception):
                member.run.take(partial(_raise, end))
            else:
                member.facts = replace(member.facts, ended=end)
        # Otherwise a worker with a full disk would spend the attempts of task after task.
        self._services.retry_until_available(
            "scratch folder", self._services.scratch.check, self._services.unless_stopping
        )
        wanting = []
        for member in admitted:
            if not member.attempt.task.inputs():
                member.fetched = _NO_INPUTS
            elif member.run.outcome is None and isinstance(before_run(member.facts), Run):
                wanting.append(member)
        if wanting:
            self._lease.step_aside()  # a download must not keep the engine from tasks that are ready for it
        for fetched in [self._services.in_background(partial(self._fetch, member)) for member in wanting]:
            fetched.result()

    def _may_have_ended(self, members: Sequence[_Member]) -> Sequence[_Member]:
        """Those whose earlier end is to be looked for. Where that is a round trip, the index may spare it."""
        candidates = [member for member in members if member.attempt.preparation.may_be_new]
        if not (self._services.store.remote and candidates):
            return members
        tasks = [(m.facts.task.tenant, m.facts.task.task_id, m.facts.digest) for m in candidates]
        are_new = self._services.best_effort(partial(self._services.status.are_new, tasks)) or []
        new = {member.run for member, is_new in zip(candidates, are_new, strict=False) if is_new}
        return [member for member in members if member.run not in new]

    def _fetch(self, member: _Member) -> None:
        def fetch() -> None:
            # An error counts only once the run has begun.
            member.fetched = member.attempt.computation.fetch_early()

        member.run.take(fetch)

    def _await_engine(self) -> None:
        """Wait for the engine. Others may join meanwhile; cancelled tasks leave."""
        patience = self._services.settings.batch_wait
        while self._open and not self._lease.acquire():
            if self._services.stopping:
                raise NotStarted("the worker is stopping")
            # A download of one that joins would keep the others waiting.
            grows = patience and not any(member.attempt.task.inputs() for member in self._open)
            room = self._lease.group_size - len(self._open) if grows else 0
            if room > 0:
                joining = self._more(room)
                self.runs += joining
                self._admit(joining)
            if self._lease.acquire(patience if room > 0 else LOOK_SECONDS):
                return
            if room <= 0 and time.monotonic() >= self._patience_ends:
                self._patience_ends = math.inf
                self._consumer.pause()  # what has arrived for this slot would wait here, while other workers are idle
            if time.monotonic() >= self._next_look:
                self._next_look = time.monotonic() + LOOK_SECONDS
                members = self._open
                for place, reason in self._aborts(members).items():
                    self._abort(members[place], RunAborted(reason))

    def _abort(self, member: _Member, aborted: RunAborted) -> None:
        """End a run that has to stop: by a cancel for good, else it is given back."""
        if aborted.reason == "cancelled":
            member.run.take_attempt(lambda attempt: attempt.conclude(aborted))
        elif aborted.reason == "urgent":
            member.run.take(partial(_raise, NotStarted("a more urgent task waits")))
        else:
            member.run.take(partial(_raise, aborted))

    def _begin(self) -> None:
        """Record that the runs begin, in one round trip, and end those that are not to be computed."""
        group = self._services.status.group()
        begun = [
            (member, member.attempt.preparation.begin(member.facts, member.fetched, group))
            for member in self._open
        ]
        self._services.best_effort(group.send)
        for member, reply in begun:
            member.run.take(partial(self._decide, member, reply))

    def _decide(self, member: _Member, reply: Callable[[], Facts]) -> Outcome | None:
        member.facts = reply()
        member.follows = isinstance(before_run(member.facts), WaitForSameWork)
        if member.follows:
            return None  # its answer is due once the others are on record
        return member.attempt.decide(member.facts, member.fetched)

    # While the engine is theirs.

    def _compute(self) -> None:
        """Have the tasks computed together. What fails a whole batch is no task's fault: each runs alone then."""
        members = [member for member in self._open if not member.follows]
        if self._services.cache is None:
            for member in members:
                self._give(member)
        else:
            wait([self._services.in_background(partial(self._give, member)) for member in members])
        computing = [member for member in members if member.run.outcome is None and member.answer is None]
        if len(computing) == 1:
            self._compute_alone(computing[0])
        elif computing:
            jobs = [member.job for member in computing if member.job is not None]
            self._compute_together(computing, jobs)
            self._compute_each([member for member in computing if isinstance(member.answer, Alone)])

    def _compute_each(self, members: Sequence[_Member]) -> None:
        """Compute tasks by themselves whose batch failed. What is known by then does not wait for them."""
        for number, member in enumerate(members):
            self._record()
            waiting = members[number:]
            for place, reason in self._aborts(waiting).items():
                self._abort(waiting[place], RunAborted(reason))
            self._compute_alone(member)

    def _give(self, member: _Member) -> None:
        """Make the job of a task whose inputs are there, and that the cache cannot answer."""

        def give(attempt: Attempt) -> None:
            try:
                inputs = attempt.inputs(member.fetched)
            except (InvalidTask, TransientFailure) as error:
                member.answer = error
                return
            member.answer = attempt.computation.from_cache(inputs.files)
            if member.answer is None:
                member.job = attempt.computation.job(inputs.files)

        member.run.take_attempt(give)

    def _compute_together(self, members: Sequence[_Member], jobs: Sequence[Job]) -> None:
        hooks = BatchHooks(
            progress=lambda place, fraction, note: members[place].attempt.computation.progress(
                fraction, note
            ),
            aborts=lambda: self._aborts(members),
            ended=lambda place, answer: self._ended(members[place], answer),
        )
        arrived = min(member.run.arrived_at for member in members)
        self._services.metrics.batch_waited(
            self._services.task_type.name, max(0.0, (datetime.now(UTC) - arrived).total_seconds())
        )
        with self._lease.computing(tasks=len(jobs)):
            try:
                self._lease.engine.run_batch(
                    jobs,
                    watch=hooks,
                    abort_grace=self._services.settings.abort_grace,
                    most=self._lease.group_size,
                )
            finally:
                wait(self._leaving)
        sizes = Counter(
            member.answer.batch_size for member in members if isinstance(member.answer, Done | Failed)
        )
        exhausted = sum(isinstance(m.answer, Alone) and m.answer.reason == "out_of_memory" for m in members)
        self._lease.note_batches(sizes, exhausted=exhausted)

    def _ended(self, member: _Member, answer: Done | Failed | RunAborted | Alone) -> None:
        if isinstance(answer, Done | Failed):
            member.attempt.computation.computed(answer.seconds / answer.batch_size)
        member.answer = answer
        if isinstance(answer, RunAborted):
            # Its record does not wait for its neighbours, and they do not wait for its record.
            self._leaving.append(self._services.aside(partial(self._abort, member, answer)))

    def _compute_alone(self, member: _Member) -> None:
        """Compute a task by itself, or give it back if its batch ended the engine: it comes back as redelivered."""

        def compute() -> None:
            if not self._lease.usable:
                raise BatchEndedEngine("the engine ended while it computed the task's batch")
            member.answer = member.attempt.compute(member.fetched)

        member.run.take(compute)

    def _aborts(self, members: Sequence[_Member]) -> Mapping[int, AbortReason]:
        """The members whose run has to stop, by their place. Renews the leases, in one round trip."""
        if self._services.grace_passed:
            return dict.fromkeys(range(len(members)), "shutdown")
        group = self._services.status.group()
        asked = {
            place: member.attempt.computation.ask_cancelled(group)
            for place, member in enumerate(members)
            if member.run.outcome is None and (member.answer is None or isinstance(member.answer, Alone))
        }
        self._services.best_effort(group.send)
        reasons: dict[int, AbortReason] = {}
        if self._consumer.urgent_waits(self.runs[0].delivery.queue):
            reasons = dict.fromkeys(asked, "urgent")
        reasons.update((place, "cancelled") for place, cancelled in asked.items() if cancelled())
        return reasons

    # After the engine is free.

    def _record(self) -> None:
        """Put the successes on record together, and bring every other answer to its end.

        First what is ready: nobody's upload, retry or outage keeps the result of another.
        """
        done = [member for member in self._open if isinstance(member.answer, Done)]
        uploading = [member for member in done if member.answer.artifacts]  # type: ignore[union-attr]
        uploads = [self._services.in_background(partial(self._conclude, member)) for member in uploading]
        for member in done:
            if member not in uploading:
                self._conclude(member)
        self._save([member for member in done if member not in uploading])
        for upload in uploads:
            upload.result()
        self._save(uploading)
        for member in self._open:
            if not isinstance(member.answer, Done):
                self._conclude(member)

    def _save(self, members: Sequence[_Member]) -> None:
        """Write the results of these members side by side, and report them once all are durable."""
        done = [
            (member, member.attempt.success)
            for member in members
            if member.run.outcome is None and member.attempt.success is not None
        ]
        if not done:
            return
        save = partial(self._services.results.save_many, [success for _, success in done])
        kept = self._services.retry_until_available("object store", save)
        keeping = [
            self._services.in_background(partial(member.attempt.keep_in_cache, success.result, record))
            for (member, success), record in zip(done, kept, strict=True)
            if record is success.result and member.attempt.computation.may_be_cached
        ]
        wait(keeping)
        group = self._services.status.group()
        for (member, success), record in zip(done, kept, strict=True):
            member.run.take(partial(self._report, member, success, record, group))
        self._services.best_effort(group.send)
        for (member, success), record in zip(done, kept, strict=True):
            if not isinstance(record, UnreadableResult):
                member.run.take(partial(member.attempt.recorded, success.result, record))

    def _follow(self) -> None:
        """Answer the tasks whose work another run has done by now, of this group or elsewhere; the rest look later."""
        followers = [member for member in self._open if member.follows]
        if not followers:
            return
        while True:
            waiting = [
                member
                for member in followers
                if member.run.outcome is None and not member.attempt.computation.cached
            ]
            wait([self._services.in_background(partial(self._look, member)) for member in waiting])
            patient = [
                member
                for member in waiting
                if not member.attempt.computation.cached
                and time.monotonic() < member.attempt.preparation.patience_ends
            ]
            if not patient or self._services.stopping:
                break
            self._services.sleep(SAME_WORK_LOOK_SECONDS)
        for member in followers:
            if not member.attempt.computation.cached:
                member.run.take(partial(member.attempt.decide, member.facts, member.fetched))
        self._begin()
        for member in self._open:
            self._give(member)
        self._record()

    def _look(self, member: _Member) -> None:
        def look() -> None:
            member.attempt.computation.find()

        member.run.take(look)

    def _conclude(self, member: _Member) -> None:
        answer = member.answer
        if answer is not None and not isinstance(answer, Alone):
            member.run.take_attempt(lambda attempt: attempt.conclude(answer))

    def _report(
        self, member: _Member, success: Success, kept: Result | UnreadableResult, group: CommandGroup
    ) -> None:
        if isinstance(kept, UnreadableResult):
            raise kept
        member.attempt.report(success, kept, group)

    def _settle(self) -> None:
        """Acknowledge what has ended, and requeue the rest: nothing before all that it leaves is durable."""
        outcomes = [(run, run.end()) for run in self.runs if not run.closed]
        given_back = [run.delivery for run, outcome in outcomes if outcome == "given_back"]
        if given_back:
            self._consumer.requeue_all(given_back)
        if ended := [run.delivery for run, outcome in outcomes if outcome != "given_back"]:
            self._consumer.ack_all(
                ended,
                more=self._lease.usable and self._services.takes_more,
                low_priority=self._lease.shared,
            )
        for run, outcome in outcomes:
            run.close(outcome)


def _raise(error: Exception) -> Outcome:
    raise error
