"""A worker whose lines break while it computes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import redis

from inferq.storage.status.keys import record_key
from tests.proxy import TcpProxy
from tests.waiting import eventually
from tests.worker.conftest import Site, starts


@pytest.fixture
def broker_line(site: Site) -> Iterator[TcpProxy]:
    """The line between workers and RabbitMQ: `site.worker` goes through it from now on."""
    port = urlsplit(site.env["INFERQ_AMQP_URL"]).port
    assert port is not None
    line = TcpProxy(port)
    site.env["INFERQ_AMQP_URL"] = site.env["INFERQ_AMQP_URL"].replace(f":{port}/", f":{line.port}/")
    yield line
    line.close()


def test_a_run_whose_connection_was_lost_does_not_count_as_lost(
    site: Site, broker_line: TcpProxy, tmp_path: Path
) -> None:
    marker, gate = tmp_path / "marker", tmp_path / "gate"
    site.worker()
    task = site.publish({"fault": "gate", "options": {"marker": str(marker), "gate": str(gate)}})
    eventually(lambda: starts(marker))

    with redis.Redis.from_url(site.env["INFERQ_REDIS_URL"]) as index:
        assert index.hexists(record_key("default", task), "l")
        broker_line.cut()
        eventually(lambda: not index.hexists(record_key("default", task), "l"))
    gate.touch()
    assert site.ended(task).status == "succeeded"
    assert starts(marker) == 1


@pytest.mark.parametrize("lanes", ["normal", "high,normal,low"])
def test_a_run_goes_on_through_a_lost_connection_and_is_not_done_again(
    site: Site, broker_line: TcpProxy, tmp_path: Path, lanes: str
) -> None:
    marker = tmp_path / "marker"
    worker = site.worker(INFERQ_LANES=lanes)
    task = site.publish({"fault": "progress", "options": {"marker": str(marker)}})
    eventually(lambda: starts(marker))

    broker_line.cut()
    eventually(lambda: not worker.ready())
    eventually(worker.ready)

    result = site.ended(task)
    assert (result.status, result.attempts) == ("succeeded", 1)
    eventually(lambda: site.depth("inference.faulty.normal") == 0)
    following = site.publish({})
    assert site.ended(following).status == "succeeded"
    assert starts(marker) == 1


def test_a_run_that_ends_while_the_broker_is_away_is_kept(
    site: Site, broker_line: TcpProxy, tmp_path: Path
) -> None:
    marker = tmp_path / "marker"
    worker = site.worker()
    task = site.publish({"fault": "progress", "options": {"marker": str(marker)}})
    eventually(lambda: starts(marker))

    broker_line.refuse()
    result = site.ended(task)
    assert result.status == "succeeded"
    eventually(lambda: 'inferq_worker_paused{service="RabbitMQ"} 1.0' in worker.get("/metrics").text)
    answer = worker.get("/readyz")
    assert (answer.status_code, answer.json()["ready"]) == (200, True)
    assert "RabbitMQ" in answer.text
    broker_line.refuse(False)

    eventually(worker.ready)
    assert 'inferq_worker_paused{service="RabbitMQ"} 0.0' in worker.get("/metrics").text
    assert site.ended(site.publish({})).status == "succeeded"
    assert starts(marker) == 1
    assert site.ended(task) == result


def test_a_retry_that_cannot_be_published_is_kept_in_hand(
    site: Site, broker_line: TcpProxy, tmp_path: Path
) -> None:
    marker = tmp_path / "marker"
    worker = site.worker()
    options = {"marker": str(marker), "times": 1}
    task = site.publish({"fault": "hang", "time_limit": 1, "options": options})
    eventually(lambda: starts(marker))

    broker_line.refuse()
    eventually(lambda: "attempt 1 failed" in worker.log.read_text())
    broker_line.refuse(False)

    # The broker hands the original out again, which may overtake its copy for the next attempt.
    assert site.ended(task).status == "succeeded"
    eventually(lambda: all(site.depth(f"inference.retry.{s}s") == 0 for s in (5, 30)))
    eventually(lambda: site.depth("inference.faulty.normal") == 0)
    assert starts(marker) == 2
    assert site.dead() == []
