"""Submitting batches, their status, and how many object store reads a status costs."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest

from inferq.producer.gateway.services import BatchCache
from inferq.schemas import Batch, BatchCounts, BatchSummary, Outage
from inferq.storage import BatchIndex, BatchStore, ObjectStore
from tests.gateway.conftest import FakePublisher, Gateway, as_new_tenant, wait_until

PATH = "/v1/batches/b"


def made(gateway: Gateway, *, tenant: str | None = None, source: str = "inferq:x") -> Batch:
    batch = Batch(batch_id="b", tenant=tenant or gateway.tenant, source=source, created_at=datetime.now(UTC))
    return BatchStore(gateway.store).create(batch)


def fed(gateway: Gateway, *, lease_seconds: int = 20) -> BatchIndex:
    """Act as the feeder of batch b: lease it and feed lines 1 and 2 of 5."""
    index, name = BatchIndex(gateway.status, lease_seconds=lease_seconds), (gateway.tenant, "b")
    assert index.take(*name, chain="c", part=0, token="t") == "taken"
    index.open(*name, token="t", line=0, offset=0, total=5, cancelled=False)
    index.set_state(*name, "feeding")
    index.step(*name, token="t", high_water=5, line=2, offset=9, fed=[1, 2])
    return index


def ended(gateway: Gateway) -> None:
    """End batch b in the object store only."""
    now = datetime.now(UTC)
    BatchStore(gateway.store).finish(
        BatchSummary(
            batch_id="b", tenant=gateway.tenant, state="completed", counts=BatchCounts(total=5, succeeded=5),
            seconds=1.0, tasks_per_second=5.0, created_at=now, finished_at=now,
        )
    )  # fmt: skip


def state(gateway: Gateway) -> str:
    answer = gateway.http.get(PATH)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["state"])


@pytest.fixture
def asked(lone_gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The gateway's object store calls and their keys, as they are made."""
    store: ObjectStore = lone_gateway.server.config.app.state.services.store  # type: ignore[union-attr]
    calls: list[str] = []

    def noted(name: str) -> Any:
        real = getattr(store, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(" ".join([name, *map(str, args[:1])]))
            return real(*args, **kwargs)

        return call

    for name in sorted(ObjectStore.__abstractmethods__):
        monkeypatch.setattr(store, name, noted(name))
    return calls


def test_the_status_of_a_batch_being_fed_costs_no_object_store_read(
    lone_gateway: Gateway, asked: list[str]
) -> None:
    made(lone_gateway)
    index = fed(lone_gateway)
    first = lone_gateway.http.get(PATH).json()
    folder = f"batches/{lone_gateway.tenant}/b"
    assert sorted(asked) == [f"get {folder}/batch.json", f"get {folder}/summary.json"]
    asked.clear()
    index.step(lone_gateway.tenant, "b", token="t", line=3, offset=12, fed=[3])
    index.request_cancel(lone_gateway.tenant, "b")
    second = lone_gateway.http.get(PATH).json()
    assert asked == []
    assert (first["state"], first["counts"]["queued"], first["cancel_requested"]) == ("feeding", 2, False)
    assert (second["state"], second["counts"]["queued"], second["cancel_requested"]) == ("feeding", 3, True)
    assert second["source"] == "inferq:x"


def test_a_page_of_batches_costs_the_same_however_many_there_are(
    lone_gateway: Gateway, asked: list[str], keys_listed: Callable[[ObjectStore], list[str]]
) -> None:
    store: ObjectStore = lone_gateway.server.config.app.state.services.store  # type: ignore[union-attr]
    listed = keys_listed(store)
    costs = []
    for numbers in (range(4), range(4, 12)):
        for number in numbers:
            batch = Batch(
                batch_id=f"b{number}",
                tenant=lone_gateway.tenant,
                source="inferq:x",
                created_at=datetime.now(UTC),
            )
            BatchStore(lone_gateway.store).create(batch)
            for other in range(5):
                key = f"batches/{lone_gateway.tenant}/b{number}/callbacks/{other}.json"
                lone_gateway.store.put(key, b"")
        asked.clear()
        listed.clear()
        page = lone_gateway.http.get("/v1/batches?limit=3").json()
        assert [item["batch_id"] for item in page["items"]] == [f"b{numbers[-1] - n}" for n in range(3)]
        costs.append((len(asked), len(listed)))
    assert costs[0] == costs[1]
    assert costs[0][1] == 4  # the batches of the page, and whether there is another page


def test_cancelling_a_batch_without_a_feeder_publishes_its_feed_message(
    lone_gateway: Gateway, publisher: FakePublisher
) -> None:
    made(lone_gateway)
    publisher.error = Outage("away")
    assert lone_gateway.http.post(f"{PATH}/cancel").status_code == 503
    publisher.error = None
    answer = lone_gateway.http.post(f"{PATH}/cancel")
    assert (answer.status_code, answer.json()["cancel_requested"]) == (202, True)
    (message,) = publisher.messages
    assert (message.routing_key, json.loads(message.body)[1]["batch_id"]) == ("inference.batches", "b")


def test_the_batch_cache_never_serves_another_tenant(lone_gateway: Gateway) -> None:
    made(lone_gateway)
    fed(lone_gateway)
    assert state(lone_gateway) == "feeding"
    other = as_new_tenant(lone_gateway)
    with other.http:
        assert other.http.get(PATH).status_code == 404
        fed(other)  # Redis alone makes no batch
        assert other.http.get(PATH).status_code == 404
        made(other, source="inferq:y")
        for gateway, source in [(lone_gateway, "inferq:x"), (other, "inferq:y")] * 2:
            assert gateway.http.get(PATH).json()["source"] == source


def test_an_end_that_redis_missed_shows_once_the_lease_is_released(lone_gateway: Gateway) -> None:
    made(lone_gateway)
    index = fed(lone_gateway)
    assert state(lone_gateway) == "feeding"
    index.set_state(lone_gateway.tenant, "b", "running")
    index.release(lone_gateway.tenant, "b", "t")
    assert state(lone_gateway) == "running"
    ended(lone_gateway)
    answer = lone_gateway.http.get(PATH).json()
    assert (answer["state"], answer["counts"]["succeeded"]) == ("completed", 5)


def test_an_expired_lease_hides_no_end(lone_gateway: Gateway) -> None:
    made(lone_gateway)
    assert state(lone_gateway) == "preparing"
    index = fed(lone_gateway, lease_seconds=2)
    ended(lone_gateway)
    assert state(lone_gateway) == "feeding"
    wait_until(lambda: state(lone_gateway) == "completed")
    standing = index.look(lone_gateway.tenant, "b")
    assert standing is not None
    assert (standing.state, standing.leased) == ("feeding", False)


def test_a_late_feeder_does_not_hide_the_end(lone_gateway: Gateway) -> None:
    made(lone_gateway)
    index = fed(lone_gateway)
    assert state(lone_gateway) == "feeding"
    ended(lone_gateway)
    index.set_state(lone_gateway.tenant, "b", "completed")
    assert state(lone_gateway) == "completed"


def test_a_deleted_batch_is_not_found_in_the_cache(lone_gateway: Gateway) -> None:
    made(lone_gateway)
    index = fed(lone_gateway)
    assert state(lone_gateway) == "feeding"
    lone_gateway.store.delete(f"batches/{lone_gateway.tenant}/b/batch.json")
    index.release(lone_gateway.tenant, "b", "t")
    assert lone_gateway.http.get(PATH).status_code == 404
    made(lone_gateway, source="inferq:y")
    assert lone_gateway.http.get(PATH).json()["source"] == "inferq:y"


def test_a_batch_submitted_again_after_its_deletion_replaces_the_cached_one(lone_gateway: Gateway) -> None:
    made(lone_gateway)
    fed(lone_gateway)
    assert lone_gateway.http.get(PATH).json()["source"] == "inferq:x"
    lone_gateway.store.delete(f"batches/{lone_gateway.tenant}/b/batch.json")
    posted = lone_gateway.http.post(
        "/v1/batches",
        params={"spec": '{"batch_id": "b", "task_type": "echo"}'},
        content=b'{"payload": 1}\n',
        headers={"Content-Type": "application/x-ndjson"},
    )
    assert posted.status_code == 202, posted.text
    assert posted.json()["source"] != "inferq:x"
    assert lone_gateway.http.get(PATH).json()["source"] == posted.json()["source"]


@pytest.mark.parametrize(
    ("said", "field", "words"),
    [
        ({"source": "s3://scans/in/"}, "task_type", "needs a task type"),
        ({"source": "s3://scans/in/", "task_type": "facefusion"}, "task_type", "source_url and target_url"),
        ({"source": "s3:nonsense"}, "source", "looks like s3://bucket/prefix"),
        ({"source": "s3://ab"}, "source", "looks like s3://bucket/prefix"),
        ({"source": "s3://scans/../in/"}, "source", "a '.' or '..' segment"),
        *(
            ({"source": source, "task_type": "ocr", "defaults": defaults}, "defaults", words)
            for source in ("s3://scans/in/", "s3://scans/in.jsonl", "inferq:x")
            for defaults, words in [
                ({"imege_url": "inferq:y"}, "imege_url: is unknown"),
                ({"options": {"layuot": True}}, "options.layuot: is unknown"),
                ({"options": True}, "options: input should be an object"),
                ({"priority": "urgent"}, "priority: input should be 'high', 'normal' or 'low'"),
            ]
        ),
        ({"source": "inferq:x", "defaults": {"priority": "urgent"}}, "defaults", "priority: "),
        (
            {"source": "s3://scans/in.jsonl", "batch_id": "every-20261126T164300Z"},
            "batch_id",
            "nightly run's id",
        ),
        ({"source": "s3://scans/in.jsonl", "schedule": "letters"}, "schedule", "set by nightly runs only"),
        ({"source": "s3://scans/in.jsonl", "schedule": "s" * 30_000}, "schedule", "set by nightly runs only"),
        ({"source": "inferq:x", "defaults": {"task_type": None}}, "defaults", "task_type: "),
    ],
)
def test_a_batch_that_can_never_work_is_refused_by_the_field(
    lone_gateway: Gateway, said: dict[str, Any], field: str, words: str
) -> None:
    answer = lone_gateway.http.post("/v1/batches", json={"batch_id": "b", **said})
    problem = answer.json()
    assert (answer.status_code, problem.get("code")) == (422, "invalid_batch")
    (fault,) = problem["errors"]
    assert fault["field"] == field
    assert words in fault["detail"]
    assert lone_gateway.http.get(PATH).status_code == 404


@pytest.mark.parametrize("source", ["s3://scans/in/", "s3://scans/in.jsonl"])
def test_a_batch_whose_defaults_name_an_unknown_type_is_refused(lone_gateway: Gateway, source: str) -> None:
    said = {"source": source, "defaults": {"task_type": "orc"}}
    answer = lone_gateway.http.post("/v1/batches", json=said)
    assert (answer.status_code, answer.json().get("code")) == (422, "unknown_task_type")


@pytest.mark.parametrize("field", ["metadata", "defaults"])
@pytest.mark.parametrize("where", ["body", "spec"])
def test_a_number_that_no_json_can_hold_is_refused(lone_gateway: Gateway, field: str, where: str) -> None:
    said = f'"batch_id": "b", "task_type": "echo", "{field}": {{"payload": [1e999]}}'
    if where == "body":
        answer = post(lone_gateway, f'{{"source": "s3://scans/in.jsonl", {said}}}', "application/json")
        words = "the body is not JSON: Out of range float values"
    else:
        answer = post(lone_gateway, '{"payload": 1}', "application/x-ndjson", spec=f"{{{said}}}")
        words = "spec is not JSON: Out of range float values"
    assert (answer.status_code, answer.json().get("code")) == (400, "not_json")
    assert answer.json()["detail"].startswith(words)
    assert lone_gateway.http.get(PATH).status_code == 404


@pytest.mark.parametrize(("spec", "words"), [("{", "is not JSON: "), ("[]", "is not a JSON object")])
def test_a_spec_that_cannot_be_read_is_named(lone_gateway: Gateway, spec: str, words: str) -> None:
    answer = post(lone_gateway, '{"payload": 1}', "application/x-ndjson", spec=spec)
    assert answer.status_code == 400
    assert answer.json()["detail"].startswith(f"spec {words}")


@pytest.mark.parametrize(
    ("body", "status"), [('{"payload": 1}\n{"payload": 2}\n', 400), ('{"payload": 1}\n', 422)]
)
def test_a_jsonl_with_another_content_type_is_refused_with_the_right_one(
    lone_gateway: Gateway, body: str, status: int
) -> None:
    answer = post(lone_gateway, body, "application/x-www-form-urlencoded")
    assert answer.status_code == status
    assert "Content-Type: application/x-ndjson" in answer.json()["detail"]


def post(gateway: Gateway, body: str, content_type: str, **query: str) -> httpx.Response:
    headers = {"Content-Type": content_type}
    return gateway.http.post("/v1/batches", params=query, content=body, headers=headers)


@pytest.mark.parametrize(
    "said",
    [
        {"source": "s3://scans/in.jsonl"},
        {"source": "s3://scans/in.jsonl", "defaults": {"text": "a", "options": {"annotated": True}}},
        {"source": "s3://scans/in.jsonl", "task_type": "facefusion", "defaults": {"target_url": "inferq:x"}},
        {"source": "s3://scans/in/", "task_type": "facefusion", "defaults": {"target_url": "inferq:x"}},
        {"source": "s3://scans", "task_type": "ocr"},
        {"source": "s3://scans/in.jsonl", "task_type": "ner", "defaults": {"options": {}}},
    ],
)
def test_fields_that_lines_may_add_are_not_required(lone_gateway: Gateway, said: dict[str, Any]) -> None:
    answer = lone_gateway.http.post("/v1/batches", json=said)
    assert answer.status_code == 202, answer.text


def test_the_cache_keeps_the_most_recently_used_batches() -> None:
    def batch(batch_id: str, tenant: str = "a") -> Batch:
        return Batch(batch_id=batch_id, tenant=tenant, source="inferq:x", created_at=datetime.now(UTC))

    known = BatchCache(2)
    known.keep(batch("1"))
    known.keep(batch("2"))
    assert known.get("other", "1") is None
    assert known.get("a", "1") is not None
    known.keep(batch("3"))
    assert [known.get("a", name) is not None for name in "123"] == [True, False, True]
    known.keep(batch("1", tenant="b"))
    found = known.get("b", "1")
    assert found is not None
    assert found.tenant == "b"
