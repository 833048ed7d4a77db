"""inferq nightly: check, list and start nightly runs; inferq beat: start them when they are due."""

from __future__ import annotations

import logging
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal
from zoneinfo import ZoneInfo

import typer

from inferq.broker import BrokerSettings, Message, Publisher, connect, topology_for
from inferq.producer.capacity import parse_span
from inferq.producer.cli.output import JsonFlag, complain, console, print_json, print_table
from inferq.producer.nightly.settings import NightlySettings
from inferq.schemas import CountsNow, InferqError, InstallationError, InvalidTask, installed_types, tracing
from inferq.schemas.logs import LogSettings, start_log
from inferq.schemas.probe_server import ProbeServer
from inferq.schemas.window import moment_of
from inferq.storage import BatchStore, StatusOutage, StorageSettings, StoreWatch, open_store

if TYPE_CHECKING:
    from inferq.schemas.schedule import Schedule
    from inferq.storage.nightly_runs import Run

app = typer.Typer()
nightly = typer.Typer(no_args_is_help=True)
app.add_typer(nightly, name="nightly", help="Check, list and start nightly runs.")

File = Annotated[
    Path | None, typer.Option("--file", help="The file of schedules (default: INFERQ_SCHEDULES_FILE).")
]

_SHOWN = 5
_MOST_MINUTES = 11 * 60
"""Of a lead or a hold: together they have to be less than a day."""
_YEAR = timedelta(days=366)
_COUNTS = ("total", "succeeded", "failed", "invalid")


def _read(file: Path | None) -> dict[str, Schedule]:
    # `inferq nightly --help` works even if the packages for schedules are not installed.
    try:
        from inferq.producer.nightly import read_schedules
    except ImportError as error:
        raise InstallationError(
            f"schedules need packages that are not installed ({error}); run: pip install 'inferq[jobs]'",
            code="jobs_not_installed",
        ) from error
    return read_schedules(_path(file))


def _path(file: Path | None) -> Path:
    return file or NightlySettings.load().schedules_file


def _publisher(name: str) -> Publisher:
    publisher = Publisher(BrokerSettings.load(), name=name, topology=topology_for(installed_types()))
    publisher.start()
    return publisher


@nightly.command()
def check(file: File = None, as_json: JsonFlag = False) -> None:
    """Check that the schedules are valid and their sources can be read. Exit status 1 if one fails."""
    schedules = _read(file)
    now = datetime.now(UTC)
    found = [_checked(schedule, now) for schedule in schedules.values()]
    if as_json:
        print_json(found)
    else:
        for facts in found:
            console.print(facts["name"], style="bold")
            for start in facts["next"]:
                console.print(f"  {start['local']}   {start['utc']}")
            console.print(f"  source: {facts['source']}", soft_wrap=True)
        if not found:
            console.print(f"{_path(file)} has no schedules", soft_wrap=True)
    faults = [facts for facts in found if not facts["ok"]]
    for facts in faults:
        complain(f"{facts['name']}: {facts['source']}")
    if faults:
        raise typer.Exit(1)


def _checked(schedule: Schedule, now: datetime) -> dict[str, Any]:
    zone = ZoneInfo(schedule.time_zone)
    starts = [
        {"local": f"{start.astimezone(zone):%a %Y-%m-%d %H:%M %Z}", "utc": f"{start:%Y-%m-%d %H:%M} UTC"}
        for start in islice(schedule.times.after(now), _SHOWN)
    ]
    ok, source = _source(schedule)
    return {"name": schedule.name, "ok": ok, "source": source, "next": starts}


def _source(schedule: Schedule) -> tuple[bool, str]:
    """Whether the source can be read now, and the explanation."""
    from inferq.schemas.batch_source import JSONL_ENDINGS
    from inferq.schemas.s3_url import split_s3_prefix
    from inferq.storage.batches.sources import Sources

    try:
        settings = StorageSettings.load()
        store = open_store(settings)
        objects = Sources(store, BatchStore(store), settings).objects(schedule.source)
        first = next(objects, None)
    except InferqError as error:
        return False, error.message
    if schedule.source.endswith(JSONL_ENDINGS):
        # A file's key comes before all other keys that begin with it.
        if first is None or first.key != split_s3_prefix(schedule.source)[1]:
            return False, f"there is no {schedule.source}, or it is empty; upload it, or correct the schedule"
    elif first is None:
        return True, f"{schedule.source} can be read; it is empty now"
    return True, f"{schedule.source} can be read"


@nightly.command("list")
def list_(file: File = None, as_json: JsonFlag = False) -> None:
    """List the schedules, with their next start, their last run and its tasks."""
    now = datetime.now(UTC)
    rows = [_facts(schedule, now) for schedule in _read(file).values()]
    if as_json:
        print_json(rows)
    else:
        columns = ["name", "next start", "last run", "state", *_COUNTS]
        print_table(columns, [list(row.values()) for row in rows])


def _facts(schedule: Schedule, now: datetime) -> dict[str, Any]:
    from inferq.storage.nightly_runs import RunLog

    settings = StorageSettings.load()
    store = open_store(settings)
    coming = next(schedule.times.after(now))
    log = RunLog(store, schedule.tenant, schedule.name)
    last = log.last()
    state, counts = None, CountsNow()
    if last is not None:
        taken = log.taken(last.run_id)
        # A start that failed made no batch; a batch with this id is another one.
        if taken is not None and taken.error is not None:
            state = f"failed: {taken.error}"
        else:
            state, counts = _standing(settings, BatchStore(store), last)
    return {
        "name": schedule.name,
        "next": _local(schedule, coming),
        "last_run": last.run_id if last else None,
        "state": state,
        **{name: getattr(counts, name) for name in _COUNTS},
    }


def _standing(settings: StorageSettings, batches: BatchStore, run: Run) -> tuple[str, CountsNow]:
    """A run's state in words, and the counts of its tasks as far as they are known."""
    from inferq.storage import BatchIndex, StatusIndex

    tenant = run.schedule.tenant
    summary = batches.summary(tenant, run.run_id)
    if summary is not None:
        state: str = summary.state
        if summary.error is not None:
            state += f": {summary.error}"
        elif state == "completed" and summary.counts.total == 0:
            state += ": nothing new"
        return state, summary.counts
    try:
        standing = BatchIndex(StatusIndex.from_settings(settings)).look(tenant, run.run_id)
    except StatusOutage:
        return "not ended; Redis, which holds the details, is unavailable", CountsNow()
    if standing is None:
        return "starting", CountsNow()
    state = standing.state or "starting"
    window = run.schedule.feeding_window
    if state == "paused" and window is not None:
        state += f": until {window.start} {window.time_zone}"
    # During a recount only the total is right.
    return state, standing.counts if standing.known else CountsNow(total=standing.counts.total)


@nightly.command()
def run(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The schedule.")],
    at: Annotated[
        str | None,
        typer.Option(help="The time of a missed run, e.g. 2026-11-25T01:30+01:00 (default: now)."),
    ] = None,
    file: File = None,
    as_json: JsonFlag = False,
) -> None:
    """Start a schedule's run now, or with --at the run of an earlier time, unless it has ended."""
    from inferq.schemas.schedule import run_id_of

    schedules = _read(file)
    if name not in schedules:
        known = ", ".join(schedules) or "none"
        raise InvalidTask(f"there is no schedule {name!r}; known schedules: {known}", code="unknown_schedule")
    schedule = schedules[name]
    now = datetime.now(UTC).replace(microsecond=0)
    moment = _moment(at, schedule) if at else now
    if moment > now:
        # Beat would find a run of this id and not start it at its time.
        raise InvalidTask(
            f"--at {at!r} is in the future: inferq beat starts that run; leave out --at to start one now"
        )
    if at:
        _check_due(schedule, moment)
    run_id = run_id_of(name, moment)
    before = _before(schedule, run_id) if at else None
    if before != "ended":
        _send(schedule, moment)
    window = schedule.feeding_window
    wait = 0.0 if window is None or before == "ended" else window.opens_in(now)
    if as_json:
        feeds_from = (now + timedelta(seconds=wait)).isoformat() if wait else None
        print_json({"run_id": run_id, "started_before": before is not None, "feeds_from": feeds_from})
        return
    match before:
        case "ended":
            line = f"{run_id} has ended already; nothing was started"
        case "begun":
            line = f"{run_id} was started before; it continues, and repeats no task"
        case None:
            line = f"{'queued' if wait else 'started'} {run_id}"
    if window is not None and wait:
        line += f"; outside its window: it feeds from {window.start} {window.time_zone}"
    console.print(line, soft_wrap=True)


def _before(schedule: Schedule, run_id: str) -> Literal["begun", "ended"] | None:
    """The state of a run that was started before; None if it was not."""
    from inferq.storage.nightly_runs import RunLog

    store = open_store(StorageSettings.load())
    if not RunLog(store, schedule.tenant, schedule.name).has(run_id):
        return None
    return "begun" if BatchStore(store).summary(schedule.tenant, run_id) is None else "ended"


def _send(schedule: Schedule, moment: datetime) -> None:
    from inferq.producer.nightly.beat import send_start

    # A publisher keeps retrying for a while; this shows an unavailable broker to the user at once.
    connect(BrokerSettings.load(), name="nightly").close()
    logging.getLogger("inferq.broker").addHandler(logging.NullHandler())  # main prints the error, once
    publisher = _publisher("nightly")
    try:
        with tracing.exporting("cli", required=False):
            send_start(schedule, moment, lambda message: publisher.publish(message).result())
    finally:
        publisher.close()


@nightly.command()
def keda(
    file: Annotated[
        Path | None,
        typer.Argument(metavar="SCHEDULES", help="The file of schedules (default: INFERQ_SCHEDULES_FILE)."),
    ] = None,
    task_type: Annotated[
        str | None, typer.Option("--type", help="Only this task type: one patch, for a file.")
    ] = None,
    replicas: Annotated[int, typer.Option(min=1, help="The workers to start.")] = 1,
    lead: Annotated[str, typer.Option(help="How long before a run is fed they start.")] = "10m",
    hold: Annotated[str, typer.Option(help="How long they stay afterwards, even without tasks.")] = "30m",
    formula: Annotated[
        str | None,
        typer.Option(help="The formula of the ScaledObject (default: that of k8s/components/keda)."),
    ] = None,
) -> None:
    """Print KEDA's cron triggers that start workers before the runs: a patch of each type's ScaledObject."""
    by_type: dict[str | None, list[Schedule]] = {}
    for schedule in _read(file).values():
        name = schedule.task_type or schedule.defaults.get("task_type")
        by_type.setdefault(None if name is None else str(name), []).append(schedule)
    from inferq.producer.nightly.keda import FORMULA, patch_of

    if task_type is not None and task_type not in by_type:
        known = ", ".join(sorted(filter(None, by_type))) or "none"
        raise InvalidTask(f"no schedule has --type {task_type!r}; task types of the schedules: {known}")
    minutes = {"lead": _minutes("--lead", lead), "hold": _minutes("--hold", hold)}
    for schedule in by_type.pop(None, ()) if task_type is None else ():
        console.print(f"# {schedule.name}: has no task_type, so no worker is known to start", soft_wrap=True)
    for name in by_type if task_type is None else (task_type,):
        patch, left_out = patch_of(by_type[name], replicas=replicas, **minutes, formula=formula or FORMULA)
        separator = "---\n" if task_type is None else ""
        console.print(f"{separator}# A JSON patch of the ScaledObject worker-{name}", soft_wrap=True)
        for reason in left_out:
            console.print(f"# {reason}", soft_wrap=True)
        console.print(patch, end="", soft_wrap=True)


def _minutes(option: str, text: str) -> int:
    minutes = round(parse_span(option, text) / 60)
    if not 1 <= minutes <= _MOST_MINUTES:
        raise InvalidTask(f"{option} {text!r} is not from 1m to {_MOST_MINUTES // 60}h")
    return minutes


def _moment(text: str, schedule: Schedule) -> datetime:
    try:
        # A run's id has no microseconds: without them, equal ids have equal times.
        moment = datetime.fromisoformat(text).replace(microsecond=0)
        if moment.tzinfo is None:
            return moment_of(moment, ZoneInfo(schedule.time_zone))
        return moment.astimezone(UTC)
    except (ValueError, OverflowError) as error:  # in UTC it may lie outside the years 1 to 9999
        raise InvalidTask(f"--at {text!r} is not a date and time; write 2026-11-25T01:30+01:00") from error


def _check_due(schedule: Schedule, moment: datetime) -> None:
    """Raise InvalidTask if the cron has no such time: a mistyped time would start an extra run."""
    due = schedule.times.latest(moment - _YEAR, moment)
    if due != moment:
        before = "" if due is None else f"; the time before it is {_local(schedule, due)}"
        raise InvalidTask(
            f"--at {_local(schedule, moment)} is not a time of the cron {schedule.cron!r}{before}; "
            "leave out --at to start a run now"
        )


def _local(schedule: Schedule, moment: datetime) -> str:
    return moment.astimezone(ZoneInfo(schedule.time_zone)).isoformat(timespec="minutes")


@app.command()
def beat(
    file: File = None,
    check: Annotated[
        bool, typer.Option("--check", help="Check the settings and the schedules, then exit.")
    ] = False,
) -> None:
    """Start nightly runs when they are due, until SIGTERM. Rereads the schedules when they change."""
    schedules = _read(file)

    from prometheus_client import make_wsgi_app

    from inferq.broker.celery_app import celery_app
    from inferq.producer.nightly.beat import Beat, keep_beating
    from inferq.producer.nightly.readiness import beat_readiness

    settings = NightlySettings.load()
    LogSettings.load()
    path = _path(file)
    store = open_store(StorageSettings.load())
    broker = BrokerSettings.load()
    if check:
        tracing.wanted()
        typer.echo(f"beat: settings are in order; schedules: {', '.join(schedules) or 'none'}")
        return
    start_log("beat")
    publisher = _publisher("beat")

    def publish(message: Message) -> None:
        publisher.publish(message).result()

    runner = Beat(path, store, publish, schedules)
    try:
        if settings.probe_port is not None:
            watch = StoreWatch(store)
            probes = ProbeServer(
                settings.probe_host,
                settings.probe_port,
                readiness=lambda: beat_readiness(runner, publisher, watch),
                metrics=make_wsgi_app(runner.metrics.registry),
            )
            watch.start()
            probes.start()
        with tracing.exporting("beat"):
            keep_beating(celery_app(broker), runner)
    finally:
        publisher.close()
