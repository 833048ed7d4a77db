"""The guard, with the official client, against a stand-in of the API server and a real Redis."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from inferq.consumers.scale_in import guard as guards
from inferq.consumers.scale_in import lease as leases
from inferq.consumers.scale_in import pods as watches
from inferq.consumers.scale_in.api import connect
from inferq.schemas.monitor import TaskInHand
from inferq.storage import StorageSettings
from tests.conftest import Node
from tests.scale_in.conftest import Site
from tests.scale_in.kubernetes_api import NAMESPACE
from tests.waiting import consistently, eventually


def two_pods(site: Site) -> None:
    """A busy pod and an idle one, both marked by a guard that runs."""
    site.api.add_pod("a")
    site.api.add_pod("b")
    site.say("a", busy=True)
    site.say("b", consumer_priority=-5)
    site.guard()
    eventually(lambda: site.costs("a", "b") == ["100", "-5"])


def test_the_costs_follow_what_workers_say_and_nothing_else_is_written(site: Site) -> None:
    two_pods(site)
    site.say("a")
    site.say("b", busy=True)
    eventually(lambda: site.costs("a", "b") == ["0", "100"])
    consistently(lambda: len(site.api.patches()) == 4, seconds=0.3)
    for patch in site.api.patches():
        assert set(patch.body) == {"metadata"}
        assert set(patch.body["metadata"]) == {"uid", "annotations"}
        assert list(patch.body["metadata"]["annotations"]) == ["controller.kubernetes.io/pod-deletion-cost"]


def test_a_pod_that_comes_later_is_marked_and_one_that_goes_is_left_alone(site: Site) -> None:
    two_pods(site)
    site.api.add_pod("c", ready=False)
    site.say("c", busy=True)
    eventually(lambda: site.api.cost("c") == "100")
    site.api.begin_deletion("c")
    site.api.add_pod("other", owner="rs-2")
    site.api.add_pod("job", ownerReferences=[{"kind": "Job", "uid": "j", "name": "j", "controller": True}])
    site.say("c")
    site.say("other", busy=True)
    site.say("job", busy=True)
    site.say("b", busy=True)
    eventually(lambda: site.api.cost("b") == "100")
    assert site.costs("c", "other", "job") == ["100", None, None]


def test_a_watch_that_breaks_or_expires_loses_nothing(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watches, "backoff", lambda _failures: 0.01)
    two_pods(site)
    restarts = site.guards[0].metrics.restarts
    eventually(lambda: site.api.watches == 1)
    # It is cut in the middle of a line; meanwhile a pod comes.
    site.api.fail("GET", "watch", 503, count=2)
    site.api.cut_watches()
    site.api.add_pod("c")
    site.say("c", busy=True)
    eventually(lambda: site.api.cost("c") == "100")
    assert restarts["failed"]._value.get() >= 1
    # What it watched from is compacted; meanwhile a pod goes, and another one has its name.
    eventually(lambda: site.api.watches == 1)
    site.api.remove_pod("c")
    site.api.compact()
    site.api.add_pod("c")
    eventually(lambda: site.api.cost("c") == "100")
    assert restarts["expired"]._value.get() >= 1


def test_a_watch_that_ends_goes_on_where_it_was(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watches, "WATCH_SECONDS", 1)
    two_pods(site)
    eventually(lambda: site.guards[0].metrics.restarts["ended"]._value.get() >= 2)
    site.api.add_pod("c")
    site.say("c", busy=True)
    eventually(lambda: site.api.cost("c") == "100")
    lists = [r for r in site.api.requests if r.method == "GET" and r.path.endswith("/pods")]
    assert len(lists) == 1, "bookmarks kept its place"


@pytest.mark.parametrize(
    ("status", "outcome"), [(429, "failed"), (500, "failed"), (403, "refused"), (409, "conflict")]
)
def test_a_patch_that_fails_is_made_again(
    site: Site, monkeypatch: pytest.MonkeyPatch, status: int, outcome: str
) -> None:
    monkeypatch.setattr(guards, "backoff", lambda *_, **__: 0.05)
    two_pods(site)
    site.api.fail("PATCH", "/pods/b", status, count=1, Retry_After="0")
    site.say("b", busy=True)
    eventually(lambda: site.api.cost("b") == "100")
    patches = site.guards[0].metrics.patches
    assert patches[outcome]._value.get() == 1  # type: ignore[index]


@pytest.mark.parametrize("status", [422, 500])
def test_a_pod_that_cannot_be_patched_keeps_no_other_waiting(
    site: Site, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setattr(guards, "backoff", lambda times, **_: 0.05 * times)
    site.api.fail("PATCH", "/pods/a", status, count=1000)
    for name in ("a", "b", "c"):
        site.api.add_pod(name)
    # The first to be patched is that of the longest run.
    task = TaskInHand(
        tenant="t", task_id="i", priority="normal", since=datetime.now(UTC) - timedelta(hours=1)
    )
    site.say("a", busy=True, tasks=(task,))
    site.say("b", busy=True)
    site.say("c")
    guard = site.guard()
    eventually(lambda: site.costs("a", "b") == [None, "100"])
    assert not guard.metrics.last_success._value.get()
    site.api.faults.clear()
    eventually(lambda: site.api.cost("a") == "108")
    eventually(lambda: guard.metrics.last_success._value.get())
    assert len(site.api.patches(status)) < 30


def test_the_api_server_says_how_long_to_wait(site: Site) -> None:
    two_pods(site)
    site.api.fail("PATCH", "/pods/", 429, Retry_After="600")
    site.say("b", busy=True)
    guard = site.guards[0]
    eventually(lambda: guard._resumes - guard._clock() > 10, "a wait that is asked for, not the usual one")
    assert guard._resumes - guard._clock() <= 30, "and a limit to it"
    assert len(site.api.patches(429)) == 1


def test_a_pod_of_the_same_name_is_never_patched_in_anothers_place(site: Site) -> None:
    two_pods(site)
    site.api.fail("GET", "watch", 503, count=1)
    with site.api._changed:  # the guard learns of all this at once
        site.api.cut_watches()
        site.say("b", busy=True)
        site.api.remove_pod("b")
        site.api.add_pod("b", owner="rs-2")
    eventually(lambda: site.api.watches == 1)
    consistently(lambda: site.api.cost("b") is None, seconds=0.2)


def test_while_redis_is_unavailable_no_cost_changes(
    site: Site, redis_node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = StorageSettings(redis_url=redis_node.url, redis_timeout=0.5)
    site.index = type(site.index).from_settings(storage)
    site.api.add_pod("a")
    site.api.add_pod("b")
    site.say("a", busy=True)
    site.say("b")
    guard = site.guard(storage=storage)
    eventually(lambda: site.costs("a", "b") == ["100", None])
    eventually(lambda: guard.readiness().ready)
    redis_node.kill()
    eventually(lambda: guard.readiness().waiting_for == ("Redis",))
    moment = guard._clock
    # Much later, what workers said last is forgotten.
    for part in (guard, guard._hearing, guard._lease):
        monkeypatch.setattr(part, "_clock", lambda: moment() + 60)
    site.api.add_pod("c")
    eventually(lambda: len(guard._pods.facts or ()) == 3)
    consistently(lambda: site.costs("a", "b", "c") == ["100", None, None], seconds=0.3)
    assert not guard.health().faults
    redis_node.start()
    site.say("a")
    site.say("b", busy=True)
    # c is ready, and nobody knows what its worker does.
    eventually(lambda: site.costs("a", "b", "c") == ["0", "100", "10"])


def test_of_two_guards_one_works_and_the_other_takes_over(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "_RENEW_SECONDS", 0.05)
    two_pods(site)
    first = site.guards[0]
    second = site.guard("guard-2")
    eventually(lambda: second._pods.facts)
    consistently(lambda: first._lease.held and not second._lease.held, seconds=0.3)
    first.stop()
    eventually(lambda: second._lease.held)
    site.say("b", busy=True)
    eventually(lambda: site.api.cost("b") == "100")
    lease = site.api.lease()
    assert lease is not None
    assert (lease["spec"]["holderIdentity"], lease["spec"]["leaseTransitions"]) == ("guard-2", 1)


def test_a_lease_that_nobody_renews_is_taken_and_one_that_cannot_be_renewed_is_not_counted_on(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    api = leases.CoordinationV1Api(connect())
    first, second = (leases.Lease(api, NAMESPACE, name, clock=lambda: now[0]) for name in ("a", "b"))
    assert first.keep()
    assert not second.keep()
    # Another one writes between its reading and its writing.
    now[0] = 4
    site.api.fail("PUT", "leases", 409)
    assert first.keep()
    assert not second.keep()
    site.api.fail("GET", "leases", 500, count=9)
    for now[0] in (8, 11, 14):
        first.keep()
    assert not first.held, "10 s after it was renewed last"
    site.api.faults.clear()
    now[0] = 18
    assert second.keep()
    assert not first.keep()
    second.release()
    now[0] = 25
    assert first.keep()


def test_a_guard_that_is_killed_finds_its_place_again(site: Site, tmp_path: Path) -> None:
    site.api.add_pod("a")
    site.api.add_pod("b")
    env = os.environ | {
        "INFERQ_REDIS_URL": site.storage.redis_url,
        "INFERQ_SCALE_IN_NAMESPACE": NAMESPACE,
        "INFERQ_LOG_FORMAT": "text",
    }
    command = [sys.executable, "-P", "-m", "inferq.producer.cli", "scale-in-guard"]
    with (tmp_path / "log").open("wb") as log:
        for last in (False, True):
            process = subprocess.Popen(command, env=env, stderr=log)
            try:

                def marked(busy: bool) -> bool:
                    site.say("a", busy=True)
                    site.say("b", busy=busy)
                    return site.costs("a", "b") == ["100", "100" if busy else None]

                eventually(lambda last=last: marked(last))
            finally:
                process.send_signal(signal.SIGTERM if last else signal.SIGKILL)
                status = process.wait(30)
            assert status == (0 if last else -signal.SIGKILL)
    lease = site.api.lease()
    assert lease is not None
    assert lease["spec"]["holderIdentity"] == "", "the next one need not wait"
    assert len(site.api.patches()) == 2, "the second had nothing to repeat"
    assert "Traceback" not in (tmp_path / "log").read_text()
