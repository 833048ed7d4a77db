"""Figures for operators: queues, workers, and late runs.

An unknown figure is None, never 0.
"""

from __future__ import annotations

from typing import Literal

from pydantic import AwareDatetime, Field

from inferq.schemas.batch import BatchState
from inferq.schemas.record import Record
from inferq.schemas.result import EngineInfo
from inferq.schemas.task import Priority

Service = Literal["rabbitmq", "redis", "store"]
Alarm = Literal["disk", "memory"]
WorkerState = Literal["idle", "busy", "paused", "loading"]
Lane = tuple[str, Priority]
"""A task type and a priority."""

ANY_TYPE = "*"
"""In `Stats.unfed_tasks`: batches whose lines name their types themselves."""


class TaskInHand(Record):
    """A task that a worker has taken and not settled."""

    tenant: str
    task_id: str
    priority: Priority
    since: AwareDatetime


class GpuMemory(Record):
    """The memory of a GPU that a worker sees, in bytes. All processes count."""

    gpu: str
    used_bytes: int
    total_bytes: int


class WorkerInfo(Record):
    """A worker, as its last heartbeat reports it."""

    worker_id: str = Field(description="Unique: host, process id and a random part.")
    name: str = Field(description="The name in results, dead letters and logs.")
    track: str | None = Field(None, description="Its `INFERQ_TRACK`; None if it has none.")
    host: str
    pid: int
    task_type: str
    lanes: tuple[Priority, ...]
    state: WorkerState
    slots: int
    consumers: int | None = Field(None, description="The most consumers that it has of one lane.")
    consumer_priority: int = Field(
        0, description="RabbitMQ delivers to the idle workers with the highest one first."
    )
    busy: int = Field(description="Slots with a task in hand.")
    in_hand: dict[Priority, int] = Field({}, description="Tasks taken and not settled, by lane.")
    tasks: tuple[TaskInHand, ...] = Field((), description="The tasks in hand whose messages are read.")
    engine: EngineInfo | None = None
    gpus: tuple[GpuMemory, ...] | None = Field(None, description="None if no GPU is visible.")
    paused_for: tuple[str, ...] = Field((), description="The services that it waits for.")
    version: str
    since: AwareDatetime = Field(description="When the process started.")
    seen_seconds_ago: float | None = Field(None, description="Seconds since the last heartbeat.")


class WorkerList(Record):
    """The workers that are alive. `items` is None if they are unknown; then `unknown` says why."""

    items: tuple[WorkerInfo, ...] | None = None
    unknown: str | None = None


class QueueFigures(Record):
    """One lane of a task type."""

    task_type: str
    priority: Priority
    ready: int | None = Field(None, description="Messages that wait in the queue.")
    unacked: int | None = Field(
        None, description="Tasks that workers have in hand; None if a consumer sends no heartbeat."
    )
    consumers: int | None = None
    oldest_seconds: float | None = Field(
        None, description="How long the first message has been seen waiting; 0 if none waits."
    )
    taken: int | None = Field(
        None, description="Deliveries that workers took so far: two readings give a rate."
    )


class TypeWorkers(Record):
    """The workers of one task type, by state."""

    task_type: str
    idle: int = 0
    busy: int = 0
    paused: int = 0
    loading: int = 0
    slots: int = Field(0, description="The slots of all of them.")
    with_tasks: int = Field(0, description="Workers that have a task in hand.")


class LateNight(Record):
    """A nightly run that is overdue: it has not started, or its window closed before its end."""

    schedule: str
    tenant: str
    seconds: float


class Stats(Record):
    """The figures of `inferq monitor`. `unknown` names the fields that are None, each with the reason."""

    at: AwareDatetime | None = Field(
        None, description="When the monitor made its last round; None if it does not run."
    )
    read_at: dict[Service, AwareDatetime] | None = Field(
        None, description="When each service was read; absent if its figures are unknown."
    )
    services: dict[Service, bool] | None = Field(
        None, description="Whether each service can be used; absent if that is unknown."
    )
    alarms: tuple[Alarm, ...] | None = Field(
        None, description="Why RabbitMQ blocks publishers; empty if not."
    )
    queues: tuple[QueueFigures, ...] | None = None
    retry_messages: dict[str, int] | None = Field(
        None, description="Tasks at each retry level, of all types."
    )
    dead_letters: dict[str, int] | None = Field(None, description="Dead letters of each task type.")
    unroutable_messages: int | None = None
    callbacks_waiting: int | None = Field(None, description="Callbacks to send, and delayed jobs.")
    callbacks_given_up: int | None = Field(None, description="Callbacks given up and not sent since.")
    batches: dict[BatchState, int] | None = Field(
        None, description="Batches that have not ended, and those of the last day that have."
    )
    nights: dict[BatchState, int] | None = Field(None, description="The last run of each schedule.")
    late_nights: tuple[LateNight, ...] | None = None
    unfed_tasks: dict[str, int] | None = Field(
        None,
        description="Lines that batches have yet to feed, by the batch's task type; `*`: of batches without one. "
        "Batches outside their window do not count.",
    )
    task_seconds: dict[str, float] | None = Field(
        None,
        description="Mean seconds that engines computed for a task, by type, of the tasks that ended today and "
        "yesterday (UTC).",
    )
    workers: tuple[TypeWorkers, ...] | None = None
    unknown: dict[str, str] = Field({}, description="Why a field is None, by its name.")


class TypeDemand(Record):
    """The workers that the tasks of one type need now."""

    workers: int | None = Field(
        None,
        description="The workers with which every task starts within `target_wait`. At least those that have a "
        "task in hand; 0 if there is nothing to do; null while `ready` or `unacked` is unknown.",
    )
    ready: int | None = Field(None, description="Tasks that wait in the work queues.")
    unacked: int | None = Field(None, description="Tasks that workers have in hand.")
    unfed: int | None = Field(None, description="Lines that batches of this type have yet to feed.")
    oldest_seconds: float | None = Field(None, description="How long the first task has been seen waiting.")
    task_seconds: float | None = Field(
        None,
        description="Mean engine seconds of a task; null if none ended lately: then each counts in full.",
    )
    work_seconds: float | None = Field(None, description="Engine seconds of the ready and unfed tasks.")
    slots: float | None = Field(
        None, description="Tasks that one worker runs at a time; null without a worker: then it counts as 1."
    )


class Demand(Record):
    """The workers that each task type needs now. `unknown` names what is null or absent, each with the reason."""

    at: AwareDatetime | None = Field(
        None, description="When the figures were read; null if they are unknown."
    )
    target_wait: float = Field(description="Seconds within which every task should start.")
    types: dict[str, TypeDemand] = Field({}, description="By task type: every type that the monitor reads.")
    unfed_any_type: int | None = Field(
        None, description="Lines that batches without a task type have yet to feed. They count for no type."
    )
    retry_messages: dict[str, int] | None = Field(
        None, description="Tasks at each retry level, of all types together. They count for no type."
    )
    unknown: dict[str, str] = Field({}, description="Why a figure is unknown, by its name.")
