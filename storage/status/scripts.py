"""The Lua scripts of the status index, and its data in Redis.

A task is a hash under `inferq:t:<tenant>:<task_id>` with short field names:
    ty type  p priority  b batch  d digest  c created  s state  o order  a attempt  r redrives
    w worker  st started  f finished  g progress  n note  e error (JSON)  x when a cancel was requested
    k the call that created or ended it, so that a repeated call gets the same reply
    h the run that holds the task, and when it last gave a sign of life (see lease.lua)
    tr the id of the task's trace
    l the number of consecutive orphaned runs of the recorded attempt, and the last run's token
Times are microseconds since 1970. Sorted sets, scored by creation time, index the tasks of a tenant
(`inferq:l:<tenant>`), of a batch (`inferq:b:<tenant>:<batch>`), and of each state (`inferq:s:<tenant>:<state>`)
except `succeeded`: most tasks succeed, so a listing of those filters the tenant's tasks.

The order number is redrives * 1e6 + attempt * 10 + rank. An end comes after every attempt of its redrive, a success
after everything.

`inferq:x:<tenant>:<task_id>` is a cancel request for a task without a hash, which may wait in a queue. The task gets
it with its hash, unless the gateway submits the task only now.

What tenants used (see inferq.storage.status.usage) is a hash for each UTC day under `inferq:usage:<day>`, with the
fields `<tenant>:<type>:succeeded`, `:failed`, `:cancelled`, `:retried` (attempts), and `:us` (microseconds of engines).

`inferq:flight:<tenant>:<key>` names the run that computes what the result cache will have under this key (see
flight.lua).

A task with a line in a batch has a hash only while it runs or waits for a retry. Otherwise the batch's bitmaps have
its line as fed, succeeded, failed or cancelled (see inferq.storage.batches.scripts).
"""

from __future__ import annotations

from pathlib import Path

from inferq.storage.lua import read_lua

_HERE = Path(__file__).parent
BATCH_LINES = _HERE / "batch_lines"
"""Lua functions for the lines of a batch; they need `tenant` and `retention`."""

_RECORD = (_HERE / "head", BATCH_LINES, _HERE / "record")
_LEASE = _HERE / "lease"
_FLIGHT = _HERE / "flight"
_TASK = _HERE / "task"
_BY_WORKER = _HERE / "by_worker"
_USAGE = _HERE / "usage"

SOURCES = {
    "submit": read_lua(*_RECORD, _TASK, _HERE / "submit"),
    "confirm": read_lua(*_RECORD, _TASK, _HERE / "confirm"),
    "forget": read_lua(*_RECORD, _HERE / "forget"),
    "begin": read_lua(*_RECORD, _LEASE, _FLIGHT, _BY_WORKER, _TASK, _HERE / "begin"),
    "released": read_lua(*_RECORD, _LEASE, _HERE / "released"),
    "progress": read_lua(*_RECORD, _HERE / "progress"),
    "retrying": read_lua(*_RECORD, _LEASE, _USAGE, _BY_WORKER, _TASK, _HERE / "retrying"),
    "ended": read_lua(*_RECORD, _USAGE, _BY_WORKER, _TASK, _HERE / "ended"),
    "cancel": read_lua(*_RECORD, _HERE / "cancel"),
    "cancel_requested": read_lua(_HERE / "head", _LEASE, BATCH_LINES, _HERE / "cancel_requested"),
    "get": read_lua(_HERE / "head", _HERE / "get"),
    "list": read_lua(_HERE / "list"),
}
"""Each script by its name."""
