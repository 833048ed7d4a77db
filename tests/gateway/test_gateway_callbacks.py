"""The status of callbacks over HTTP, and sending them again."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from inferq.schemas import (
    BatchCounts,
    BatchSummary,
    Callback,
    CallbackAttempt,
    CallbackRecord,
    Outage,
    Result,
    batch_callback,
    end_callback,
)
from inferq.storage import BatchStore, CallbackRecords
from tests.gateway.conftest import FakePublisher, Gateway

URL = "https://example.com/hook"


def record(callback: Callback, state: Any, **more: Any) -> CallbackRecord:
    about = callback.model_dump()
    attempt = CallbackAttempt(at=datetime.now(UTC), seconds=0.5, status=500, response="oh no")
    return CallbackRecord(**about, state=state, attempts=(attempt,), updated_at=datetime.now(UTC), **more)


def ended(gateway: Gateway, task_id: str) -> tuple[Result, Callback, CallbackRecords]:
    result = gateway.end(gateway.began(task_id, callback_url=URL))
    return result, end_callback(result, URL), CallbackRecords(gateway.store, gateway.status)


def sent(publisher: FakePublisher) -> list[dict[str, Any]]:
    return [json.loads(message.body)[1] for message in publisher.messages]


def test_attempts_are_shown_and_never_the_body(lone_gateway: Gateway) -> None:
    _, callback, records = ended(lone_gateway, "t1")
    records.note(record(callback, "waiting"))
    (shown,) = lone_gateway.http.get("/v1/tasks/t1/callbacks").json()["items"]
    assert shown["callback_id"] == callback.callback_id
    assert shown["attempts"][0]["response"] == "oh no"
    assert shown["body"] is None
    with lone_gateway.someone() as other:
        assert other.get("/v1/tasks/t1/callbacks").status_code == 404
    assert lone_gateway.http.get("/v1/tasks/unknown/callbacks").status_code == 404


def test_what_failed_is_sent_again_as_it_was_even_after_redis_was_lost(
    lone_gateway: Gateway, publisher: FakePublisher
) -> None:
    _, callback, records = ended(lone_gateway, "t2")
    failed = record(callback, "failed", reason="8 attempts failed")
    records.keep(failed)
    assert lone_gateway.results.load(lone_gateway.tenant, "t2") is not None
    answer = lone_gateway.http.post("/v1/tasks/t2/callbacks/resend")
    assert answer.status_code == 202
    assert [item["state"] for item in answer.json()["items"]] == ["waiting"]
    (again,) = sent(publisher)
    assert datetime.fromisoformat(again.pop("resent_at")).tzinfo is not None
    assert again == {"callback": callback.model_dump(), "attempts": []}
    with lone_gateway.someone() as other:
        assert other.post("/v1/tasks/t2/callbacks/resend").status_code == 404


def test_what_failed_by_a_clock_that_was_ahead_is_waiting_once_it_is_sent_again(
    lone_gateway: Gateway, publisher: FakePublisher
) -> None:
    _, callback, records = ended(lone_gateway, "ahead")
    ahead = datetime.now(UTC) + timedelta(days=30)
    failed = record(callback, "failed", reason="gone").model_copy(update={"updated_at": ahead})
    records.keep(failed)
    records.note(failed)
    resend = "/v1/tasks/ahead/callbacks/resend"
    assert [item["state"] for item in lone_gateway.http.post(resend).json()["items"]] == ["waiting"]
    assert lone_gateway.http.post(resend).json()["items"] == []
    assert len(sent(publisher)) == 1


def test_a_delivered_end_is_rebuilt_from_the_result(lone_gateway: Gateway, publisher: FakePublisher) -> None:
    _, callback, records = ended(lone_gateway, "t3")
    records.note(record(callback, "delivered"))
    assert lone_gateway.http.post("/v1/tasks/t3/callbacks/resend").json()["items"] == []
    path = f"/v1/tasks/t3/callbacks/{callback.callback_id}/resend"
    assert lone_gateway.http.post(path).status_code == 202
    assert sent(publisher)[0]["callback"] == callback.model_dump()
    assert lone_gateway.http.post("/v1/tasks/t3/callbacks/msg_1/resend").status_code == 404


def test_a_callback_that_is_no_longer_kept_is_refused_with_the_reason(
    lone_gateway: Gateway, publisher: FakePublisher
) -> None:
    _, callback, records = ended(lone_gateway, "t4")
    started = callback.model_copy(update={"event": "task.started", "callback_id": "msg_" + "0" * 32})
    records.note(record(started, "delivered"))
    answer = lone_gateway.http.post(f"/v1/tasks/t4/callbacks/{started.callback_id}/resend")
    assert (answer.status_code, answer.json()["code"]) == (409, "callback_not_kept")
    assert publisher.messages == []


def test_failures_are_listed_newest_first_until_they_are_delivered(lone_gateway: Gateway) -> None:
    _, one, records = ended(lone_gateway, "t5")
    _, other, _ = ended(lone_gateway, "t6")
    for callback in (one, other):
        records.note(record(callback, "failed", reason="gone"))
    listed = lone_gateway.http.get("/v1/callbacks?status=failed").json()["items"]
    assert [item["subject_id"] for item in listed] == ["t6", "t5"]
    records.note(record(one, "delivered"))
    records.note(record(one, "failed"))  # a late copy
    listed = lone_gateway.http.get("/v1/callbacks").json()["items"]
    assert [item["subject_id"] for item in listed] == ["t6"]
    assert lone_gateway.http.get("/v1/callbacks?status=delivered").status_code == 422


@pytest.mark.parametrize(
    "url",
    [
        "example.com", "ftp://example.com/", "http://", "http://a b/", "", 7, "http://x:99999/", "http://x:abc/",
        "http://x:0/", "http://[::1/", "http://[::1%25eth0]/", "http://:80/", "http://?q", "http://user@/",
        "http://a..b/", "http://a\\b/", "https://exa$mple.com/", f"http://{'a' * 254}/",
    ],
)  # fmt: skip
def test_a_malformed_callback_url_is_refused_at_once(
    lone_gateway: Gateway, publisher: FakePublisher, url: Any
) -> None:
    answer = lone_gateway.http.post("/v1/tasks", json={"task_type": "echo", "callback_url": url})
    assert answer.status_code == 422
    assert "callback_url" in answer.json()["detail"]
    assert publisher.messages == []


def test_much_progress_does_not_hide_the_end(lone_gateway: Gateway) -> None:
    _, callback, records = ended(lone_gateway, "t7")
    for number in range(301):
        about = {"event": "task.progress", "callback_id": f"msg_{number:032x}"}
        records.note(record(callback.model_copy(update=about), "delivered"))
    records.note(record(callback, "failed"))
    shown = lone_gateway.http.get("/v1/tasks/t7/callbacks").json()["items"]
    assert len(shown) == 301
    assert shown[-1]["callback_id"] == callback.callback_id


def test_what_is_being_sent_again_is_not_sent_twice(lone_gateway: Gateway, publisher: FakePublisher) -> None:
    _, callback, records = ended(lone_gateway, "t8")
    failed = record(callback, "failed")
    records.keep(failed)
    records.note(failed)
    again = "/v1/tasks/t8/callbacks/resend"
    assert [item["state"] for item in lone_gateway.http.post(again).json()["items"]] == ["waiting"]
    assert lone_gateway.http.post(again).json()["items"] == []
    assert lone_gateway.http.get("/v1/callbacks").json()["items"] == []
    assert len(publisher.messages) == 1


def test_a_callback_that_failed_while_redis_was_unavailable_is_shown_and_sent_again(
    lone_gateway: Gateway, publisher: FakePublisher
) -> None:
    _, callback, records = ended(lone_gateway, "t9")
    records.note(record(callback, "waiting"))
    records.keep(record(callback, "failed"))
    (shown,) = lone_gateway.http.get("/v1/tasks/t9/callbacks").json()["items"]
    assert shown["state"] == "failed"
    (again,) = lone_gateway.http.post("/v1/tasks/t9/callbacks/resend").json()["items"]
    assert again["state"] == "waiting"
    (shown,) = lone_gateway.http.get("/v1/tasks/t9/callbacks").json()["items"]
    assert shown["state"] == "waiting"


def test_a_delivered_callback_that_is_sent_again_shows_its_new_state(
    lone_gateway: Gateway, publisher: FakePublisher
) -> None:
    _, callback, records = ended(lone_gateway, "t10")
    records.note(record(callback, "delivered"))
    path = f"/v1/tasks/t10/callbacks/{callback.callback_id}/resend"

    def shown() -> str:
        (item,) = lone_gateway.http.get("/v1/tasks/t10/callbacks").json()["items"]
        return str(item["state"])

    publisher.error = Outage("away")
    assert lone_gateway.http.post(path).status_code == 503
    assert shown() == "delivered"
    publisher.error = None
    assert lone_gateway.http.post(path).status_code == 202
    assert shown() == "waiting"
    asked = datetime.fromisoformat(sent(publisher)[0]["resent_at"])
    records.note(record(callback, "waiting", resent_at=asked))
    records.note(record(callback, "failed"))  # of before
    assert shown() == "waiting"
    records.note(record(callback, "failed", resent_at=asked))
    assert shown() == "failed"
    assert lone_gateway.http.get("/v1/callbacks").json()["items"][0]["subject_id"] == "t10"
    records.note(record(callback, "delivered", resent_at=asked))
    records.note(record(callback, "failed", resent_at=asked))  # a late copy
    assert shown() == "delivered"


def test_sending_one_callback_again_reads_no_other(
    lone_gateway: Gateway, publisher: FakePublisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, callback, records = ended(lone_gateway, "t11")
    records.keep(record(callback, "failed"))
    for number in range(5):
        records.keep(record(callback.model_copy(update={"callback_id": f"msg_{number:032x}"}), "failed"))
    store = lone_gateway.server.config.app.state.services.store  # type: ignore[union-attr]
    read: list[str] = []
    get = store.get
    monkeypatch.setattr(store, "get", lambda key: (read.append(key), get(key))[1])
    answer = lone_gateway.http.post(f"/v1/tasks/t11/callbacks/{callback.callback_id}/resend")
    assert [item["callback_id"] for item in answer.json()["items"]] == [callback.callback_id]
    assert [key.rpartition("/")[2] for key in read] == [f"{callback.callback_id}.json"]
    assert len(publisher.messages) == 1
    for unknown in (f"msg_{9:032x}", "msg_", "%2E%2E", "a%00b"):
        assert lone_gateway.http.post(f"/v1/tasks/t11/callbacks/{unknown}/resend").status_code == 404


def ended_batch(gateway: Gateway, batch_id: str) -> tuple[Callback, CallbackRecords]:
    now = datetime.now(UTC)
    summary = BatchSummary(
        batch_id=batch_id,
        tenant=gateway.tenant,
        state="completed",
        counts=BatchCounts(),
        seconds=1.0,
        tasks_per_second=1.0,
        created_at=now,
        finished_at=now,
    )
    kept = BatchStore(gateway.store).finish(summary)
    return batch_callback(kept, URL), CallbackRecords(gateway.store, gateway.status)


def test_a_batchs_callbacks_are_shown_and_sent_again(lone_gateway: Gateway, publisher: FakePublisher) -> None:
    end, records = ended_batch(lone_gateway, "b1")
    night = end.model_copy(update={"event": "nightly.summary", "callback_id": "msg_" + "1" * 32})
    records.note(record(end, "delivered"))
    failed = record(night, "failed")
    records.note(failed)
    records.keep(failed)
    path = "/v1/batches/b1/callbacks"
    shown = lone_gateway.http.get(path).json()["items"]
    assert {item["event"] for item in shown} == {"batch.completed", "nightly.summary"}
    assert lone_gateway.http.get("/v1/tasks/b1/callbacks").status_code == 404
    assert lone_gateway.http.get("/v1/batches/unknown/callbacks").status_code == 404
    assert lone_gateway.http.get("/v1/batches/a%20b/callbacks").status_code == 404
    (again,) = lone_gateway.http.post(f"{path}/resend").json()["items"]
    assert again["callback_id"] == night.callback_id
    assert lone_gateway.http.post(f"{path}/{end.callback_id}/resend").status_code == 202
    assert lone_gateway.http.post(f"{path}/msg_1/resend").status_code == 404
    assert [job["callback"] for job in sent(publisher)] == [night.model_dump(), end.model_dump()]
    records.drop(failed)
    assert lone_gateway.http.post(f"{path}/{night.callback_id}/resend").status_code == 409
