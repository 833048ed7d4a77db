"""HEAD, ranges of bytes, and a gateway behind a path prefix."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from inferq.schemas import Batch, BatchCounts, BatchSummary
from inferq.storage import BatchStore
from inferq.storage.batches.store import errors_key, output_key
from tests.gateway.conftest import FakePublisher, Gateway, running
from tests.gateway.test_gateway_results import with_artifact
from tests.gateway.test_gateway_submit import ECHO, problem

DATA = bytes(range(100))
PREFIX = "/a%20b/inferq"


@pytest.fixture
def files(gateway: Gateway, tmp_path: Path) -> dict[str, bytes]:
    """The paths and contents of an artifact, a result, and a batch's files."""
    task = with_artifact(gateway, tmp_path, data=DATA)
    batch = Batch.model_validate(
        {
            "batch_id": "b",
            "tenant": gateway.tenant,
            "source": "inferq:x",
            "created_at": "2026-01-01T00:00:00Z",
        }
    )
    batches = BatchStore(gateway.store)
    batches.create(batch)
    gateway.store.put(output_key(gateway.tenant, "b"), DATA)
    gateway.store.put(errors_key(gateway.tenant, "b"), DATA)
    batches.finish(
        BatchSummary(
            batch_id="b",
            tenant=gateway.tenant,
            state="completed",
            counts=BatchCounts(total=1, succeeded=1),
            seconds=1,
            tasks_per_second=1,
            created_at=batch.created_at,
            finished_at=batch.created_at,
        )
    )
    result = f"/v1/tasks/{task.task_id}/result"
    return {
        f"/v1/tasks/{task.task_id}/artifacts/a.txt": DATA,
        "/v1/batches/b/output": DATA,
        "/v1/batches/b/errors": DATA,
        result: gateway.http.get(result).content,
    }


def test_every_file_can_be_asked_for_without_its_content(gateway: Gateway, files: dict[str, bytes]) -> None:
    for path, content in files.items():
        whole, head = gateway.http.get(path), gateway.http.head(path)
        assert (whole.status_code, whole.content) == (200, content), path
        assert (head.status_code, head.content) == (200, b""), path
        assert int(head.headers["content-length"]) == len(content)
        assert {k: v for k, v in head.headers.items() if k != "date"} == {
            k: v for k, v in whole.headers.items() if k != "date"
        }
    for path in ("/v1/tasks", "/v1/tasks/task-with-artifact", "/v1/batches/b", "/healthz", "/openapi.json"):
        assert gateway.http.head(path).status_code == 200, path
    assert gateway.http.head("/v1/tasks/none/artifacts/a.txt").status_code == 404
    gateway.store.delete(output_key(gateway.tenant, "b"))
    assert gateway.http.head("/v1/batches/b/output").status_code == 404


def test_every_file_can_be_resumed(gateway: Gateway, files: dict[str, bytes]) -> None:
    for path, content in files.items():
        size = len(content)
        etag = gateway.http.head(path).headers["etag"]

        def ask(wanted: str, path: str = path, **more: str) -> httpx.Response:
            return gateway.http.get(path, headers={"Range": wanted, **more})

        for wanted, part in [
            ("bytes=0-0", range(1)),
            ("bytes=10-", range(10, size)),
            ("bytes=10-19", range(10, 20)),
            ("bytes=90-999999", range(90, size)),
            ("bytes=-7", range(size - 7, size)),
            ("bytes=-999999", range(size)),
        ]:
            answer = ask(wanted)
            assert (answer.status_code, answer.content) == (206, content[part.start : part.stop]), (
                path,
                wanted,
            )
            assert answer.headers["content-range"] == f"bytes {part.start}-{part.stop - 1}/{size}"
            assert (answer.headers["etag"], answer.headers["accept-ranges"]) == (etag, "bytes")
        # Other units, malformed and several ranges are ignored, as RFC 9110 allows.
        for wanted in ("bytes=5-3", "bytes=-", "bytes=x-", "lines=1-2", "bytes=0-1,4-5"):
            assert (ask(wanted).status_code, ask(wanted).content) == (200, content), wanted
        for wanted in (f"bytes={size}-", "bytes=-0", "bytes=999999999-"):
            answer = ask(wanted)
            problem(answer, 416, "range_not_satisfiable")
            assert answer.headers["content-range"] == f"bytes */{size}"
        assert ask("bytes=10-", **{"If-Range": etag}).status_code == 206
        assert ask("bytes=10-", **{"If-Range": '"another"'}).content == content


@pytest.fixture(params=["", PREFIX], ids=["stripped", "kept"])
def behind(
    request: pytest.FixtureRequest, tmp_path: Path, redis_url: str, publisher: FakePublisher
) -> Iterator[tuple[Gateway, httpx.Client]]:
    """A gateway behind a proxy that serves it below a path and strips that path or keeps it, and a client."""
    address = {"api_url": f"https://proxy.example{PREFIX}/"}
    with running(tmp_path, redis_url=redis_url, publisher=publisher, storage=address) as gateway:

        def forward(sent: httpx.Request) -> None:
            path = sent.url.raw_path.decode()
            assert path.startswith(f"{PREFIX}/"), path
            sent.url = sent.url.copy_with(raw_path=(request.param + path.removeprefix(PREFIX)).encode())

        headers = {"Authorization": f"Bearer {gateway.key}"}
        with httpx.Client(
            base_url=gateway.url,
            headers=headers,
            timeout=20,
            event_hooks={"request": [forward]},
            verify=False,
        ) as client:
            yield gateway, client


def test_behind_a_path_prefix_every_link_leads_to_the_gateway(
    behind: tuple[Gateway, httpx.Client], tmp_path: Path
) -> None:
    gateway, client = behind
    task = with_artifact(gateway, tmp_path)
    batch = {"source": "s3://bucket/a.jsonl", "task_type": "echo", "batch_id": "b"}
    answers = [
        client.put(f"{PREFIX}/v1/tasks/1", json=ECHO),
        client.post(f"{PREFIX}/v1/tasks", json=ECHO),
        client.get(f"{PREFIX}/v1/tasks?limit=1"),
        client.get(f"{PREFIX}/v1/tasks/1"),
        client.post(f"{PREFIX}/v1/batches", json=batch),
        client.post(f"{PREFIX}/v1/batches", json={**batch, "batch_id": "b2"}),
        client.get(f"{PREFIX}/v1/batches?limit=1"),
        client.get(f"{PREFIX}/v1/tasks/{task.task_id}/result"),
    ]
    found = set()
    for answer in answers:
        assert answer.status_code in (200, 202), answer.text
        text = " ".join([answer.text, answer.headers.get("location", ""), answer.headers.get("link", "")])
        links = re.findall(r'[^"<> ]*/v1/[^"<> ]*', text)
        assert links, answer.url
        found |= set(links)
    # 4 for each of two tasks, 5 for each of two batches, 2 next pages, 1 artifact.
    assert len(found) == 4 * 2 + 5 * 2 + 2 + 1
    for link in found:
        parts = urlsplit(link)
        assert parts.path.startswith(f"{PREFIX}/v1/")
        if not parts.path.endswith(("/cancel", "/events")):
            answer = client.get(f"{parts.path}?{parts.query}")
            # A task or batch that has not ended has no result, output and errors.
            ended = not parts.path.endswith(("/result", "/output", "/errors"))
            assert answer.status_code == (200 if ended else 409), (link, answer.text)
    document: dict[str, Any] = client.get(f"{PREFIX}/openapi.json").json()
    assert document["servers"] == [{"url": f"https://proxy.example{PREFIX}"}]
