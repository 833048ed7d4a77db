"""What a worker hands over to be called back: after the record, before the ack, always under one id."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from inferq.broker import connect, topology_for
from inferq.producer.up.rabbitmq import USER
from inferq.schemas import Callback, end_callback, parse_task
from tests.conftest import RabbitMQ
from tests.waiting import eventually
from tests.worker.conftest import Site, starts

URL = "https://example.com/hook"


def handed_over(site: Site) -> list[Callback]:
    """Takes the callbacks off their queue, the oldest first."""
    connection = connect(site.broker, name="test")
    channel = connection.channel()
    found = []
    while True:
        method, _, body = channel.basic_get("inference.callbacks", auto_ack=True)
        if method is None or body is None:
            connection.close()
            return found
        found.append(Callback.model_validate(json.loads(body)[1]["callback"]))


def data_of(callback: Callback) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(callback.body)["data"]
    return data


def test_each_way_to_end_is_called_back_once_and_after_its_record(site: Site, tmp_path: Path) -> None:
    site.worker(INFERQ_MAX_ATTEMPTS="1")
    ways = {
        "succeeds": ({}, "task.succeeded", None),
        "fails": ({"fault": "invalid"}, "task.failed", "never"),
        "expires": ({"expires_at": "2020-01-01T00:00:00Z"}, "task.failed", "expired"),
        "poisons": ({"fault": "crash"}, "task.failed", "poison"),
        "unreadable": ({"surprise": 1}, "task.failed", "invalid_task"),
    }
    for task_id, (fields, _, _) in ways.items():
        headers = {"x-engine-deaths": 2} if task_id == "poisons" else None
        site.publish({"task_id": task_id, "callback_url": URL, **fields}, headers=headers)
    site.publish({"task_id": "silent"})
    site.publish({"task_id": "elsewhere", "surprise": 1, "callback_url": "not a URL"})
    site.ended("elsewhere")
    eventually(lambda: site.depth("inference.faulty.normal") == 0 and site.ended("silent"))
    got = {callback.subject_id: callback for callback in handed_over(site)}
    assert got.keys() == ways.keys()
    for task_id, (_, event, code) in ways.items():
        assert got[task_id].event == event
        assert got[task_id].url == URL
        error = data_of(got[task_id])["error"]
        assert (error and error["code"]) == code, task_id


def test_a_task_whose_id_another_has_is_called_back_too(site: Site) -> None:
    site.worker()
    for metadata in ({"a": 1}, {"a": 2}, {"a": 2}):
        site.publish({"task_id": "a", "metadata": metadata, "callback_url": URL})
    eventually(lambda: site.depth("inference.callbacks") == 3)
    first, second, again = handed_over(site)
    assert [first.event, second.event] == ["task.succeeded", "task.failed"]
    assert data_of(second)["error"]["code"] == "id_conflict"
    assert data_of(second)["metadata"] == {"a": 2}
    assert first.callback_id != second.callback_id == again.callback_id


def test_a_task_that_was_cancelled_before_it_began_is_called_back(site: Site) -> None:
    message = {"task_id": "c", "task_type": "echo", "callback_url": URL}
    site.status.submit(parse_task(message))
    site.status.request_cancel("default", "c")
    site.worker("echo")
    site.publish(message)
    eventually(lambda: site.depth("inference.callbacks") == 1)
    (got,) = handed_over(site)
    assert (got.event, data_of(got)["state"]) == ("task.cancelled", "cancelled")


def test_a_copy_of_a_task_that_has_ended_is_called_back_under_the_same_id(site: Site) -> None:
    site.worker()
    for message in ({"task_id": "a"}, {"task_id": "b", "surprise": 1}):
        for _ in range(2):
            site.publish({**message, "callback_url": URL})
    site.ended(site.publish({}))
    eventually(lambda: site.depth("inference.callbacks") == 4)
    got = handed_over(site)
    assert len({callback.callback_id for callback in got}) == 2
    assert len({callback.body for callback in got}) == 2


@pytest.fixture
def bind_again(site: Site, shared_rabbitmq: RabbitMQ) -> Iterator[Callable[[], None]]:
    """No callback finds its queue, and the worker may not mend that by declaring it, until this is called."""
    vhost = site.broker.amqp_url.rpartition("/")[2]
    connection = connect(site.broker, name="test")
    channel = connection.channel()
    topology_for(["faulty", "echo"]).apply(channel)
    rights = {"configure": "^$", "write": ".*", "read": ".*"}
    shared_rabbitmq.management.put(f"/permissions/{vhost}/{USER}", json=rights).raise_for_status()
    binding = ("inference.callbacks", "inference.jobs", "inference.callbacks")
    channel.queue_unbind(*binding)
    yield lambda: channel.queue_bind(*binding)
    connection.close()


def test_a_worker_killed_between_result_and_ack_repeats_the_callback_under_its_id(
    site: Site, bind_again: Callable[[], None]
) -> None:
    """The queue of callbacks is away as the result is kept, so that the worker dies right between the two."""
    worker = site.worker("echo")
    site.publish({"task_id": "k", "task_type": "echo", "callback_url": URL}, declare=False)
    first = site.ended("k")
    eventually(lambda: not worker.ready())
    assert handed_over(site) == []
    worker.discard()
    bind_again()
    site.worker("echo")
    eventually(lambda: site.depth("inference.callbacks") == 1)
    (got,) = handed_over(site)
    assert got == end_callback(first, URL)


def test_starts_and_progress_are_called_back_where_they_were_asked_for(site: Site, tmp_path: Path) -> None:
    site.worker()
    marker = str(tmp_path / "m")
    site.publish(
        {
            "task_id": "t",
            "fault": "transient",
            "callback_url": URL,
            "callback_events": ["started", "progress", "completed"],
            "options": {"times": 1, "marker": marker},
        }
    )
    site.ended("t")
    site.publish({"task_id": "p", "fault": "progress", "callback_url": URL, "callback_events": ["progress"]})
    site.ended("p")
    eventually(lambda: starts(tmp_path / "m") == 2)
    eventually(lambda: site.depth("inference.faulty.normal") == 0)
    got = handed_over(site)
    assert [(c.subject_id, c.event) for c in got if c.event != "task.progress"] == [
        ("t", "task.started"), ("t", "task.started"), ("t", "task.succeeded"),
    ]  # fmt: skip
    progress = [data_of(c)["progress"] for c in got if c.subject_id == "p"]
    assert 1 <= len(progress) <= 2  # one in three seconds
    ordered = [data_of(c)["sequence"] for c in got if c.subject_id == "t"]
    assert ordered == sorted(set(ordered))


def test_a_queue_that_is_not_there_delays_the_ack_and_loses_no_callback(
    site: Site, bind_again: Callable[[], None]
) -> None:
    worker = site.worker("echo")
    site.publish({"task_id": "t", "task_type": "echo", "callback_url": URL}, declare=False)
    site.ended("t")
    eventually(lambda: not worker.ready())
    assert handed_over(site) == []
    bind_again()
    eventually(lambda: site.depth("inference.callbacks") == 1)
    assert [c.subject_id for c in handed_over(site)] == ["t"]
