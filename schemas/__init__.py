"""Messages and task types, and the base of every part: settings, errors, logs, probes.

task, types             a task, and what a task type says of its own
result, status          how a task ended, and its state
record                  the base of records and events: neighbouring versions understand each other
batch, batch_source     a batch, and what is known of its tasks before its source is read
window                  the hours in which a batch is fed
night, schedule, cron   a night of a nightly run, its schedule, and the schedule's times
monitor                 the figures of the whole installation, and its workers
callback                callbacks in the form of Standard Webhooks
errors                  why something fails, in classes that say what happens next
encoding                JSON that holds any text
http_url, s3_url        URLs, parsed strictly
paths                   the paths of tasks, batches and artifacts on the gateway
publish, json_schema    JSON Schema and AsyncAPI documents
settings                the base of all settings
memory                  the memory of the machine or container
logs                    the log of a part
metrics                 buckets, and labels with few values
probe_server            /healthz, /readyz and /metrics of a process
trace_context           the place in a trace that travels with requests and messages
tracing                 spans of a part, for OpenTelemetry
trace_export            how spans are recorded and exported; imported only while tracing is on
trace_metrics           the metric of a part's tracing
"""

from inferq.schemas.batch import (
    BATCH_END_STATES,
    DEFAULT_IN_FLIGHT,
    RUN_ID,
    SET_BY_FEEDER,
    Batch,
    BatchCounts,
    BatchEndState,
    BatchEvent,
    BatchId,
    BatchState,
    BatchStatus,
    BatchSummary,
    CountsNow,
    ScheduleName,
)
from inferq.schemas.callback import (
    MAX_CALLBACK_BYTES,
    Callback,
    CallbackAttempt,
    CallbackRecord,
    CallbackState,
    SubjectKind,
    batch_callback,
    callback_id,
    end_callback,
    task_callback,
)
from inferq.schemas.errors import (
    InferqError,
    InstallationError,
    InvalidTask,
    Outage,
    TransientFailure,
    report_incident,
)
from inferq.schemas.night import Night, NightEvent
from inferq.schemas.record import SCHEMA_VERSION, Record
from inferq.schemas.result import Artifact, EndState, EngineInfo, ErrorInfo, Result, Timings
from inferq.schemas.settings import Settings, check_server_url, expand_home
from inferq.schemas.status import (
    END_STATES,
    EVENT_OF_STATE,
    Event,
    EventData,
    EventType,
    State,
    TaskStatus,
    sequence_of,
)
from inferq.schemas.task import (
    INPUT_SCHEMES,
    MAX_BODY_BYTES,
    PRIORITIES,
    CallbackEvent,
    CallbackUrl,
    InputUrl,
    Options,
    Priority,
    Task,
    TaskId,
    input_fields,
    new_task_id,
)
from inferq.schemas.types import (
    TaskType,
    always,
    describe_faults,
    get_type,
    installed_types,
    never,
    parse_task,
)
from inferq.schemas.window import TimeZoneName, Window, time_zone

__all__ = [
    "BATCH_END_STATES",
    "DEFAULT_IN_FLIGHT",
    "END_STATES",
    "EVENT_OF_STATE",
    "INPUT_SCHEMES",
    "MAX_BODY_BYTES",
    "MAX_CALLBACK_BYTES",
    "PRIORITIES",
    "RUN_ID",
    "SCHEMA_VERSION",
    "SET_BY_FEEDER",
    "Artifact",
    "Batch",
    "BatchCounts",
    "BatchEndState",
    "BatchEvent",
    "BatchId",
    "BatchState",
    "BatchStatus",
    "BatchSummary",
    "Callback",
    "CallbackAttempt",
    "CallbackEvent",
    "CallbackRecord",
    "CallbackState",
    "CallbackUrl",
    "CountsNow",
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
    "Night",
    "NightEvent",
    "Options",
    "Outage",
    "Priority",
    "Record",
    "Result",
    "ScheduleName",
    "Settings",
    "State",
    "SubjectKind",
    "Task",
    "TaskId",
    "TaskStatus",
    "TaskType",
    "TimeZoneName",
    "Timings",
    "TransientFailure",
    "Window",
    "always",
    "batch_callback",
    "callback_id",
    "check_server_url",
    "describe_faults",
    "end_callback",
    "expand_home",
    "get_type",
    "input_fields",
    "installed_types",
    "never",
    "new_task_id",
    "parse_task",
    "report_incident",
    "sequence_of",
    "task_callback",
    "time_zone",
]

if __name__ != "inferq.schemas":
    raise ImportError(f"import inferq.schemas instead of {__name__}, which would be a second copy of it")
