"""What beat starts, by a clock of the test's own."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from inferq.broker import BrokerUnavailable, Message
from inferq.producer.nightly import read_schedules
from inferq.producer.nightly.beat import Beat
from inferq.producer.nightly.readiness import beat_readiness
from inferq.storage import LocalStore, StoreOutage
from inferq.storage.nightly_runs import Run, RunLog, known_schedules

HOURLY = '[a]\ncron = "0 * * * *"\nsource = "s3://scans/in/"\ntask_type = "ocr"\n'
NOON = datetime(2026, 11, 25, 12, 0, tzinfo=UTC)


class BeatSite:
    """A beat on a file and a store; `started` is the times that it started, as hours and minutes."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "schedules.toml"
        self.store = LocalStore(folder / "store", fsync=False)
        self.messages: list[Message] = []
        self.away = False
        self.write(HOURLY)
        self.beat = self.another()

    def another(self) -> Beat:
        """A beat of its own on the same file and store, as after a restart."""
        return Beat(self.path, self.store, self._publish, read_schedules(self.path), look_seconds=20)

    def write(self, text: str) -> None:
        fresh = self.path.with_suffix(".new")
        fresh.write_text(text)
        fresh.replace(self.path)

    def _publish(self, message: Message) -> None:
        if self.away:
            raise BrokerUnavailable("RabbitMQ is away")
        self.messages.append(message)

    @property
    def started(self) -> list[str]:
        found = []
        for message in self.messages:
            _, arguments, _ = json.loads(message.body)
            found.append(arguments["schedule"]["name"] + arguments["scheduled_at"][11:16])
        return found

    def run(self, beat: Beat, start: datetime, end: datetime) -> None:
        """Ask a beat from `start` to `end`, whenever it wants to be asked."""
        now = start
        while now <= end:
            now += timedelta(seconds=max(beat.tick(now), 0.01))

    def worked_off(self) -> None:
        """What a worker of the jobs puts on record of every start so far."""
        for message in self.messages:
            _, arguments, _ = json.loads(message.body)
            schedule = read_schedules(self.path)[arguments["schedule"]["name"]]
            moment = datetime.fromisoformat(arguments["scheduled_at"])
            batch = schedule.batch(moment)
            run = Run(run_id=batch.batch_id, scheduled_at=moment, schedule=schedule)
            RunLog(self.store, "default", schedule.name).claim(run)


@pytest.fixture
def site(tmp_path: Path) -> BeatSite:
    return BeatSite(tmp_path)


def minutes(count: float) -> timedelta:
    return timedelta(minutes=count)


def test_each_time_is_started_once_and_on_time(site: BeatSite) -> None:
    site.run(site.beat, NOON + minutes(30), NOON + minutes(150))
    assert site.started == ["a13:00", "a14:00"]


def test_a_schedule_that_is_new_is_not_caught_up(site: BeatSite) -> None:
    site.beat.tick(NOON + minutes(30))
    assert site.started == []


def test_of_several_missed_runs_the_latest_is_caught_up_once(site: BeatSite) -> None:
    site.run(site.beat, NOON + minutes(30), NOON + minutes(70))
    site.worked_off()
    site.messages.clear()
    later = NOON + minutes(60 * 5 + 30)
    second = site.another()
    site.run(second, later, later + minutes(5))
    assert site.started == ["a17:00"]


def test_what_has_been_started_is_not_caught_up_after_a_restart(site: BeatSite) -> None:
    site.run(site.beat, NOON + minutes(30), NOON + minutes(70))
    site.worked_off()
    site.run(site.another(), NOON + minutes(71), NOON + minutes(80))
    assert site.started == ["a13:00"]


def test_a_beat_that_died_before_its_message_was_sent_starts_the_run_when_it_is_back(site: BeatSite) -> None:
    site.beat.tick(NOON + minutes(30))
    site.away = True
    site.beat.tick(NOON + minutes(60))
    site.away = False
    site.another().tick(NOON + minutes(61))
    assert site.started == ["a13:00"]


@pytest.mark.parametrize("running", [True, False], ids=["running", "first seen while ahead"])
def test_after_a_clock_that_was_ahead_runs_start_again_from_now_on(
    site: BeatSite, running: bool, caplog: pytest.LogCaptureFixture
) -> None:
    if running:
        site.beat.tick(NOON + minutes(30))
    ahead = NOON + timedelta(days=30, minutes=30)
    site.run(site.beat, ahead, ahead + minutes(1))
    site.worked_off()
    site.messages.clear()
    for beat in (site.beat, site.another()) if running else (site.another(), site.beat):
        site.run(beat, NOON + minutes(31), NOON + minutes(70))
        site.worked_off()
    assert site.started == ["a13:00"]
    assert "the clock was set back from 2026-12-25" in caplog.text


def test_a_schedule_first_seen_by_a_clock_that_was_ahead_is_known_from_when_it_is_right(
    site: BeatSite,
) -> None:
    site.beat.tick(NOON + timedelta(days=30))
    site.beat.tick(NOON + minutes(30))
    site.another().tick(NOON + minutes(61))  # restarted; it catches up what it missed meanwhile
    assert site.started == ["a13:00"]


def test_a_clock_that_is_corrected_by_a_little_starts_nothing_twice(
    site: BeatSite, caplog: pytest.LogCaptureFixture
) -> None:
    site.run(site.beat, NOON + minutes(30), NOON + minutes(60.2))
    site.worked_off()
    site.run(site.beat, NOON + minutes(59.9), NOON + minutes(61))
    assert site.started == ["a13:00"]
    assert caplog.text == ""


def test_two_beats_send_starts_of_the_same_runs(site: BeatSite) -> None:
    other = site.another()
    for beat in (site.beat, other):
        site.run(beat, NOON + minutes(30), NOON + minutes(70))
    ids = {message.message_id for message in site.messages}
    assert site.started == ["a13:00", "a13:00"]
    assert ids == {"a-20261125T130000Z"}


@pytest.mark.parametrize("store_is_away", [False, True])
def test_an_outage_delays_a_start_and_readiness_says_so(
    site: BeatSite, monkeypatch: pytest.MonkeyPatch, store_is_away: bool
) -> None:
    site.beat.tick(NOON + minutes(30))
    assert site.beat.state.ready
    if store_is_away:

        def away(_key: str) -> bytes:
            raise StoreOutage("the store is away")

        monkeypatch.setattr(site.store, "get", away)
    else:
        site.away = True
    assert site.beat.tick(NOON + minutes(60)) <= 5
    assert not site.beat.state.ready
    assert site.beat.state.waiting_for
    monkeypatch.undo()
    site.away = False
    site.run(site.beat, NOON + minutes(61), NOON + minutes(62))
    assert site.started == ["a13:00"]
    assert site.beat.state.ready


def test_one_schedule_that_cannot_be_started_does_not_hold_up_another(
    site: BeatSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.write(HOURLY + HOURLY.replace("[a]", "[b]"))
    site.run(site.beat, NOON + minutes(30), NOON + minutes(31))
    get = site.store.get

    def broken(key: str) -> bytes:
        if "/a/" in key:
            raise StoreOutage("this key cannot be read")
        return get(key)

    monkeypatch.setattr(site.store, "get", broken)
    site.beat.tick(NOON + minutes(60))
    assert site.started == ["b13:00"]


@pytest.mark.parametrize("tenant", [".", ".."])
def test_a_tenant_whose_name_means_a_folder_has_its_runs_like_any_other(site: BeatSite, tenant: str) -> None:
    site.write(HOURLY + f'tenant = "{tenant}"\n')
    site.run(site.another(), NOON + minutes(30), NOON + minutes(70))
    assert site.started == ["a13:00"]


def test_the_file_is_read_again_when_it_changes(site: BeatSite) -> None:
    site.run(site.beat, NOON + minutes(30), NOON + minutes(40))
    site.write(HOURLY.replace('"0 *', '"45,50 *'))
    site.run(site.beat, NOON + minutes(41), NOON + minutes(52))
    assert site.started == ["a12:45", "a12:50"]


def test_times_that_are_new_are_not_caught_up(site: BeatSite) -> None:
    site.run(site.beat, NOON + minutes(30), NOON + minutes(40))
    site.write(HOURLY.replace('"0 *', '"35 *'))
    site.another().tick(NOON + minutes(50))
    assert site.started == []


def test_a_file_that_became_bad_changes_nothing_but_readiness(site: BeatSite) -> None:
    site.beat.tick(NOON + minutes(30))
    site.write("[a]\ncron = 1\n")
    site.run(site.beat, NOON + minutes(31), NOON + minutes(61))
    assert site.started == ["a13:00"]
    assert not site.beat.state.ready
    site.write(HOURLY)
    site.run(site.beat, NOON + minutes(62), NOON + minutes(63))
    assert site.beat.state.ready


def test_a_schedule_that_was_away_from_the_file_is_not_caught_up(site: BeatSite) -> None:
    site.run(site.beat, NOON + minutes(30), NOON + minutes(40))
    site.write("")
    site.run(site.beat, NOON + minutes(41), NOON + minutes(70))
    site.write(HOURLY)
    site.run(site.beat, NOON + minutes(71), NOON + minutes(80))
    assert site.started == []


@pytest.mark.parametrize("between", ["", HOURLY + 'tenant = "other"\n', HOURLY.replace("[a]", "[b]")])
def test_a_schedule_that_went_while_beat_was_down_is_not_caught_up(site: BeatSite, between: str) -> None:
    site.run(site.beat, NOON + minutes(30), NOON + minutes(70))
    site.worked_off()
    site.messages.clear()
    site.write(between)
    site.run(site.another(), NOON + minutes(75), NOON + minutes(76))
    site.write(HOURLY)
    site.run(site.another(), NOON + minutes(400), NOON + minutes(410))
    assert site.started == []


def test_a_tenant_that_is_changed_and_changed_back_is_not_caught_up(site: BeatSite) -> None:
    site.run(site.beat, NOON + minutes(30), NOON + minutes(40))
    site.write(HOURLY + 'tenant = "other"\n')
    site.run(site.beat, NOON + minutes(41), NOON + minutes(42))
    site.write(HOURLY)
    site.run(site.another(), NOON + minutes(71), NOON + minutes(72))
    assert site.started == []


def test_schedules_are_forgotten_once_the_store_is_back(
    site: BeatSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.run(site.beat, NOON + minutes(30), NOON + minutes(40))
    site.write("")

    def away(_prefix: str, **_more: str) -> None:
        raise StoreOutage("the store is away")

    monkeypatch.setattr(site.store, "list", away)
    site.run(site.beat, NOON + minutes(41), NOON + minutes(42))
    assert not site.beat.state.ready
    monkeypatch.undo()
    site.run(site.beat, NOON + minutes(43), NOON + minutes(44))
    assert site.beat.state.ready
    assert not list(known_schedules(site.store))


def test_a_file_that_is_caught_while_it_is_written_changes_nothing(site: BeatSite) -> None:
    site.run(site.beat, NOON + minutes(30), NOON + minutes(59.99))
    for cut in ("", "[a]\ncron = "):
        site.path.write_text(cut)
        site.beat.tick(NOON + minutes(60))
    site.path.write_text(HOURLY)
    site.run(site.beat, NOON + minutes(60.01), NOON + minutes(61))
    assert site.started == ["a13:00"]
    assert list(known_schedules(site.store)) == [("default", "a")]


def test_the_known_schedules_are_found_among_all_their_runs(site: BeatSite) -> None:
    names = ("a", "a-b", "a2", "b")
    site.write("".join(HOURLY.replace("[a]", f"[{name}]") for name in names))
    site.another().tick(NOON + minutes(30))
    for name, schedule in read_schedules(site.path).items():
        for hour in range(3):
            moment = NOON + minutes(60 * hour)
            run = Run(run_id=schedule.batch(moment).batch_id, scheduled_at=moment, schedule=schedule)
            RunLog(site.store, "default", name).claim(run)
    RunLog(site.store, "default", "a2").forget()
    assert sorted(known_schedules(site.store)) == [("default", name) for name in ("a", "a-b", "b")]


def test_a_clock_that_is_set_back_starts_nothing_anew(site: BeatSite) -> None:
    site.run(site.beat, NOON + minutes(30), NOON + minutes(62))
    site.run(site.beat, NOON + minutes(50), NOON + minutes(62))
    assert site.started == ["a13:00"]


def test_beat_is_ready_only_while_it_could_start_a_run(site: BeatSite) -> None:
    site.beat.tick(NOON)
    publisher: Any = SimpleNamespace(connected=True, blocked_reason=None)
    store: Any = SimpleNamespace(waiting_for=None)
    assert beat_readiness(site.beat, publisher, store).ready
    store.waiting_for = "object store: it only reads"
    publisher.blocked_reason = "low on disk"
    found = beat_readiness(site.beat, publisher, store)
    assert not found.ready
    assert found.waiting_for == (
        "RabbitMQ: it takes no messages (low on disk)",
        "object store: it only reads",
    )
    publisher.connected, publisher.blocked_reason = False, None
    assert beat_readiness(site.beat, publisher, store).waiting_for[0] == "RabbitMQ"


def test_metrics_say_what_became_of_each_run_that_was_due(site: BeatSite) -> None:
    def value(name: str, schedule: str = "a", **labels: str) -> float | None:
        return beat.metrics.registry.get_sample_value(f"inferq_beat_{name}", {"schedule": schedule, **labels})

    beat = site.beat
    beat.tick(NOON + minutes(30))
    assert value("last_run_timestamp_seconds") is None  # unknown, not 0
    site.away = True
    beat.tick(NOON + minutes(60))
    beat.tick(NOON + minutes(61))
    assert (value("runs_total", outcome="failed"), value("last_run_timestamp_seconds")) == (2, None)
    site.away = False
    site.run(beat, NOON + minutes(62), NOON + minutes(130))
    assert value("runs_total", outcome="started") == 2
    assert value("last_run_timestamp_seconds") == (NOON + minutes(120)).timestamp()
    site.worked_off()
    beat = site.another()
    site.run(beat, NOON + minutes(131), NOON + minutes(132))
    assert (value("runs_total", outcome="known"), value("runs_total", outcome="started")) == (1, None)
    assert value("last_run_timestamp_seconds") == (NOON + minutes(120)).timestamp()
    site.write(HOURLY.replace("[a]", "[b]"))
    site.run(beat, NOON + minutes(133), NOON + minutes(190))
    assert value("last_run_timestamp_seconds") is None
    assert value("last_run_timestamp_seconds", "b") == (NOON + minutes(180)).timestamp()
