"""docs/rights.md is true: with its rights the parts do their work, and with one right less they are refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, date, datetime
from fnmatch import fnmatch
from typing import BinaryIO, cast

import pytest
from pika.exceptions import ChannelClosedByBroker

from inferq.broker import (
    BrokerSettings,
    BrokerUnavailable,
    DeadLetters,
    connect,
    job_topology,
    topology_for,
)
from inferq.consumers.monitor.broker_figures import ALARM_EXCHANGE
from inferq.schemas import InvalidTask, Result, installed_types, parse_task
from inferq.schemas.monitor import Stats
from inferq.storage import (
    BatchIndex,
    ResultStore,
    StatusIndex,
    StatusOutage,
    StorageSettings,
    WebhookSecrets,
    tracks,
    workers,
)
from inferq.storage import callbacks as callback_records
from inferq.storage.batches import scripts as batch_scripts
from inferq.storage.figures import MonitorFigures
from inferq.storage.lua import read_lua
from inferq.storage.objects.s3 import S3Refused, S3Store
from inferq.storage.status import scripts as status_scripts
from inferq.storage.tracks import TrackRecords
from inferq.storage.workers import WorkerRegistry
from tests.rights.page import listed, read_page
from tests.rights.site import PARTS, PASSWORD, TYPE, Site
from tests.runs import begin_run
from tests.waiting import eventually


def test_no_log_has_a_secret_a_text_a_file_name_or_a_query(worked: Site) -> None:
    secrets = [
        *(secret for user in PARTS if user in worked.keys for secret in worked.keys[user][1:]),
        *(
            secret.removeprefix("whsec_")
            for secret in WebhookSecrets(worked.folder / "secrets.json").of("default")
        ),
        worked.http.headers["Authorization"].removeprefix("Bearer "),
    ]
    assert len(secrets) >= 3
    for part in PARTS:
        text = worked.log(part).read_text()
        found = [line for line in text.splitlines() if any(each in line for each in ("planted-", *secrets))]
        assert found == [], part


def test_each_line_of_each_part_is_an_object_with_its_context(worked: Site) -> None:
    lines = {part: [json.loads(line) for line in worked.log(part).read_text().splitlines()] for part in PARTS}
    for part, of_part in lines.items():
        assert {line["part"] for line in of_part} == {part}
        assert all(line.keys() >= {"time", "level", "message"} for line in of_part)
    attempts = [line for line in lines["worker"] if line["message"].startswith("attempt ")]
    for task_id, outcomes in (
        ("made", ["succeeded"]),
        ("again", ["succeeded"]),
        ("retried", ["retried", "succeeded"]),
        ("held", ["cancelled"]),
        ("unread", ["failed"]),
    ):
        of_task = [line for line in attempts if line.get("task_id") == task_id]
        assert [(line["outcome"], line["attempt"]) for line in of_task] == [
            (outcome, number) for number, outcome in enumerate(outcomes, 1)
        ]
    assert {line["batch_id"] for line in attempts if line["task_id"].startswith("lines.")} == {"lines"}
    printed = {
        line.get("task_id") for line in lines["worker"] if line["message"] == "engine: engines print things"
    }
    assert printed >= {"made", "retried", "told"}
    sent = [line for line in lines["callbacks"] if line["message"].startswith("callback ")]
    made = [(line["outcome"], line.get("status")) for line in sent if line.get("task_id") == "made"]
    assert made == [("again", 500), ("delivered", 200)]
    requests = [line for line in lines["gateway"] if line["logger"] == "inferq.access"]
    assert ("POST", "/v1/tasks", 202, "default", "told") in {
        (line["method"], line["route"], line["status"], line.get("tenant"), line.get("task_id"))
        for line in requests
    }
    assert {line["level"] for line in requests if line["route"] == "/readyz"} == {"DEBUG"}
    assert {line["batch_id"] for line in lines["batches"] if line["message"] == "batch lines: completed"} == {
        "lines"
    }


def test_no_part_is_refused_anything(worked: Site) -> None:
    refused = [(user, what) for user, used in worked.used_objects().items() for what in used if not what[2]]
    assert refused == []
    assert worked.redis.execute_command("ACL", "LOG") == []
    for part in PARTS:
        for line in worked.log(part).read_text().splitlines():
            assert "REFUSED" not in line or "this broker user may not declare; checking" in line, part
            assert "CRITICAL" not in line, part


class _Broken:
    """A file that breaks off after its first part was uploaded."""

    def __init__(self) -> None:
        self._left = 9 << 20

    def read(self, count: int) -> bytes:
        if not self._left:
            raise OSError("the client went away")
        size = min(count, self._left)
        self._left -= size
        return b"x" * size


def _do_what_is_rare(site: Site) -> None:
    """What the parts do only after a failure, done by the code that they call."""
    broken = (("worker", "tasks/default/t/artifacts/1/a"), ("gateway", "files/default/f"))
    for user, key in (
        *broken,
        ("batches", "batches/default/b/output.jsonl"),
        ("batches", "nightly/default/n/seen/t"),
    ):
        with closing(site.s3(user)), pytest.raises(OSError, match="went away"):
            site.store(user).put(key, cast(BinaryIO, _Broken()))
    task = parse_task({"task_id": "lost", "task_type": "echo"})
    for user in ("gateway", "batches"):  # a cancelled task whose message is lost
        error = InvalidTask("it was cancelled", code="cancelled")
        end = Result.failure(task, error, attempts=0, finished_at=datetime.now(UTC), status="cancelled")
        ResultStore(site.store(user)).save(end.model_copy(update={"task_id": f"lost-{user}"}))
    # The run that lost a race deletes its artifacts, and the start of a night that lost one its list.
    file = site.folder / "artifact"
    file.write_bytes(b"x")
    results = ResultStore(site.store("worker"))
    results.save_artifact("default", "lost", "a", file, "text/plain", run="t")
    results.discard("default", "lost", run="t")
    site.store("batches").delete("batches/default/night/input/t")
    for user in ("worker", "gateway", "callbacks", "batches"):  # after an answer to the proof was lost
        site.s3(user).head_object(Bucket="results", Key="inferq/.inferq/written-once")


_FOR_404 = {
    ("nightly", "s3:ListBucket", "arn:aws:s3:::results"),
    ("worker", "s3:ListBucket", "arn:aws:s3:::scans"),
}
"""Rights without which S3 answers 403 for an object that does not exist; moto answers 404 all the same."""


def test_every_right_to_objects_is_used(worked: Site) -> None:
    _do_what_is_rare(worked)
    used = worked.used_objects()
    unused = {
        (user, action, pattern)
        for user, rights in worked.page.items()
        for action, pattern in rights.statements()
        if not any(did == action and fnmatch(resource, pattern) for did, resource, _ in used[user])
    }
    assert unused == _FOR_404


def test_every_right_to_queues_is_used(worked: Site) -> None:
    tasks, topology = topology_for(installed_types()), job_topology()
    exchanges = {ALARM_EXCHANGE, *(exchange.name for exchange in (*tasks.exchanges, *topology.exchanges))}
    queues = {queue.name for queue in (*tasks.queues, *topology.queues)}
    used = worked.used_queues()
    for user, rights in worked.page.items():
        configure, write, read = rights.permissions
        if configure == "^$":
            allowed = {f"publish.{name}" for name in exchanges if re.search(write, name)}
            allowed |= {f"deliver.{name}" for name in queues if re.search(read, name)}
            assert {_kind(name) for name in used[user]} == {_kind(name) for name in allowed}, user


def _kind(name: str) -> str:
    """The name without a level, a priority, and the type of a dead letter."""
    name = re.sub(r"(?<=retry\.)\d+s$|(?<=delayed_)\d+$|(?<=dead\.)\w+$", "*", name)
    return re.sub(r"\.(high|normal|low)$", ".*", name)


_STATUS, _BATCHES = status_scripts.SOURCES, batch_scripts.SOURCES
_SCRIPTS = {
    "worker": [
        _STATUS[name]
        for name in ("begin", "released", "progress", "retrying", "ended", "cancel_requested", "get")
    ]
    + [workers.BEAT, tracks.ADD],
    "gateway": [
        *(
            _STATUS[name]
            for name in ("submit", "confirm", "forget", "cancel", "get", "list", "ended", "cancel_requested")
        ),
        *(_BATCHES[name] for name in ("look", "processed")),
        callback_records._SAVE,
        workers.LIST,
    ],
    "callbacks": [_STATUS["ended"], _STATUS["get"], callback_records._SAVE],
    "batches": [_STATUS["confirm"], _STATUS["ended"], _STATUS["get"], *_BATCHES.values()],
    "usage": [],
    "canary": [],
    "monitor": [workers.LIST],
    "scale-in-guard": [workers.LIST],
}
"""The scripts that each part runs."""
_DIRECT = {
    "worker": {"evalsha", "script|load", "script|exists"},
    "gateway": {
        *(
            "evalsha",
            "script|load",
            "script|exists",
            "multi",
            "exec",
            "hset",
            "expire",
            "subscribe",
            "unsubscribe",
        ),
        *("ping", "get", "hget", "hvals", "hmget", "zrevrange"),
    },
    "callbacks": {"evalsha", "script|load", "script|exists", "hget"},
    "batches": {"evalsha", "script|load", "script|exists", "multi", "exec", "hset", "expire"},
    "usage": {"evalsha", "script|load", "script|exists", "hgetall"},
    "canary": {"evalsha", "script|load", "script|exists", "hgetall", "time"},
    "monitor": {"evalsha", "script|load", "script|exists", "get", "hget", "set", "zcount"},
    "scale-in-guard": {"evalsha", "script|load", "script|exists"},
}
"""The commands that each part sends itself."""


def test_the_lists_of_commands_are_those_of_the_scripts() -> None:
    for user, rights in read_page(task_type=TYPE).items():
        scripts = [read_lua(), *_SCRIPTS[user]] if rights.acl else []
        called = {name.lower() for text in scripts for name in re.findall(r"redis\.call\('(\w+)'", text)}
        called |= {"info"} if scripts else set()  # each part looks at the policy for full memory
        assert rights.commands() == called | _DIRECT.get(user, set()), user


_LESS: list[tuple[str, str, Callable[[StatusIndex], object]]] = [
    ("worker", "+evalsha", lambda index: index.ping()),
    ("worker", "+script|load", lambda index: index.warm_up()),
    ("worker", "+set", lambda index: index.ping()),
    ("worker", "+hset", lambda index: _begin(index)),
    ("worker", "+publish", lambda index: _begin(index)),
    ("worker", "~inferq:*", lambda index: _begin(index)),
    ("worker", "&inferq:events:*", lambda index: _begin(index)),
    ("gateway", "+multi", lambda index: BatchIndex(index).request_cancel("default", "b")),
    ("gateway", "+exec", lambda index: BatchIndex(index).request_cancel("default", "b")),
    ("gateway", "+script|exists", lambda index: index.untaken_cancel("default", "t", 1)),
    ("gateway", "+hmget", lambda index: index.untaken_cancel("default", "t", 1)),
    ("gateway", "+zrevrange", lambda index: index.list("default")),
    ("batches", "+multi", lambda index: BatchIndex(index).set_state("default", "b", "completed")),
    ("batches", "+bitop", lambda index: BatchIndex(index).unended("default", "b")),
    ("batches", "+setrange", lambda index: _feed(index)),
    ("usage", "+hgetall", lambda index: index.usage([date(2026, 11, 25)])),
    ("usage", "~inferq:usage:*", lambda index: index.usage([date(2026, 11, 25)])),
    ("canary", "+time", lambda index: TrackRecords(index).read("ocr", 60)),
    ("canary", "~inferq:tracks:*", lambda index: TrackRecords(index).read("ocr", 60)),
    ("callbacks", "+script|exists", lambda index: index.read(("HGET", "inferq:c:t:task:x", "c"))),
    ("monitor", "+zrange", lambda index: WorkerRegistry(index).read()),
    ("monitor", "+set", lambda index: MonitorFigures(index).save(Stats(), "{}", seconds=9)),
    ("scale-in-guard", "+hgetall", lambda index: WorkerRegistry(index).read()),
    ("scale-in-guard", "~inferq:workers", lambda index: WorkerRegistry(index).read()),
]


def _begin(index: StatusIndex) -> None:
    # An event that is refused does not undo its change, so the repeated call succeeds; progress says each time.
    begin_run(index, parse_task({"task_id": "t", "task_type": "echo"}))
    index.progress("default", "t", 0.5, None)


def _feed(index: StatusIndex) -> None:
    BatchIndex(index).mark("default", "b", "fed", range(1, 100))


@pytest.mark.parametrize(
    ("user", "right", "call"), _LESS, ids=[f"{user} {right}" for user, right, _ in _LESS]
)
def test_redis_refuses_a_part_with_one_right_less(
    site: Site, user: str, right: str, call: Callable[[StatusIndex], object]
) -> None:
    acl = site.page[user].acl
    assert right in acl
    for words, refused in ((acl, False), (tuple(word for word in acl if word != right), True)):
        site.redis.flushall()
        site.redis.script_flush()
        site.set_acl("less", words)
        url = f"redis://less:{PASSWORD}@127.0.0.1:{site.redis_port}/0"
        index = StatusIndex.from_settings(StorageSettings(redis_url=url))
        try:
            if refused:
                with pytest.raises(StatusOutage, match=r"refused a command|refuses writes"):
                    call(index)
            else:
                call(index)
        finally:
            index.close()


def test_another_database_of_redis_needs_select(site: Site) -> None:
    url = f"redis://less:{PASSWORD}@127.0.0.1:{site.redis_port}/1"
    acl = site.page["worker"].acl
    for words in (acl, (*acl, "+select")):
        site.set_acl("less", words)
        index = StatusIndex.from_settings(StorageSettings(redis_url=url))
        if words == acl:
            with pytest.raises(StatusOutage, match="select"):
                index.ping()
        else:
            index.ping()
        index.close()


@pytest.mark.parametrize("user", ["gateway", "worker", "callbacks", "batches", "beat", "producer"])
def test_rabbitmq_refuses_a_part_with_one_right_less(worked: Site, user: str) -> None:
    configure, write, read = worked.page[user].permissions
    settings = BrokerSettings(amqp_url=worked.amqp_url("less"))
    names = [exchange.name for exchange in (*topology_for([TYPE]).exchanges, *job_topology().exchanges)]
    allowed = {_kind(name): name for name in names if re.search(write, name)}
    for name in allowed.values():
        for pattern, refused in ((write, False), (f"^(?!{re.escape(name)}$).*", True)):
            worked.permit("less", (configure, pattern, read))
            with closing(connect(settings, name="test")) as connection:
                channel = connection.channel()
                channel.confirm_delivery()
                try:
                    channel.basic_publish(name, "nowhere", b"")
                except ChannelClosedByBroker as error:
                    assert (refused, error.reply_code) == (True, 403), name
                else:
                    assert not refused, name


def test_dead_letters_are_read_and_purged_without_a_right_to_write(worked: Site) -> None:
    configure, _, read = worked.page["dead"].permissions
    worked.permit("less", (configure, "^$", read))
    settings = BrokerSettings(amqp_url=worked.amqp_url("less"))
    with DeadLetters(settings, TYPE) as letters:
        kept = [letter.task_id for letter in letters.read()]
        assert "lines.2" in kept
    with pytest.raises(BrokerUnavailable, match="ACCESS_REFUSED"), DeadLetters(settings, TYPE) as letters:
        letters.redrive()
    with DeadLetters(settings, TYPE) as letters:
        assert len(eventually(letters.purge)) == len(kept)


def test_s3_refuses_a_part_with_one_right_less(worked: Site) -> None:
    policy = worked.page["worker"].policy
    assert policy is not None
    for lost, call in _STORE_CALLS.items():
        left = [
            {**statement, "Action": [action for action in listed(statement["Action"]) if action != lost]}
            for statement in policy["Statement"]
        ]
        less = [statement for statement in left if statement["Action"]]
        worked.set_policy("less", {**policy, "Statement": less})
        with pytest.raises(S3Refused, match="AccessDenied"):
            call(worked.store("less"))
        worked.set_policy("less", policy)
        call(worked.store("less"))


_STORE_CALLS: dict[str, Callable[[S3Store], object]] = {
    "s3:ListBucket": lambda store: list(store.list("tasks/")),
    "s3:PutObject": lambda store: store.put("tasks/t", b""),
    "s3:GetObject": lambda store: store.get("tasks/t"),
    "s3:DeleteObject": lambda store: store.delete("tasks/t"),
}
