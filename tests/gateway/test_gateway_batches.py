"""Where batches stand, and what a look costs."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest

from producer.gateway.services import KnownBatches
from schemas import Batch, BatchCounts, BatchSummary, Outage
from storage import BatchIndex, BatchStore, ObjectStore
from tests.gateway.conftest import FakePublisher, Gateway, as_new_tenant, wait_until

PATH = "/v1/batches/b"


def made(gateway: Gateway, *, tenant: str | None = None, source: str = "inferq:x") -> Batch:
    batch = Batch(batch_id="b", tenant=tenant or gateway.tenant, source=source, created_at=datetime.now(UTC))
    return BatchStore(gateway.store).create(batch)


def fed(gateway: Gateway, *, lease_seconds: int = 20) -> BatchIndex:
    """What the feeder of that batch does: it has the lease, and lines 1 and 2 of 5 are fed."""
    index, name = BatchIndex(gateway.status, lease_seconds=lease_seconds), (gateway.tenant, "b")
    assert index.take(*name, chain="c", part=0, token="t") == "taken"
    index.open(*name, token="t", line=0, offset=0, total=5, cancelled=False)
    index.set_state(*name, "feeding")
    index.step(*name, token="t", reaches=5, line=2, offset=9, fed=[1, 2])
    return index


def ended(gateway: Gateway) -> None:
    """The end of that batch, of which Redis does not learn."""
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
    """What the gateway asks its object store for, and about whom: the calls go on to the store."""
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


def test_a_batch_that_is_fed_costs_no_look_into_the_object_store(
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


def test_a_batch_that_nobody_feeds_is_handed_over_to_be_cancelled(
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


def test_a_tenant_never_gets_what_is_kept_of_anothers_batch(lone_gateway: Gateway) -> None:
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


def test_an_end_that_redis_missed_is_told_once_no_feeder_has_the_batch(lone_gateway: Gateway) -> None:
    made(lone_gateway)
    index = fed(lone_gateway)
    assert state(lone_gateway) == "feeding"
    index.set_state(lone_gateway.tenant, "b", "running")
    index.release(lone_gateway.tenant, "b", "t")
    assert state(lone_gateway) == "running"
    ended(lone_gateway)
    answer = lone_gateway.http.get(PATH).json()
    assert (answer["state"], answer["counts"]["succeeded"]) == ("completed", 5)


def test_a_lease_hides_no_end_once_it_has_run_out(lone_gateway: Gateway) -> None:
    made(lone_gateway)
    assert state(lone_gateway) == "preparing"
    index = fed(lone_gateway, lease_seconds=2)
    ended(lone_gateway)
    assert state(lone_gateway) == "feeding"
    wait_until(lambda: state(lone_gateway) == "completed")
    standing = index.look(lone_gateway.tenant, "b")
    assert standing is not None
    assert (standing.state, standing.leased) == ("feeding", False)


def test_a_feeder_that_comes_after_the_end_does_not_hide_it(lone_gateway: Gateway) -> None:
    made(lone_gateway)
    index = fed(lone_gateway)
    assert state(lone_gateway) == "feeding"
    ended(lone_gateway)
    index.set_state(lone_gateway.tenant, "b", "completed")
    assert state(lone_gateway) == "completed"


def test_a_batch_that_was_deleted_is_not_there_whatever_was_kept(lone_gateway: Gateway) -> None:
    made(lone_gateway)
    index = fed(lone_gateway)
    assert state(lone_gateway) == "feeding"
    lone_gateway.store.delete(f"batches/{lone_gateway.tenant}/b/batch.json")
    index.release(lone_gateway.tenant, "b", "t")
    assert lone_gateway.http.get(PATH).status_code == 404
    made(lone_gateway, source="inferq:y")
    assert lone_gateway.http.get(PATH).json()["source"] == "inferq:y"


def test_a_batch_that_is_submitted_anew_is_told_as_it_is_now(lone_gateway: Gateway) -> None:
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


def test_the_batches_asked_for_last_are_kept_and_no_more() -> None:
    def batch(batch_id: str, tenant: str = "a") -> Batch:
        return Batch(batch_id=batch_id, tenant=tenant, source="inferq:x", created_at=datetime.now(UTC))

    known = KnownBatches(2)
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
