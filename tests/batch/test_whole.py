"""Batches as a person has them: the command line, a gateway, a worker, and a feeder that is killed."""

from __future__ import annotations

import errno
import json
import os
import signal
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from inferq.broker import BrokerSettings, Message, Publisher, assemble_message, topology_for
from inferq.producer.client.errors import Conflict, NotFound
from inferq.producer.client.sync_client import Client
from inferq.schemas import BatchStatus, CountsNow
from inferq.storage import ResultStore, StorageSettings, WebhookSecrets, errors_key, open_store, output_key
from tests.callbacks.conftest import Receiver, say
from tests.conftest import RabbitMQ
from tests.forked import ForkedPart
from tests.installation import inferq, inferq_here, installation
from tests.waiting import eventually

MAX_UPLOAD_BYTES = 1 << 20


@pytest.fixture(scope="module")
def env(
    shared_rabbitmq: RabbitMQ, redis_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, str]]:
    folder = tmp_path_factory.mktemp("batches")
    settings = {
        "INFERQ_STORE_FSYNC": "false",
        "INFERQ_BATCH_SIZE": "1",  # so that a line waits in its queue while another is computed
        "INFERQ_CALLBACK_ALLOWED_NETWORKS": "127.0.0.0/8",
        "INFERQ_WEBHOOK_SECRETS_FILE": str(folder / "secrets.json"),
        "INFERQ_MAX_UPLOAD_BYTES": str(MAX_UPLOAD_BYTES),
    }
    with installation(shared_rabbitmq, redis_url, folder, "echo", **settings) as env:
        yield env


class Feeder:
    """`inferq callbacks` as a process."""

    def __init__(self, env: dict[str, str]) -> None:
        self._env = env | {"INFERQ_BATCH_SLICE": "3", "INFERQ_BATCH_LEASE": "2"}
        self.start()

    def start(self) -> None:
        self.process = ForkedPart("callbacks", "--threads", "4", env=self._env)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


@pytest.fixture(scope="module")
def feeder(env: dict[str, str]) -> Iterator[Feeder]:
    feeder = Feeder(env)
    yield feeder
    assert feeder.stop() == 0


@pytest.fixture
def client(env: dict[str, str]) -> Iterator[Client]:
    with Client(env["INFERQ_API_URL"], env["INFERQ_API_KEY"]) as client:
        yield client


def ended(client: Client, batch_id: str, seconds: float = 60) -> BatchStatus:
    return client.wait_batch(batch_id, timeout=seconds)


def entries(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_batch_is_submitted_followed_saved_and_called_back(
    env: dict[str, str], feeder: Feeder, tmp_path: Path
) -> None:
    store = open_store(StorageSettings(store_url=env["INFERQ_STORE_URL"]))
    secret = WebhookSecrets(Path(env["INFERQ_WEBHOOK_SECRETS_FILE"])).rotate("default").secret
    stood: list[int] = []

    def look(handler: BaseHTTPRequestHandler, number: int) -> None:
        stood.append(sum(store.stat(key("default", "cli-1")).bytes > 0 for key in (output_key, errors_key)))
        say(200)(handler, number)

    with Receiver(look) as receiver:
        whole_batch(env, receiver.url, tmp_path)
        eventually(lambda: receiver.got, what="the batch's callback")
        publish(env, assemble_message("default", "cli-1"))
        eventually(lambda: len(receiver.got) == 2, what="the repeated callback")
    first, second = receiver.got
    event = first.verify(secret.get_secret_value())
    assert (event["type"], event["data"]["batch_id"]) == ("batch.completed", "cli-1")
    assert event["data"]["counts"]["succeeded"] == 40
    assert (first.id, first.body) == (second.id, second.body)
    assert stood == [2, 2]


def publish(env: dict[str, str], message: Message) -> None:
    broker = BrokerSettings(amqp_url=env["INFERQ_AMQP_URL"])
    publisher = Publisher(broker, name="test", topology=topology_for(["echo"]))
    publisher.start()
    publisher.publish(message).result()
    publisher.close()


def whole_batch(env: dict[str, str], callback_url: str, tmp_path: Path) -> None:
    source = tmp_path / "tasks.jsonl"
    source.write_text("".join(f'{{"payload": {n}}}\n' for n in range(1, 41)) + "broken\n")
    run = inferq(
        env,
        "batch",
        "submit",
        str(source),
        "--type",
        "echo",
        "--id",
        "cli-1",
        "--callback",
        callback_url,
        "--follow",
        "--out",
        str(tmp_path),
    )
    assert run.returncode == 1, run.stderr  # one line is invalid
    assert "completed" in run.stdout
    assert "completed 41/41 0 failed, 1 invalid" in run.stderr
    output = entries((tmp_path / "output.jsonl").read_text())
    assert [entry["output"]["payload"] for entry in output] == list(range(1, 41))
    (error,) = entries((tmp_path / "errors.jsonl").read_text())
    assert (error["line"], error["error"]["code"]) == (41, "not_json")
    assert entries(inferq_here(env, "batch", "output", "cli-1").stdout) == output
    assert "cli-1" in inferq_here(env, "batch", "list").stdout
    status = json.loads(inferq_here(env, "batch", "status", "cli-1", "--json").stdout)
    assert (status["state"], status["counts"]["succeeded"], status["counts"]["invalid"]) == (
        "completed",
        40,
        1,
    )
    assert inferq_here(env, "batch", "cancel", "cli-1").returncode == 1  # it has ended


def test_a_folder_is_uploaded_and_each_file_a_task(
    env: dict[str, str], client: Client, tmp_path: Path
) -> None:
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    for name in ("a.txt", os.fsdecode(b"b\xff.txt"), "deep/c.txt", ".hidden"):
        (folder / name).write_text("李明在北京。")
    run = inferq_here(env, "batch", "submit", str(folder), "--type", "ner", "--id", "folder-1")
    assert run.returncode == 0, run.stderr
    store = open_store(StorageSettings(store_url=env["INFERQ_STORE_URL"]))
    source = client.batch("folder-1").source.removeprefix("inferq:")
    lines = entries(store.get(f"files/default/{source}").decode())
    assert [line["metadata"]["source"].rpartition("texts/")[2] for line in lines] == [
        "a.txt", "b?.txt", "deep/c.txt",
    ]  # fmt: skip
    assert all(line["text_url"].startswith("inferq:") for line in lines)
    again = inferq_here(env, "batch", "submit", str(folder), "--type", "ner", "--id", "folder-1")
    assert again.returncode == 1
    assert "inferq batch status folder-1 --follow" in again.stderr
    client.cancel_batch("folder-1")


def locked(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A file of that name may not be read, even where root runs the tests."""
    upload = Client.upload

    def refusing(self: Client, source: Path) -> str:
        if source.name == name:
            raise PermissionError(errno.EACCES, "Permission denied", str(source))
        return upload(self, source)

    monkeypatch.setattr(Client, "upload", refusing)


def test_a_file_that_cannot_be_uploaded_is_skipped_and_named(
    env: dict[str, str], client: Client, feeder: Feeder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("a.txt", "locked.txt", "z.txt"):
        (folder / name).write_text("李明在北京。")
    (folder / "empty.txt").touch()
    (folder / "large.txt").write_bytes(b"a" * (MAX_UPLOAD_BYTES + 1))
    locked(monkeypatch, "locked.txt")
    run = inferq_here(env, "batch", "submit", str(folder), "--type", "ner", "--id", "skipped-1")
    assert run.returncode == 1
    assert run.stdout == "skipped-1\n"
    *named, summary = run.stderr.splitlines()
    assert named == [
        f"skipped {folder}/empty.txt: the file is empty",
        f"skipped {folder}/large.txt: the body is larger than the limit of {MAX_UPLOAD_BYTES} bytes",
        f"skipped {folder}/locked.txt: Permission denied",
    ]
    assert "skipped 3 files" in summary
    eventually(lambda: client.batch("skipped-1").counts.total == 2, what="a batch of the others")
    client.cancel_batch("skipped-1")


def test_files_of_which_none_can_be_uploaded_are_no_batch(
    env: dict[str, str], client: Client, tmp_path: Path
) -> None:
    (tmp_path / "empty.txt").touch()
    run = inferq_here(env, "batch", "submit", str(tmp_path), "--type", "ner", "--id", "skipped-2")
    assert run.returncode == 1
    assert f"skipped {tmp_path}/empty.txt: the file is empty" in run.stderr
    assert "error: every file was skipped" in run.stderr
    with pytest.raises(NotFound):
        client.batch("skipped-2")


def test_an_outage_ends_the_uploads_and_names_the_file(env: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    away = env | {"INFERQ_API_URL": "http://127.0.0.1:1"}
    run = inferq_here(away, "batch", "submit", str(tmp_path), "--type", "ner")
    assert run.returncode == 1
    assert f"error: {tmp_path}/a.txt: the gateway at http://127.0.0.1:1 cannot be reached" in run.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere.jsonl", "--type", "echo"], "no file"),
        (["/nowhere/*.png", "--type", "ocr"], "matches no file or folder"),
        (["EMPTY"], "empty"),
        (["FOLDER", "--type", "ocr"], "no files"),
        (["FOLDER", "--type", "facefusion"], "source_url and target_url"),
        (["FOLDER"], "needs a task type"),
        (["s3://bucket/a", "FOLDER"], "submit it alone"),
        (["s3://bucket/a", "--type", "nope"], "not known"),
        (["s3://bucket/a/"], "needs a task type"),
        (["s3:nonsense", "--type", "ocr"], "looks like s3://bucket/prefix"),
        (["FULL", "--type", "ocr", "--set", "annotated=perhaps"], "options.annotated"),
        (["s3://bucket/a", "--set", "x=1"], "--set needs --type"),
    ],
)
def test_what_cannot_be_a_source_is_refused_at_once(
    env: dict[str, str], tmp_path: Path, arguments: list[str], words: str
) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a.png").write_bytes(b"a")
    places = {
        "EMPTY": str(tmp_path / "empty.jsonl"),
        "FOLDER": str(tmp_path / "folder"),
        "FULL": str(tmp_path / "full"),
    }
    uploads = Path(env["INFERQ_STORE_URL"].removeprefix("file://"), "files")
    stored = sorted(uploads.rglob("*"))
    run = inferq_here(env, "batch", "submit", *(places.get(given, given) for given in arguments))
    assert run.returncode == 1
    assert words in run.stderr
    assert sorted(uploads.rglob("*")) == stored


def test_a_jsonl_body_is_a_batch(env: dict[str, str], client: Client, feeder: Feeder) -> None:
    with httpx.Client(
        base_url=env["INFERQ_API_URL"], headers={"Authorization": f"Bearer {env['INFERQ_API_KEY']}"}
    ) as http:
        spec = {"batch_id": "body-1", "task_type": "echo"}

        def post(body: bytes, **more: Any) -> httpx.Response:
            return http.post(
                "/v1/batches",
                params={"spec": json.dumps(spec | more)},
                content=body,
                headers={"Content-Type": "application/x-ndjson"},
            )

        answer = post(b'{"payload": 1}\n')
        assert answer.status_code == 202, answer.text
        assert answer.json()["links"]["output"] == "/v1/batches/body-1/output"
        assert post(b'{"payload": 1}\n').status_code == 202  # the same content is the same batch
        assert post(b'{"payload": 2}\n').json()["code"] == "id_conflict"
        early = http.get("/v1/batches/body-1/output")
        assert early.status_code == 200 or early.json()["code"] == "not_ended"
        assert post(b"", batch_id="body-2").json()["code"] == "empty_batch"
        assert post(b"{}", batch_id="body-2", max_in_flight=0).json()["errors"][0]["field"] == "max_in_flight"
        window = {"start": "25:00", "end": "06:00"}
        assert "HH:MM" in post(b"{}", batch_id="body-2", window=window).json()["detail"]
        assert post(b"{}", batch_id="body-2", tenant="other").status_code == 403
        assert post(b"{}", batch_id="body-2", source="s3://x/y").json()["code"] == "two_sources"
        gone = http.post("/v1/batches", json={"batch_id": "body-2", "source": "inferq:gone"})
        assert gone.json()["code"] == "unknown_file"
        assert http.get("/v1/batches/body-2").status_code == 404
        assert ended(client, "body-1").counts.succeeded == 1
        files = http.get("/v1/batches/body-1/output")
        assert files.json()["output"] == {"payload": 1}
        refused = http.post("/v1/tasks", json={"task_type": "echo", "batch_id": "body-1", "batch_line": 1})
        assert refused.status_code == 422


def test_a_queued_line_has_a_status_and_can_be_cancelled(
    env: dict[str, str], client: Client, feeder: Feeder
) -> None:
    slow = b'{"delay": 2}\n' + b'{"payload": 1}\n' * 3
    batch = client.submit_batch(slow, task_type="echo", batch_id="lines-1")
    eventually(lambda: client.batch(batch.batch_id).counts.queued, what="a fed batch")
    assert client.status("lines-1.3").state in ("queued", "running", "succeeded")
    client.cancel("lines-1.4")
    status = ended(client, "lines-1")
    assert (status.counts.succeeded, status.counts.cancelled) == (3, 1)
    assert client.status("lines-1.4").state == "cancelled"
    assert client.status("lines-1.3").state == "succeeded"


def test_a_queued_line_with_an_id_of_its_own_is_a_task_as_any_other(
    env: dict[str, str], client: Client, feeder: Feeder
) -> None:
    named = [f'{{"task_id": "own-{n}", "payload": {n}}}' for n in range(1, 4)]
    lines = "\n".join(['{"delay": 2}', *named, '{"payload": 9}'])
    client.submit_batch(lines.encode(), task_type="echo", batch_id="own-ids-1", priority="low")
    eventually(lambda: client.batch("own-ids-1").counts.queued, what="a fed batch")
    status = client.status("own-2")
    assert (status.state, status.batch_id, status.priority) == ("queued", "own-ids-1", "low")
    assert client.status("own-ids-1.5").state == "queued"
    shown = inferq_here(env, "list", "--batch", "own-ids-1", "--status", "queued", "--json")
    assert {"own-1", "own-2", "own-3", "own-ids-1.5"} <= {
        task["task_id"] for task in json.loads(shown.stdout)
    }
    with pytest.raises(Conflict, match="already exists"):
        client.submit("echo", task_id="own-3", payload="another")
    client.cancel("own-1")
    counts = ended(client, "own-ids-1").counts
    assert (counts.succeeded, counts.cancelled) == (4, 1)
    assert client.status("own-1").state == "cancelled"
    assert client.result("own-3").output == {"payload": 3}
    with redis.Redis.from_url(env["INFERQ_REDIS_URL"]) as connection:
        assert not connection.keys("inferq:t:default:own-*")


def test_the_ids_of_queued_lines_are_taken(env: dict[str, str], client: Client, feeder: Feeder) -> None:
    client.submit_batch(b'{"delay": 2}\n{"payload": 1}\n', task_type="echo", batch_id="taken-1")
    eventually(lambda: client.batch("taken-1").counts.queued, what="a fed batch")
    with pytest.raises(Conflict, match="already exists"):
        client.submit("echo", task_id="taken-1.2", payload="another")
    client.submit("echo", task_id="taken-1.3", payload="no line of it")
    assert ended(client, "taken-1").counts.succeeded == 2
    assert client.result("taken-1.2").output == {"payload": 1}


def test_a_cancelled_batch_leaves_none_of_its_tasks_queued(
    env: dict[str, str], client: Client, feeder: Feeder
) -> None:
    lines = "\n".join(f'{{"task_id": "gone-{n}", "delay": 20}}' for n in range(1, 9))
    client.submit_batch(lines.encode(), task_type="echo", batch_id="own-ids-2")
    eventually(lambda: client.batch("own-ids-2").counts.queued, what="a fed batch")
    client.cancel_batch("own-ids-2")
    assert ended(client, "own-ids-2").counts.cancelled == 8
    assert [client.status(f"gone-{n}").state for n in range(1, 9)] == ["cancelled"] * 8


def test_a_running_batch_is_cancelled(env: dict[str, str], client: Client, feeder: Feeder) -> None:
    batch = client.submit_batch(
        b'{"delay": 600}\n' * 30, task_type="echo", batch_id="cancel-1", max_in_flight=10
    )
    eventually(lambda: client.batch(batch.batch_id).counts.running, what="a running task")
    assert client.cancel_batch("cancel-1").cancel_requested
    status = ended(client, "cancel-1")
    assert (status.state, status.counts.cancelled, status.counts.total) == ("cancelled", 30, 30)


def test_a_batch_that_redis_forgets_is_told_without_wrong_numbers(
    env: dict[str, str], client: Client, feeder: Feeder
) -> None:
    now = datetime.now(UTC)
    window = {"start": f"{now + timedelta(hours=2):%H:%M}", "end": f"{now + timedelta(hours=3):%H:%M}"}
    client.submit_batch(b'{"payload": 1}\n' * 3, task_type="echo", batch_id="flushed-1", window=window)
    eventually(lambda: client.batch("flushed-1").state == "paused", what="a paused batch")
    assert client.batch("flushed-1").counts.queued == 0
    with redis.Redis.from_url(env["INFERQ_REDIS_URL"]) as connection:
        connection.flushdb()
    status = client.batch("flushed-1")
    assert (status.state, status.counts) == ("paused", CountsNow(total=3))
    assert status.counts.done is None
    shown = inferq_here(env, "batch", "status", "flushed-1")
    assert shown.returncode == 0, shown.stderr
    client.cancel_batch("flushed-1")
    assert client.batch("flushed-1").cancel_requested


def test_a_batch_whose_end_redis_has_missed_is_shown_as_ended(
    env: dict[str, str], client: Client, feeder: Feeder
) -> None:
    client.submit_batch(b'{"payload": 1}\n', task_type="echo", batch_id="missed-1")
    assert ended(client, "missed-1").state == "completed"
    with redis.Redis.from_url(env["INFERQ_REDIS_URL"]) as connection:
        connection.hset("inferq:batch:default:missed-1", "s", "running")
    status = client.batch("missed-1")
    assert (status.state, status.counts.succeeded) == ("completed", 1)


def test_a_feeder_killed_again_and_again_loses_nothing_and_doubles_nothing(
    env: dict[str, str], client: Client, feeder: Feeder
) -> None:
    count = 300
    source = b"".join(b'{"payload": %d}\n' % n for n in range(1, count + 1))
    client.submit_batch(source, task_type="echo", batch_id="killed-1", max_in_flight=100)
    for fed in (1, 100, 200):  # as it begins, and twice on its way

        def reached(fed: int = fed) -> bool:
            counts = client.batch("killed-1").counts
            return (counts.queued or 0) + (counts.done or 0) >= fed

        eventually(reached, f"{fed} lines fed")
        feeder.kill()
        feeder.start()
    status = ended(client, "killed-1", 120)
    assert (status.state, status.counts.succeeded, status.counts.total) == ("completed", count, count)
    results = ResultStore(open_store(StorageSettings(store_url=env["INFERQ_STORE_URL"])))
    output = httpx.get(
        f"{env['INFERQ_API_URL']}/v1/batches/killed-1/output",
        headers={"Authorization": f"Bearer {env['INFERQ_API_KEY']}"},
    )
    assert [e["output"]["payload"] for e in entries(output.text)] == list(range(1, count + 1))
    sample = results.load("default", "killed-1.300")
    assert sample is not None
    assert (sample.attempts, sample.batch_line) == (1, 300)
