"""All parts, each with its rights and no others, after they have done all their work once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler
from typing import Any

import pika
import pytest

from inferq.broker import (
    BrokerSettings,
    DeadLetters,
    Filter,
    Publisher,
    connect,
    topology_for,
)
from inferq.producer.nightly.beat import Beat
from inferq.producer.nightly.schedules import read_schedules
from inferq.schemas import installed_types, types
from inferq.schemas.schedule import Schedule
from inferq.storage import (
    WebhookSecrets,
)
from inferq.storage.nightly_runs import RunLog
from tests.callbacks.conftest import Receiver, say
from tests.conftest import RabbitMQ, Redis
from tests.installation import inferq_here
from tests.rights.site import PLUGIN, TYPE, Site, prepare, site_in
from tests.waiting import eventually


class Hook:
    """Answers callbacks: 500 to the first one at `/once`, 410 at `/gone` until `healed`."""

    def __init__(self) -> None:
        self.healed = False
        self._failed = False

    def __call__(self, handler: BaseHTTPRequestHandler, number: int) -> None:
        status = 200
        if handler.path == "/once" and not self._failed:
            status, self._failed = 500, True
        elif handler.path == "/gone" and not self.healed:
            status = 410
        say(status)(handler, number)


@pytest.fixture(scope="module")
def site(shared_rabbitmq: RabbitMQ, aws: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    redis = Redis(tmp_path_factory.mktemp("rights-redis"))
    try:
        redis.start()
        with site_in(tmp_path_factory.mktemp("rights"), shared_rabbitmq, redis) as site:
            yield site
    finally:
        redis.discard()


@pytest.fixture(scope="module")
def plugin() -> Iterator[None]:
    """The test's own type, in this process too."""

    def look_again() -> None:
        for cached in (types.installed_types, types._reader, types._union):
            cached.cache_clear()

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(PLUGIN))
        look_again()
        yield
    look_again()


@pytest.fixture(scope="module")
def worked(site: Site, plugin: None) -> Site:
    """The site after all its parts have done their work."""
    prepare(site, {"in/a.txt": b"a", "in/b.txt": b"b", "held.jsonl": b'{"fault": "hang"}\n' * 2})
    for command in ("apply", "check"):
        _run(site, "topology", "topology", command)
    WebhookSecrets(site.folder / "secrets.json").rotate("default")
    site.start()
    hook = Hook()
    with Receiver(hook) as receiver:
        base = receiver.url.removesuffix("/hook")
        _tasks(site, base)
        _batches(site, base)
        _callbacks(site, hook)
        _dead_letters(site)
        _dropped(site, base)
        _nights(site)
        _planted(site, base)
    _figures(site)
    site.stop()
    return site


def _run(site: Site, user: str, *arguments: str) -> None:
    ran = inferq_here(site.env(user), *arguments)
    assert ran.returncode == 0, ran.stderr


def _ok(answer: Any) -> Any:
    assert answer.status_code in (200, 201, 202), answer.text
    return answer


def _reaches(site: Site, task_id: str, state: str) -> None:
    headers = {} if state == "running" else {"Prefer": "wait=20"}

    def look() -> bool:
        answer = site.http.get(f"/v1/tasks/{task_id}", headers=headers)
        assert answer.status_code in (200, 404), answer.text  # a line that is not fed yet
        return bool(answer.status_code == 200 and answer.json()["state"] == state)

    eventually(look, f"{task_id} {state}")


def _tasks(site: Site, base: str) -> None:
    http = site.http
    upload = _ok(http.post("/v1/files", content=b"x" * (9 << 20))).json()["url"]  # in two parts
    task = {"task_type": TYPE, "file_url": upload, "fault": "artifact"}
    _ok(http.post("/v1/tasks", json={"task_id": "made", "callback_url": f"{base}/once", **task}))
    _reaches(site, "made", "succeeded")
    result = _ok(http.get("/v1/tasks/made/result")).json()
    _ok(http.get(f"/v1/tasks/made/artifacts/{result['artifacts'][0]['name']}"))
    _ok(http.post("/v1/tasks", json={"task_id": "again", **task}))  # from the result cache
    _reaches(site, "again", "succeeded")
    once = {"times": 1, "marker": str(site.folder / "retried")}
    _ok(
        http.post(
            "/v1/tasks", json={"task_id": "retried", "task_type": TYPE, "fault": "transient", "options": once}
        )
    )
    _reaches(site, "retried", "succeeded")
    held = {"task_id": "held", "task_type": TYPE, "fault": "hang", "file_url": "s3://scans/in/a.txt"}
    _ok(http.post("/v1/tasks", json=held))
    _reaches(site, "held", "running")
    _ok(http.post("/v1/tasks/held/cancel"))
    _reaches(site, "held", "cancelled")
    bad = {"task_id": "bad", "task_type": TYPE, "fault": "invalid", "callback_url": f"{base}/gone"}
    _ok(http.post("/v1/tasks", json=bad))
    _reaches(site, "bad", "failed")
    assert len(_ok(http.get("/v1/tasks")).json()["items"]) == 5


def _batches(site: Site, base: str) -> None:
    http = site.http
    lines = b'{"fault": "none"}\n{"fault": "invalid"}\n{"fault": "none", "task_id": "mine"}\n'
    upload = _ok(http.post("/v1/files", content=lines)).json()["url"]
    batch = {"batch_id": "lines", "source": upload, "task_type": TYPE, "callback_url": f"{base}/gone"}
    _ok(http.post("/v1/batches", json=batch))
    _batch_reaches(site, "lines", "completed")
    assert len(_ok(http.get("/v1/batches/lines/output")).text.splitlines()) == 2
    held = {"batch_id": "held", "source": "s3://scans/held.jsonl", "task_type": TYPE}
    _ok(http.post("/v1/batches", json=held))
    _reaches(site, "held.1", "running")
    _ok(http.post("/v1/tasks/held.1/cancel"))
    _reaches(site, "held.1", "cancelled")
    _ok(http.post("/v1/batches/held/cancel"))
    _batch_reaches(site, "held", "cancelled")
    assert len(_ok(http.get("/v1/batches")).json()["items"]) == 2


def _batch_reaches(site: Site, batch_id: str, state: str) -> None:
    def look() -> bool:
        answer = site.http.get(f"/v1/batches/{batch_id}")
        assert answer.status_code in (200, 404), answer.text  # a run that has no batch yet
        return bool(answer.status_code == 200 and answer.json()["state"] == state)

    eventually(look, f"batch {batch_id} {state}")


def _callbacks(site: Site, hook: Hook) -> None:
    """Callbacks that were given up are sent again."""

    def reach(state: str, *subjects: str) -> None:
        def look() -> bool:
            found = [_ok(site.http.get(f"/v1/{subject}/callbacks")).json()["items"] for subject in subjects]
            return all([record["state"] for record in records] == [state] for records in found)

        eventually(look, f"{state} callbacks")

    reach("delivered", "tasks/made")
    reach("failed", "tasks/bad", "batches/lines")
    assert len(_ok(site.http.get("/v1/callbacks")).json()["items"]) == 2
    hook.healed = True
    for subject in ("tasks/bad", "batches/lines"):
        _ok(site.http.post(f"/v1/{subject}/callbacks/resend"))
    reach("delivered", "tasks/bad", "batches/lines")


def _dead_letters(site: Site) -> None:
    """What `inferq dead` does."""
    settings = BrokerSettings(amqp_url=site.amqp_url("dead"))
    with DeadLetters(settings, TYPE) as letters:
        assert len(letters.read()) == 2
        assert len(letters.redrive(Filter(task_id="bad"))) == 1
        assert len(eventually(lambda: letters.purge(Filter(task_id="bad")))) == 1


def _dropped(site: Site, base: str) -> None:
    """A task that expires in its queue, twice: the second time its end is on record."""
    with closing(connect(BrokerSettings(amqp_url=site.amqp_url("producer")), name="test")) as connection:
        channel = connection.channel()
        channel.confirm_delivery()
        for _ in range(2):
            task = json.dumps(
                {"task_id": "late", "task_type": "echo", "callback_url": f"{base}/late"}
            ).encode()
            soon = pika.BasicProperties(delivery_mode=2, expiration="1")
            channel.basic_publish("inference.tasks", "task_type.echo", task, soon, mandatory=True)
            _reaches(site, "late", "failed")


def _nights(site: Site) -> None:
    """A run that was due a minute ago, a schedule that is new, one that is in the file no longer, another run."""
    due = datetime.now(UTC) - timedelta(minutes=1)
    given = {"cron": f"{due.minute} {due.hour} * * *", "source": "s3://scans/in/", "task_type": TYPE}
    file = site.folder / "schedules.toml"
    tables = (("night", given), ("new", {**given, "cron": "0 0 1 1 *"}))
    file.write_text(
        "".join(
            f"[{name}]\n" + "".join(f'{key} = "{value}"\n' for key, value in table.items())
            for name, table in tables
        )
    )
    store = site.store("admin")
    for name in ("night", "old"):
        schedule = Schedule.model_validate({"name": name, **given})
        RunLog(store, "default", name).know(due - timedelta(minutes=1), schedule)
    publisher = Publisher(
        BrokerSettings(amqp_url=site.amqp_url("beat")), name="beat", topology=topology_for(installed_types())
    )
    publisher.start()
    try:
        beat = Beat(
            file,
            site.store("beat"),
            lambda message: publisher.publish(message).result(60),
            read_schedules(file),
        )
        for seconds in (0, 3):
            beat.tick(datetime.now(UTC) + timedelta(seconds=seconds))
        assert beat.state.ready, beat.state
    finally:
        publisher.close()

    def run() -> str:
        """The last run, once it has ended."""
        last = RunLog(store, "default", "night").last()
        assert last is not None
        _batch_reaches(site, last.run_id, "completed")
        return last.run_id

    eventually(lambda: RunLog(store, "default", "night").last())
    first = run()
    _run(site, "nightly", "nightly", "run", "night")
    eventually(lambda: (last := RunLog(store, "default", "night").last()) and last.run_id != first)
    for command in ("check", "list"):
        _run(site, "nightly", "nightly", command)


def _figures(site: Site) -> None:
    """What operators see, from the monitor and by the gateway."""

    def known() -> bool:
        stats = _ok(site.http.get("/v1/stats")).json()
        return not stats["unknown"] and stats["nights"]["completed"] == 1 and stats["late_nights"]

    def idle() -> bool:  # its heartbeat comes after the end of its last task
        (worker,) = _ok(site.http.get("/v1/workers")).json()["items"]
        assert worker["task_type"] == TYPE
        return bool(worker["state"] == "idle")

    eventually(known)
    eventually(idle)


def _planted(site: Site, base: str) -> None:
    """Values that no log may have, on each way that they take: a success, failures, a refused request, a callback."""
    http, marker = site.http, str(site.folder / "planted-marker")
    about = {
        "metadata": {"note": "planted-text"},
        "callback_url": base.replace("://", "://planted-user:planted-word@") + "/once?token=planted-query",
    }
    gone = "http://127.0.0.1:1/planted-file.png?signature=planted-query"
    tasks: dict[str, dict[str, Any]] = {
        "told": {"options": {"marker": marker}},
        "unfetched": {"file_url": gone},
        "unfound": {"file_url": "s3://scans/planted-file.png"},
        "retold": {"fault": "transient", "options": {"marker": marker, "times": 2}},
        "died": {"fault": "crash", "options": {"marker": marker, "times": 3}},
    }
    for task_id, task in tasks.items():
        _ok(http.post("/v1/tasks", json={"task_id": task_id, "task_type": TYPE, **about, **task}))
    for task_id in tasks:
        _reaches(site, task_id, "failed" if task_id.startswith("un") else "succeeded")
    bad = {"task_type": TYPE, "fault": "planted-text", "planted-field": "planted-text"}
    assert http.post("/v1/tasks", json=bad).status_code == 422
    assert http.post("/v1/tasks?planted-query=1", content=b'{"planted-text').status_code == 400
    assert http.get("/v1/planted-path?token=planted-query").status_code == 404
    assert http.get("/v1/tasks/none/artifacts/planted-file.png").status_code == 404
    assert http.get("/v1/tasks", headers={"Authorization": "Bearer planted-key"}).status_code == 401
    with closing(connect(BrokerSettings(amqp_url=site.amqp_url("producer")), name="test")) as connection:
        task = json.dumps({"task_id": "unread", **bad}).encode()
        key = f"task_type.{TYPE}"
        connection.channel().basic_publish(
            "inference.tasks", key, task, pika.BasicProperties(delivery_mode=2)
        )
    _reaches(site, "unread", "failed")

    def told() -> bool:
        items = _ok(http.get("/v1/tasks/told/callbacks")).json()["items"]
        return [item["state"] for item in items] == ["delivered"]

    eventually(told, "a callback")
