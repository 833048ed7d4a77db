"""What travels: the task, its result, its status and events, and the installed task types."""

from schemas.errors import InferqError, InstallationError, InvalidTask, Outage, TransientFailure
from schemas.result import Artifact, EndState, EngineInfo, ErrorInfo, Result, Timings
from schemas.settings import Settings
from schemas.status import END_STATES, EVENT_OF_STATE, Event, EventData, EventType, State, TaskStatus
from schemas.task import (
    INPUT_SCHEMES,
    MAX_BODY_BYTES,
    PRIORITIES,
    CallbackEvent,
    InputUrl,
    Options,
    Priority,
    Task,
    TaskId,
    input_fields,
    new_task_id,
)
from schemas.types import TaskType, always, describe_faults, get_type, installed_types, never, parse_task

__all__ = [
    "END_STATES",
    "EVENT_OF_STATE",
    "INPUT_SCHEMES",
    "MAX_BODY_BYTES",
    "PRIORITIES",
    "Artifact",
    "CallbackEvent",
    "EndState",
    "EngineInfo",
    "ErrorInfo",
    "Event",
    "EventData",
    "EventType",
    "InferqError",
    "InputUrl",
    "InstallationError",
    "InvalidTask",
    "Options",
    "Outage",
    "Priority",
    "Result",
    "Settings",
    "State",
    "Task",
    "TaskId",
    "TaskStatus",
    "TaskType",
    "Timings",
    "TransientFailure",
    "always",
    "describe_faults",
    "get_type",
    "input_fields",
    "installed_types",
    "never",
    "new_task_id",
    "parse_task",
]
