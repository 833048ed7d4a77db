"""The scenarios: what each submits, and what is broken meanwhile."""

from __future__ import annotations

import json
import os
import re
import signal
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from functools import partial

from inferq.broker import BrokerSettings, Message, Publisher, routing_key
from inferq.producer.up.part import free_ports, private_text
from inferq.schemas.schedule import run_id_of
from tests.chaos.moved_clock import MovedClock
from tests.chaos.plan import Load, PlannedTask, Trouble
from tests.chaos.processes import Kept
from tests.chaos.s3 import Mode
from tests.chaos.site import Needs, Site
from tests.waiting import eventually

HANDOVER_LIMIT = 1.0
"""Seconds from a worker's death to its task's start elsewhere, at the median, where another one is idle."""


@dataclass(frozen=True)
class Scenario:
    """What is submitted (`load`, and `quick` for a shortened run; None leaves it out), and what breaks."""

    name: str
    title: str
    breaks: Callable[[Site], None]
    load: Load
    quick: Load | None
    needs: Needs = field(default_factory=Needs)
    nodes: int = 1


def _load(tasks: int, seconds: float, *, busy: float = 1.2, **troubles: int) -> Load:
    known: dict[Trouble, int] = {}
    for trouble, count in troubles.items():
        known[trouble] = count  # type: ignore[index]
    return Load(tasks, seconds, busy, known)


def kill_workers(site: Site) -> None:
    for _ in site.moments(every=2.0):
        site.kill(site.random.choice(site.workers), "worker")
        if site.callbacks is not None and site.random.random() < 0.4:
            site.kill(site.callbacks, "callbacks")


def kill_workers_often(site: Site) -> None:
    """Workers are killed while S3 refuses what they have computed: what was acknowledged too early is lost.

    No engine is killed here, so only a task that failed by itself may lose an attempt.
    """
    site.s3.only_writes = True
    for _ in site.moments(every=1.0):
        with site.fault("S3 answers 500"):
            site.s3.mode = "error"
            time.sleep(site.random.uniform(0.2, 0.6))
            site.kill(site.random.choice(site.workers), "worker")
            site.s3.mode = "pass"


def kill_engines(site: Site) -> None:
    for _ in site.moments(every=1.0):
        _kill_engine(site)


def _kill_engine(site: Site) -> None:
    engines = site.random.choice(site.workers).children()
    if engines:
        with site.fault("engine killed"), suppress(ProcessLookupError):
            os.kill(site.random.choice(engines), signal.SIGKILL)


def kill_workers_and_engines(site: Site) -> None:
    for _ in site.moments(every=2.0):
        if site.random.random() < 0.5:
            site.kill(site.random.choice(site.workers), "worker")
        else:
            _kill_engine(site)


def suspend_workers(site: Site) -> None:
    """All but one are suspended: the broker takes them for dead, and hands out again what they compute."""
    for _ in site.moments(every=3.0):
        suspended = site.random.sample(site.workers, len(site.workers) - 1)
        for worker in suspended:
            site.ledger.note("fault", what="worker suspended", run=str(worker.pid))
            worker.signal(signal.SIGSTOP)
        # RabbitMQ misses two heartbeats before it gives a connection up: up to three intervals of 5 s.
        time.sleep(16)
        for worker in suspended:
            worker.signal(signal.SIGCONT)
            site.ledger.note("mended", what="worker suspended", run=str(worker.pid))


def kill_broker(site: Site) -> None:
    for _ in site.moments(every=4.0):
        with site.fault("broker killed"):
            site.broker.kill(site.vhost)
            time.sleep(site.random.uniform(0, 1))
            site.broker.start()


def spoil_lines(site: Site) -> None:
    for _ in site.moments(every=1.0):
        proxy = site.random.choice(site.proxies)
        what = site.random.choice(["cut", "delayed and cut", "half-closed", "delayed", "refused"])
        with site.fault(f"connections {what}"):
            match what:
                case "cut":
                    proxy.cut()
                case "delayed and cut":
                    # What was on its way for that long is lost.
                    proxy.delay(0.8)
                    time.sleep(site.random.uniform(0.4, 0.9))
                    proxy.cut()
                    proxy.delay(0)
                case "half-closed":
                    proxy.half_close(towards_server=site.random.random() < 0.5)
                case "delayed":
                    proxy.delay(0.3)
                    time.sleep(1)
                    proxy.delay(0)
                case "refused":
                    proxy.refuse()
                    time.sleep(site.random.uniform(0.2, 0.6))
                    proxy.refuse(False)


def lose_redis(site: Site) -> None:
    for _ in site.moments(every=1.5):
        if site.random.random() < 0.5:
            with site.fault("Redis flushed"):
                site.ground.flush_redis()
        else:
            with site.fault("Redis killed"):
                site.ground.kill_redis()
                time.sleep(site.random.uniform(0.2, 1.5))
                site.ground.start_redis()


def fail_s3(site: Site) -> None:
    """In each outage, when what was computed is not yet written, lines are cut and a worker is killed.

    The first lets another worker run the same task beside it, the second loses a run.
    """
    modes: list[tuple[Mode, str]] = [
        ("error", "answers 500"),
        ("hang", "hangs"),
        ("lose", "loses its answers"),
    ]
    for _ in site.moments(every=1.5):
        mode, what = site.random.choice(modes)
        site.s3.only_writes = site.random.random() < 0.6
        with site.fault(f"S3 {what}"):
            site.s3.mode = mode
            time.sleep(site.random.uniform(0.5, 1.0))
            with site.fault("connections cut"):
                site.proxies[0].cut()
            time.sleep(site.random.uniform(0.5, 1.0))
            site.kill(site.random.choice(site.workers), "worker")
            time.sleep(site.random.uniform(0.2, 0.8))
            site.s3.mode = "pass"


def answer_for_s3(site: Site) -> None:
    """A proxy in front of S3 answers by itself, as one does whose service is being replaced."""
    _refuse_by_s3(
        site, [("absent", "a proxy answers 404 for S3"), ("forbidden", "a proxy answers 403 for S3")]
    )


def refuse_credentials(site: Site) -> None:
    _refuse_by_s3(
        site,
        [
            ("skewed", "S3 refuses the clock"),
            ("unknown_key", "S3 does not know the key"),
            ("bad_signature", "S3 refuses the signature"),
            ("expired", "S3 refuses an expired token"),
        ],
        of_inputs=0.6,
    )


def _refuse_by_s3(site: Site, modes: Sequence[tuple[Mode, str]], *, of_inputs: float = 0.0) -> None:
    """`of_inputs`: how many of the faults befall inputs alone."""
    for number, _ in enumerate(site.moments(every=2.5)):
        mode, what = modes[number % len(modes)]
        with site.fault(what):
            site.s3.only_inputs = site.random.random() < of_inputs
            site.s3.mode = mode
            time.sleep(site.random.uniform(0.5, 3.0))
            if site.random.random() < 0.3:
                site.kill(site.random.choice(site.workers), "worker")
            site.s3.mode = "pass"


def refuse_writes(site: Site) -> None:
    """Redis answers reads and refuses writes: it is full, or a read-only replica.

    Workers live on: the status of an end is written after the ack, and a kill before that costs it a minute.
    """
    (nobody,) = free_ports(1)
    breaks = {
        "Redis full": (("CONFIG", "SET", "maxmemory", "1"), ("CONFIG", "SET", "maxmemory", "0")),
        "Redis a read-only replica": (
            ("REPLICAOF", "127.0.0.1", str(nobody)),
            ("REPLICAOF", "NO", "ONE"),
        ),
    }
    for number, _ in enumerate(site.moments(every=2.5)):
        what = list(breaks)[number % len(breaks)]
        broken, mended = breaks[what]
        with site.fault(what):
            site.ground.ask_redis(*broken)
            try:
                time.sleep(site.random.uniform(1.5, 3.5))
                _must_say_so(site, what)
            finally:
                site.ground.ask_redis(*mended)


def _must_say_so(site: Site, what: str) -> None:
    assert site.gateway is not None
    said = site.gateway.get("/readyz").text
    if json.loads(said)["checks"]["redis"]["ok"]:
        site.problems.append(f"{what}, and the gateway said: {said}")


def drop_messages(site: Site) -> None:
    """RabbitMQ drops tasks that wait: by their own `expiration`, by a policy's TTL, or by its length limit."""
    policies: dict[str, dict[str, object]] = {
        "message TTL of 0.2 s": {"message-ttl": 200},
        "queue limited to 3 messages": {"max-length": 3, "overflow": "drop-head"},
    }
    assert site.callbacks is not None
    for number, _ in enumerate(site.moments(every=2.0)):
        what = list(policies)[number % len(policies)]
        with site.fault(what):
            site.broker.set_policy(site.vhost, "drops", r"^inference\.witness\.", policies[what])
            time.sleep(site.random.uniform(0.5, 1.5))
            if site.random.random() < 0.5:
                # What is dropped meanwhile waits for it.
                site.kill(site.callbacks, "callbacks")
            site.broker.clear_policy(site.vhost, "drops")
    eventually(lambda: _failures(site, "expired"), "a task that RabbitMQ dropped")


def _failures(site: Site, code: str) -> int:
    return sum(entry.kind == "failure" and entry.what == code for entry in site.ledger.read())


_MINUTE = 4.0
"""Seconds that a minute of beat's clock takes."""
_BEAT_SECONDS = 4.0
"""How long beat may take to look at its clock, and to start a run."""
_RUN_LINES = 5


def set_clock(site: Site) -> None:
    """Beat's clock is ahead by a month, and right again: each run that is due after that has to be started.

    One schedule is known before. The other is first seen by the wrong clock.
    """
    source = site.put_source([PlannedTask("", seconds=0.05)] * _RUN_LINES)
    schedule = f'cron = "* * * * *"\nsource = "{source}"\n'
    schedules = site.folder / "schedules.toml"
    schedules.write_text(f"[early]\n{schedule}")
    clock = MovedClock(time.time(), 60 / _MINUTE)
    file = site.folder / "clock.json"
    clock.write(file)
    beat = site.keep(
        "beat", str(file), program="tests.chaos.moved_clock", INFERQ_SCHEDULES_FILE=str(schedules)
    )
    site.others.append(beat)
    eventually(beat.ready, "a beat that is ready")
    moments = site.moments(every=5.0)
    next(moments)
    with site.fault("beat's clock 30 days ahead"):
        replace(clock, days=30).write(file)
        private_text(schedules, f"[early]\n{schedule}\n[late]\n{schedule}")
        time.sleep(site.random.uniform(6, 8))
        if site.random.random() < 0.5:
            site.kill(beat, "beat")
        clock.write(file)
    eventually(beat.ready, "a beat that is ready again")
    right = time.time()
    for _ in moments:
        pass
    time.sleep(max(0.0, right + 5 * _MINUTE - time.time()))
    _expect_runs(site, clock, right)
    beat.stop()
    for run in _runs_of(site, beat):
        site.expect(_lines_of(run))


def _expect_runs(site: Site, clock: MovedClock, right: float) -> None:
    """Plan the lines of each run that has been due since the clock was right."""
    due = clock.at(right).replace(second=0, microsecond=0)
    while clock.when(due) < time.time() - _BEAT_SECONDS:
        if clock.when(due) > right + _BEAT_SECONDS:
            for name in ("early", "late"):
                site.expect(_lines_of(run_id_of(name, due)))
        due += timedelta(minutes=1)


def _lines_of(run: str) -> list[PlannedTask]:
    return [PlannedTask(f"{run}.{n}", seconds=0.05, line=True) for n in range(1, _RUN_LINES + 1)]


def _runs_of(site: Site, beat: Kept) -> set[str]:
    """The runs that beat started, by its log."""
    said = re.findall(r"(\w+): started the run of ([^\s\"]+)", beat.log.read_text("utf-8"))
    return {run_id_of(name, datetime.fromisoformat(due)) for name, due in said}


def kill_engines_with_helpers(site: Site) -> None:
    """The processes that an engine started have to end with it, those in sessions of their own as well."""
    for number, _ in enumerate(site.moments(every=3.0)):
        worker = site.random.choice(site.workers)
        if number % 3 == 2:
            with site.fault("worker stopped"):
                worker.signal(signal.SIGTERM)
        elif engines := worker.children():
            with site.fault("engine killed"), suppress(ProcessLookupError):
                os.kill(site.random.choice(engines), signal.SIGKILL)
        site.await_end_of_orphans()


_POD_GRACES = (0.2, 1.0, 20.0)
"""Seconds from SIGTERM to SIGKILL: a node that vanishes, one that is drained in haste, and more than a run takes."""


def delete_pods(site: Site) -> None:
    """One pod at a time, by scale-in or by a node that goes; and now and then all of them, by a rolling update."""
    for number, _ in enumerate(site.moments(every=1.5)):
        if number % 4 == 3:
            with site.fault("rolling update"):
                for worker in site.workers:
                    worker.end(max(_POD_GRACES))
                    eventually(worker.ready, "the pod in its place")
        else:
            grace = site.random.choice(_POD_GRACES)
            with site.fault(f"pod deleted, {grace:g} s of grace"):
                site.random.choice(site.workers).end(grace)


def kill_sender(site: Site) -> None:
    for _ in site.moments(every=1.2):
        if site.sender and site.sender.running():
            site.kill(site.sender, "sender")


def kill_workers_in_trouble(site: Site) -> None:
    for _ in site.moments(every=4.0):
        site.kill(site.random.choice(site.workers), "worker")


def fill_disk(site: Site) -> None:
    """While the alarm blocks whoever publishes, workers are killed whose retries wait to be published.

    The first publish of a connection still gets into the broker's socket. With two slots there is a second
    one, which waits in the worker: nobody but the delivery that is not yet acknowledged knows of it.
    """
    for _ in site.moments(every=2.5):
        with site.fault("disk alarm"):
            site.broker.ctl("set_disk_free_limit", "9999GB")
            time.sleep(site.random.uniform(2, 4))
            for worker in site.workers:
                site.kill(worker, "worker")
            time.sleep(site.random.uniform(0, 1))
            site.broker.ctl("set_disk_free_limit", "50MB")


def await_the_doomed(site: Site) -> None:
    """Their engine flushes Redis before each death: the broker's count of deliveries is all there is."""
    doomed = {task.id for task in site.tasks.values() if task.trouble == "container"}
    eventually(lambda: doomed <= site.ended(), "the end of the deadly tasks", seconds=180 * len(doomed))


def hand_over(site: Site) -> None:
    """The only busy worker is killed, again and again: how soon does its task run on the idle one?"""
    eventually(lambda: site.tasks.keys() <= site.ended(), "the end of all other tasks")
    publisher = Publisher(BrokerSettings(amqp_url=site.amqp_url), name="chaos")
    publisher.start()
    waits: list[float] = []
    for number in range(5 if site.quick else 15):
        eventually(lambda: all(worker.ready() for worker in site.workers), "two idle workers")
        task = PlannedTask(f"handover-task-{number}", seconds=0.5)
        site.tasks[task.id] = task
        body = json.dumps(task.body()).encode()
        message = Message("inference.tasks", routing_key("witness"), body, message_id=task.id)
        site.ledger.note("sent", task.id)
        publisher.publish(message).result()
        site.ledger.note("confirmed", task.id)
        (first,) = _starts(site, task.id, 1)
        time.sleep(site.random.uniform(0, 0.2))
        victim = next(worker for worker in site.workers if str(worker.pid) == first[1])
        killed_at = time.time()
        site.kill(victim, "worker")
        eventually(partial(_has_ended, site, task.id), f"the end of {task.id}")
        # On a slow machine a task may be done before its worker is killed.
        waits += [at - killed_at for at, _ in _starts(site, task.id, 1)[1:]]
    publisher.close()
    site.figures["handover seconds"] = sorted(waits)
    if statistics.median(waits) >= HANDOVER_LIMIT:
        site.problems.append(
            f"a killed worker's task took {statistics.median(waits):.2f} s to start elsewhere (median)"
        )


def _has_ended(site: Site, task: str) -> bool:
    return task in site.ended()


def _starts(site: Site, task: str, count: int) -> list[tuple[float, str]]:
    """When and on which workers a task was started, once it was that often."""
    found: list[tuple[float, str]] = []

    def enough() -> bool:
        found[:] = [(e.at, e.what) for e in site.ledger.read() if e.kind == "start" and e.task == task]
        return len(found) >= count

    eventually(enough, f"start {count} of {task}")
    return found


SCENARIOS: tuple[Scenario, ...] = (
    Scenario(
        "worker-kills",
        "`kill -9` of a worker every 2 s, and of the delivery of callbacks",
        kill_workers,
        _load(600, 36),
        _load(150, 8),
        Needs(callbacks=True),
    ),
    Scenario(
        "batches",
        "tasks computed in batches of up to 8, some of which fail, are invalid or crash the engine; `kill -9` "
        "of workers every second, while S3 refuses their results",
        kill_workers_often,
        _load(900, 36, busy=3.0, transient=20, invalid=20, crash=8, poison=3),
        _load(240, 12, busy=3.0, transient=8, invalid=8, crash=6),
        Needs(store="s3", batch_size=8),
    ),
    Scenario(
        "taken-ahead",
        "tasks taken ahead; `kill -9` of workers and of engine processes",
        kill_workers_and_engines,
        _load(600, 30, transient=10, crash=6),
        _load(100, 6, transient=4),
        Needs(ahead=True),
    ),
    Scenario(
        "engine-kills",
        "`kill -9` of an engine process every second",
        kill_engines,
        _load(600, 30),
        _load(120, 6),
    ),
    Scenario(
        "worker-stops",
        "`SIGSTOP` of two of three workers for longer than the heartbeat",
        suspend_workers,
        _load(600, 55, busy=2.0),
        _load(120, 10, busy=2.0),
        Needs(workers=3),
    ),
    Scenario(
        "broker-kills",
        "`kill -9` and restart of the broker while it is published to and consumed from",
        kill_broker,
        _load(800, 40),
        _load(200, 14),
    ),
    Scenario(
        "leader-kills",
        "three-node cluster: `kill -9` and restart of the node that leads the queue",
        kill_broker,
        _load(600, 50),
        None,
        nodes=3,
    ),
    Scenario(
        "bad-lines",
        "connections to the broker cut, delayed, half-closed, refused",
        spoil_lines,
        _load(600, 36, busy=2.0),
        _load(120, 8, busy=2.0),
        Needs(workers=3, proxied=True),
    ),
    Scenario(
        "redis",
        "Redis killed and restarted, and flushed",
        lose_redis,
        _load(600, 30),
        _load(120, 6),
    ),
    Scenario(
        "s3",
        "S3 answering 500, hanging, losing its answers; connections cut and a worker killed meanwhile",
        fail_s3,
        _load(500, 40, busy=2.0),
        _load(100, 11, busy=2.0),
        Needs(workers=3, store="s3", proxied=True),
    ),
    Scenario(
        "s3-proxy",
        "a proxy in front of S3 answering 404 or 403 for it, while a batch is fed and the gateway takes tasks with "
        "uploaded inputs",
        answer_for_s3,
        _load(160, 20),
        None,
        Needs(store="s3", gateway=True, inputs=("inferq",), batch=40),
    ),
    Scenario(
        "s3-credentials",
        "S3 refusing the clock, the key, the signature or an expired token, also for inputs",
        refuse_credentials,
        _load(160, 20),
        None,
        Needs(store="s3", gateway=True, inputs=("inferq", "s3"), batch=40),
    ),
    Scenario(
        "redis-refuses",
        "Redis that reads and refuses writes: full, or a read-only replica; tasks submitted to the gateway, which is "
        "asked about them",
        refuse_writes,
        _load(400, 28),
        _load(60, 6),
        Needs(gateway=True, batch=40),
    ),
    Scenario(
        "dropped",
        "messages that RabbitMQ drops, by `expiration`, by a policy's TTL or length limit; and `kill -9` of the "
        "delivery of callbacks",
        drop_messages,
        _load(500, 26, busy=2.0, expiring=60),
        None,
        Needs(callbacks=True, dropping=True),
    ),
    Scenario(
        "beat-clock",
        "nightly runs: beat's clock ahead by 30 days, and right again",
        set_clock,
        _load(150, 40, busy=0.4),
        None,
        Needs(store="s3", batches=True),
    ),
    Scenario(
        "engine-helpers",
        "`kill -9` of engine processes that started programs and daemons, none of which may live on; workers stopped "
        "and started",
        kill_engines_with_helpers,
        _load(200, 24),
        None,
        Needs(helpers=True),
    ),
    Scenario(
        "pods",
        "pods deleted at random (`SIGTERM`, and `SIGKILL` after 0.2, 1 or 20 s of grace), and rolling updates",
        delete_pods,
        # Long enough that the end of the grace finds some of them running.
        _load(200, 45, busy=2.2),
        _load(40, 8, busy=2.0),
        Needs(workers=3),
    ),
    Scenario(
        "sender-kills",
        "the publisher killed between publish and confirm, and sending again",
        kill_sender,
        _load(800, 30),
        _load(150, 6),
    ),
    Scenario(
        "troubled-tasks",
        "tasks that fail, are invalid, crash their engine once or always; and `kill -9` of workers",
        kill_workers_in_trouble,
        _load(600, 30, transient=20, hopeless=6, invalid=20, crash=12, poison=4),
        None,
        Needs(callbacks=True),
    ),
    Scenario(
        "disk-alarm",
        "disk alarm raised and cleared, the workers killed while it lasts",
        fill_disk,
        _load(600, 36, busy=3.0, transient=150, invalid=10),
        _load(150, 8, busy=4.0, transient=50, invalid=3),
        Needs(slots=2),
    ),
    Scenario(
        "deadly-tasks",
        "tasks that flush Redis and kill their whole container, each time",
        await_the_doomed,
        _load(500, 30, busy=0.5, container=2),
        _load(60, 5, busy=0.5, container=1),
        Needs(workers=3),
    ),
    Scenario(
        "handover",
        "`kill -9` of the only busy worker, another one idle",
        hand_over,
        _load(500, 1, busy=10),
        _load(20, 1),
    ),
)
