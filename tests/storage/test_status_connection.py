"""The connection of the status index: outages, refusals, and calls whose answer comes later."""

from __future__ import annotations

import math
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import redis

from inferq.schemas import (
    InstallationError,
    Task,
)
from inferq.storage import BatchIndex, Begun, CallbackRecords, StatusIndex, StatusOutage, StorageSettings
from inferq.storage.objects.local import LocalStore
from inferq.storage.status.keys import record_key
from tests.storage.conftest import RedisServer
from tests.storage.tasks import begin, end, job, known
from tests.waiting import eventually


def test_flushed_scripts_come_back_by_themselves(index: StatusIndex, redis_client: redis.Redis) -> None:
    index.submit(job())
    redis_client.script_flush()
    assert begin(index, job()).state == "running"
    redis_client.script_flush()
    assert index.list("default").items


@pytest.fixture
def doomed(own_redis: RedisServer) -> Iterator[StatusIndex]:
    index = StatusIndex.from_settings(StorageSettings(redis_url=own_redis.url, redis_timeout=0.3))
    yield index
    index.close()


def test_a_killed_redis_is_an_outage_and_no_more_when_it_is_back(
    own_redis: RedisServer, doomed: StatusIndex
) -> None:
    doomed.ping()
    doomed.submit(job())
    own_redis.kill()
    calls: list[Callable[[], object]] = [
        lambda: doomed.submit(job()),
        lambda: doomed.get("default", "t1"),
        lambda: doomed.list("default"),
        lambda: doomed.ended(end(job())),
        doomed.ping,
    ]
    for call in calls:
        with pytest.raises(StatusOutage, match="INFERQ_REDIS_URL"):
            call()
    own_redis.start()

    def back() -> bool:
        try:
            return doomed.submit(job()).new
        except StatusOutage:
            return False

    eventually(back)
    assert begin(doomed, job()).state == "running"
    assert doomed.list("default", state="running").items


def test_how_long_redis_is_away_counts_from_the_first_failure(
    own_redis: RedisServer, redis_client: redis.Redis
) -> None:
    now = [100.0]
    with redis.Redis(port=own_redis.port, decode_responses=True) as client:
        index = StatusIndex(client, retention=60, clock=lambda: now[0])
        index.ping()
        assert index.unavailable_for is None
        own_redis.kill()
        for _ in range(3):
            with pytest.raises(StatusOutage):
                index.ping()
            now[0] += 2.0
        assert index.unavailable_for == 6.0
        own_redis.start()
        index.ping()
        assert index.unavailable_for is None
        client.set(record_key("default", "t1"), "not a hash")
        with pytest.raises(StatusOutage):
            begin(index, job())
        assert index.unavailable_for is None, "a Redis that answers is not away"


def test_a_restart_between_two_calls_goes_unnoticed(own_redis: RedisServer, doomed: StatusIndex) -> None:
    doomed.submit(job())
    own_redis.kill()
    own_redis.start()
    assert doomed.submit(job()).new


def test_a_hanging_redis_costs_the_timeout_once_and_not_for_every_caller(
    own_redis: RedisServer, doomed: StatusIndex
) -> None:
    doomed.ping()
    own_redis.freeze(True)
    try:
        began = time.monotonic()
        with pytest.raises(StatusOutage):
            doomed.ping()
        assert time.monotonic() - began > 0.2
        began = time.monotonic()
        for _ in range(100):
            with pytest.raises(StatusOutage):
                doomed.get("default", "t1")
        assert time.monotonic() - began < 15  # each for itself would wait 0.3 s
    finally:
        own_redis.freeze(False)
    eventually(lambda: _answers(doomed))


def _answers(index: StatusIndex) -> bool:
    try:
        index.ping()
    except StatusOutage:
        return False
    return True


def test_while_one_caller_looks_whether_redis_is_back_the_others_fail_at_once() -> None:
    now = [0.0]
    entered, leave = threading.Event(), threading.Event()

    class Hanging(redis.Redis):
        calls = 0

        def evalsha(self, *_: Any, **__: Any) -> Any:
            self.calls += 1
            if self.calls == 2:
                entered.set()
                leave.wait(60)
            raise redis.ConnectionError("away")

    client = Hanging()
    index = StatusIndex(client, retention=60, clock=lambda: now[0])
    with pytest.raises(StatusOutage):
        index.ping()
    now[0] = 1.1
    thread = threading.Thread(target=lambda: _answers(index))
    thread.start()
    assert entered.wait(60)
    with pytest.raises(StatusOutage):
        index.ping()
    assert client.calls == 2
    leave.set()
    thread.join()


def test_a_redis_that_refuses_is_an_outage_that_names_the_reason(
    own_redis: RedisServer, doomed: StatusIndex
) -> None:
    with redis.Redis(port=own_redis.port) as admin:
        admin.config_set("requirepass", "secret-word")
    locked = StatusIndex.from_settings(
        StorageSettings(redis_url=f"redis://:wrong-word@127.0.0.1:{own_redis.port}/0")
    )
    with pytest.raises(StatusOutage, match=r"refuses the login: .*; correct the user and password") as caught:
        locked.ping()
    assert "wrong-word" not in str(caught.value)


@pytest.mark.parametrize(
    ("setting", "reason"),
    [("maxmemory", "used memory > 'maxmemory'"), ("min-replicas-to-write", "good replicas")],
)
def test_a_redis_that_only_reads_is_away_for_reads_as_well(
    own_redis: RedisServer, setting: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    now = [100.0]
    with redis.Redis(port=own_redis.port, decode_responses=True) as client:
        index = StatusIndex(client, retention=60, clock=lambda: now[0])
        index.submit(job())
        client.config_set(setting, "1")
        batches, callbacks = BatchIndex(index), CallbackRecords(LocalStore(Path("/nowhere")), index)
        reads: list[Callable[[], object]] = [
            index.ping,
            lambda: index.get("default", "unknown"),
            lambda: index.get("default", "t1"),
            lambda: index.list("default"),
            lambda: index.cancel_requested("default", "unknown"),
            lambda: index.request_cancel("default", "unknown"),
            lambda: batches.look("default", "b"),
            lambda: batches.is_fed("default", "b", 1),
            lambda: callbacks.indexed("default", "task", "t1"),
            lambda: callbacks.failures("default"),
            index.warm_up,
        ]
        for read in reads:
            with pytest.raises(StatusOutage, match=f"refuses writes: .*{reason}"):
                read()
            now[0] += 1.0
        assert index.unavailable_for == len(reads)
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        client.config_set(setting, "0")
        assert known(index, job()).state == "queued"
        assert index.unavailable_for is None


def test_a_database_that_redis_lacks_is_an_outage_that_says_what_to_correct(
    shared_redis: RedisServer,
) -> None:
    with redis.Redis(port=shared_redis.port, db=99, decode_responses=True) as client:
        with pytest.raises(StatusOutage, match=r"out of range; .* and a database that it has"):
            StatusIndex(client, retention=60).ping()


def test_a_redis_that_drops_keys_is_warned_of(
    own_redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    with redis.Redis(port=own_redis.port, decode_responses=True) as client:
        index = StatusIndex(client, retention=60)
        client.config_set("maxmemory-policy", "allkeys-lru")
        index.require_supported()  # without a limit nothing is dropped
        assert caplog.records == []
        client.config_set("maxmemory", "100mb")
        index.require_supported()
        assert "maxmemory-policy allkeys-lru" in caplog.text
        assert "set maxmemory-policy noeviction" in caplog.text
        client.config_set("maxmemory-policy", "noeviction")
        caplog.clear()
        index.require_supported()
        assert caplog.records == []


def test_after_a_failover_old_connections_to_the_former_master_are_dropped(
    own_redis: RedisServer, shared_redis: RedisServer, redis_client: redis.Redis
) -> None:
    """The address leads to the new master, but connections to the old one, now a replica, stay open."""
    master = own_redis.port

    class Connection(redis.Connection):
        def _connect(self) -> Any:
            self.port = master
            return super()._connect()

    pool = redis.ConnectionPool(connection_class=Connection, port=0, decode_responses=True)
    index = StatusIndex(redis.Redis(connection_pool=pool), retention=60)
    index.ping()
    with redis.Redis(port=own_redis.port) as old:
        old.replicaof("127.0.0.1", shared_redis.port)
    master = shared_redis.port
    assert index.submit(job()).new
    assert index.unavailable_for is None
    assert known(index, job()).state == "queued"


def test_one_refused_command_does_not_make_redis_unavailable(
    index: StatusIndex, redis_client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    redis_client.set(record_key("default", "t1"), "not a hash")
    for _ in range(2):
        with pytest.raises(StatusOutage, match="refused a command"):
            index.get("default", "t1")
    assert index.unavailable_for is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_a_node_of_a_redis_cluster_is_refused_at_the_start(tmp_path: Path) -> None:
    bus = str(_free_port())
    server = RedisServer(tmp_path, "--cluster-enabled", "yes", "--cluster-port", bus)
    index = StatusIndex.from_settings(StorageSettings(redis_url=server.url))
    index.require_supported()  # nothing answers yet: nothing is known
    try:
        server.start()
        eventually(lambda: _is_refused(index))
        with pytest.raises(StatusOutage, match=r"node of a Redis Cluster .* does not support"):
            index.submit(job())
    finally:
        index.close()
        server.kill()


def test_a_sentinel_is_refused_at_the_start(tmp_path: Path) -> None:
    port = _free_port()
    (tmp_path / "sentinel.conf").write_text(f"port {port}\nbind 127.0.0.1\ndir {tmp_path}\n")
    argv = ["redis-server", str(tmp_path / "sentinel.conf"), "--sentinel"]
    index = StatusIndex.from_settings(StorageSettings(redis_url=f"redis://127.0.0.1:{port}/0"))
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL) as sentinel:
        try:
            eventually(lambda: _is_refused(index))
        finally:
            index.close()
            sentinel.kill()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    return port


def _is_refused(index: StatusIndex) -> bool:
    try:
        index.require_supported()
    except InstallationError as error:
        assert "INFERQ_REDIS_URL" in error.message
        assert "does not support" in error.message
        return True
    return False


def test_a_redis_by_unix_socket_is_named_by_its_path() -> None:
    index = StatusIndex.from_settings(StorageSettings(redis_url="unix:///nowhere/redis.sock"))
    with pytest.raises(StatusOutage, match=r"/nowhere/redis\.sock"):
        index.ping()


def test_an_answer_that_nobody_fetched_is_not_taken_for_the_next(index: StatusIndex) -> None:
    first, second = job("t1"), job("t2")

    def start(task: Task) -> Callable[[], Any]:
        now = datetime.now(UTC)
        return index.begin_pipelined(
            task, attempt=1, redrives=0, worker="w", started_at=now, digest=task.digest(), run="r"
        )

    index.submit(second)
    forgotten = start(first)
    assert start(second)().digest == second.digest()
    assert forgotten().state == "running"
    ending = index.ended_pipelined(end(second))
    assert ending() is True
    assert known(index, second).state == "succeeded"
    assert index.ended_pipelined(end(second))() is False


class Sent:
    """How many script calls each packet to Redis has; the connection breaks after `cut_after` replies."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.packets: list[int] = []
        self.cut_after = math.inf
        self._replies = 0
        send, read = redis.Connection.send_packed_command, redis.Connection.read_response

        def sending(connection: Any, packed: Any, **more: Any) -> None:
            if calls := b"".join(packed).count(b"EVALSHA"):
                self.packets.append(calls)
            send(connection, packed, **more)

        def reading(connection: Any, **more: Any) -> Any:
            self._replies += 1
            if self._replies > self.cut_after:
                self.cut_after = math.inf
                connection.disconnect()
                raise redis.ConnectionError("cut")
            return read(connection, **more)

        monkeypatch.setattr(redis.Connection, "send_packed_command", sending)
        monkeypatch.setattr(redis.Connection, "read_response", reading)


def begin_group(index: StatusIndex, tasks: Sequence[Task]) -> Sequence[Callable[[], Begun]]:
    group, now = index.group(), datetime.now(UTC)
    replies = [
        index.begin_pipelined(
            task,
            attempt=1,
            redrives=0,
            worker="w",
            started_at=now,
            digest=task.digest(),
            run="r",
            group=group,
        )
        for task in tasks
    ]
    group.send()
    return replies


def end_group(index: StatusIndex, tasks: Sequence[Task]) -> Sequence[Callable[[], bool]]:
    group = index.group()
    replies = [index.ended_pipelined(end(task), engine_seconds=1.0, group=group) for task in tasks]
    group.send()
    return replies


def test_a_group_goes_in_one_packet_and_each_command_has_its_own_reply(
    index: StatusIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = [job(f"t{number}") for number in range(4)]
    index.warm_up()
    index.submit(tasks[1])
    index.request_cancel("default", "t2")
    sent = Sent(monkeypatch)
    begins = begin_group(index, tasks)
    assert sent.packets == [4]
    begun = [begins[number]() for number in (2, 0, 3, 1)]
    assert [each.cancel_requested for each in begun] == [True, False, False, False]
    assert [each.digest for each in begun] == [None, None, None, tasks[1].digest()]
    group = index.group()
    cancels = [
        index.cancel_requested_pipelined("default", task.task_id, run="r", group=group) for task in tasks
    ]
    group.send()
    assert [cancel() for cancel in cancels] == [False, False, True, False]
    assert index.cancel_requested_pipelined("default", "t2")() is True
    assert [ended() for ended in end_group(index, tasks)] == [True] * 4
    assert sent.packets == [4, 4, 1, 4]
    assert {known(index, task).state for task in tasks} == {"succeeded"}


@pytest.mark.parametrize("replies", range(4))
def test_a_group_that_is_cut_off_after_some_replies_is_completed_by_whole_calls(
    index: StatusIndex, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch, replies: int
) -> None:
    tasks, today = [job(f"t{number}") for number in range(4)], datetime.now(UTC).date()
    index.warm_up()
    sent = Sent(monkeypatch)
    sent.cut_after = replies
    begun = [begin() for begin in begin_group(index, tasks)]
    assert {(each.state, each.orphaned_runs, each.other_run) for each in begun} == {("running", 0, "")}
    assert sent.packets == [4] + [1] * (4 - replies)
    sent = Sent(monkeypatch)
    sent.cut_after = replies
    assert [ended() for ended in end_group(index, tasks)] == [True] * 4
    assert {known(index, task).state for task in tasks} == {"succeeded"}
    usage = index.usage({datetime.now(UTC).date(), today})
    assert [(each.tasks, each.engine_seconds) for each in usage] == [(4, 4.0)]


def test_a_group_whose_scripts_redis_lost_is_completed_by_whole_calls(
    index: StatusIndex, redis_client: redis.Redis
) -> None:
    tasks = [job(f"t{number}") for number in range(3)]
    redis_client.script_flush()
    assert {begin().state for begin in begin_group(index, tasks)} == {"running"}


def test_replies_of_a_group_that_nobody_read_are_not_taken_for_later_ones(
    own_redis: RedisServer, doomed: StatusIndex
) -> None:
    tasks = [job(f"t{number}") for number in range(3)]
    doomed.warm_up()
    doomed.submit(tasks[2])
    own_redis.freeze(True)  # so that the replies come after the connection went back to the pool
    forgotten = begin_group(doomed, tasks[:2])
    del forgotten
    (later,) = begin_group(doomed, tasks[2:])
    own_redis.freeze(False)
    assert later().digest == tasks[2].digest()


def test_a_command_of_a_group_that_was_not_sent_is_made_by_its_whole_call(index: StatusIndex) -> None:
    group = index.group()
    ended = index.ended_pipelined(end(job()), group=group)
    assert index.get("default", "t1") is None
    assert ended() is True
    assert known(index, job()).state == "succeeded"
    index.group().send()


def test_a_group_without_redis_is_an_outage_of_each_and_its_calls_work_again_later(
    own_redis: RedisServer, doomed: StatusIndex
) -> None:
    tasks = [job(f"t{number}") for number in range(2)]
    doomed.warm_up()
    own_redis.kill()
    endings = end_group(doomed, tasks)
    for ending in endings:
        with pytest.raises(StatusOutage):
            ending()
    own_redis.start()
    eventually(lambda: _answers(doomed))
    assert [ending() for ending in endings] == [True, True]


def test_an_answer_is_fetched_on_any_thread(index: StatusIndex) -> None:
    begin(index, job())
    ending = index.ended_pipelined(end(job()))
    seen: list[bool] = []
    thread = threading.Thread(target=lambda: seen.append(ending()))
    thread.start()
    thread.join()
    assert known(index, job()).state == "succeeded"
    assert len(seen) == 1


def test_after_its_warm_up_a_run_neither_connects_nor_loads_a_script(
    index: StatusIndex, redis_client: redis.Redis
) -> None:
    def taken() -> list[int]:
        info: Any = redis_client.info("all")
        scripts = ("cmdstat_script|load", "cmdstat_eval")
        return [info["total_connections_received"], *(info.get(s, {"calls": 0})["calls"] for s in scripts)]

    redis_client.script_flush()
    index.warm_up()
    before = taken()
    answer = index.begin_pipelined(
        job(), attempt=1, redrives=0, worker="w", started_at=datetime.now(UTC), digest="d", run="r"
    )
    index.cancel_requested("default", "t1")
    answer()
    assert taken() == before


def test_a_warm_up_without_redis_is_an_outage(doomed: StatusIndex, own_redis: RedisServer) -> None:
    own_redis.kill()
    with pytest.raises(StatusOutage):
        doomed.warm_up()


def test_the_answer_of_a_repeated_call_is_the_first_ones(
    own_redis: RedisServer, doomed: StatusIndex, redis_client: redis.Redis
) -> None:
    """A connection that dies after the command ran and before its answer came: the client sends it again."""
    with redis.Redis(port=own_redis.port, decode_responses=True) as client:
        index = StatusIndex(client, retention=60)
        script = index._scripts["ended"]

        class Twice:
            def __call__(self, **call: Any) -> Any:
                script(**call)
                return script(**call)

        index._scripts["ended"] = Twice()  # type: ignore[assignment]
        assert index.ended(end(job())) is True
        assert index.ended(end(job())) is False
