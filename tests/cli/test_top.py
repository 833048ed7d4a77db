"""inferq top: the picture, what it says while the gateway is away, and its output for scripts."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from inferq.producer.cli import app, top
from inferq.producer.cli.top import Rates, Reading, view
from inferq.producer.client.errors import Unauthorized
from inferq.producer.client.sync_client import Client
from inferq.schemas import BatchCounts, BatchStatus, EngineInfo
from inferq.schemas.monitor import (
    GpuMemory,
    Lane,
    LateNight,
    QueueFigures,
    Stats,
    TaskInHand,
    TypeWorkers,
    WorkerInfo,
    WorkerList,
)
from tests.waiting import eventually

NOW = datetime(2026, 11, 30, 13, 40, 5, tzinfo=UTC)


def lane(
    priority: str, ready: int | None, unacked: int | None, taken: int | None, **more: Any
) -> QueueFigures:
    fields = {"task_type": "ocr", "consumers": 2, "oldest_seconds": 0.0, **more}
    return QueueFigures.model_validate(
        {"priority": priority, "ready": ready, "unacked": unacked, "taken": taken, **fields}
    )


def stats(at: datetime = NOW, *, taken: int = 400, **more: Any) -> Stats:
    fields: dict[str, Any] = {
        "at": at,
        "services": {"rabbitmq": True, "redis": True, "store": False},
        "alarms": ("disk",),
        "queues": (
            lane("high", 0, 1, 12),
            lane("normal", 1234, 1, taken, oldest_seconds=4000.0),
            lane("low", 0, 0, 0, task_type="ner", consumers=0),
        ),
        "retry_messages": {"5s": 0, "30s": 3},
        "dead_letters": {"ocr": 2, "ner": 0},
        "unroutable_messages": 0,
        "callbacks_waiting": 5,
        "callbacks_given_up": 1,
        "batches": None,
        "nights": {"completed": 2, "failed": 1},
        "late_nights": (LateNight(schedule="scans", tenant="default", seconds=3660),),
        "workers": (TypeWorkers(task_type="ocr", busy=1),),
        "unknown": {"batches": "the object store is unavailable"},
    }
    return Stats.model_validate(fields | more)


def worker(worker_id: str, state: str, **more: Any) -> WorkerInfo:
    fields: dict[str, Any] = {
        "name": worker_id, "host": "gpu", "pid": 7, "task_type": "ocr", "lanes": ("high", "normal"), "slots": 1,
        "busy": 0, "version": "0.1.0", "since": NOW,
        "engine": EngineInfo(name="rapidocr", version="3.10", model="PP-OCRv6", device="cuda:0"),
    }  # fmt: skip
    return WorkerInfo.model_validate({"worker_id": worker_id, "state": state, **fields, **more})


READING = Reading(
    stats(),
    WorkerList(
        items=(
            worker(
                "gpu-1-7", "busy", busy=1, in_hand={"high": 1, "normal": 1},
                tasks=(TaskInHand(tenant="default", task_id="ocr_001", priority="high", since=NOW),),
                gpus=(GpuMemory(gpu="0", used_bytes=6 * 1024**3, total_bytes=24 * 1024**3),),
            ),
            worker("gpu-2-7", "paused", paused_for=("object store",)),
        )
    ),
    (
        BatchStatus(
            batch_id="scans-20261130", tenant="default", state="feeding", source="inferq:x", rate=12.5,
            seconds_left=95, counts=BatchCounts(total=2000, succeeded=800), created_at=NOW,
        ),
    ),
)  # fmt: skip


def picture(reading: Reading, rates: dict[Lane, float], *, width: int = 120) -> Console:
    console = Console(
        record=True, width=width, file=io.StringIO(), color_system="truecolor", force_terminal=True
    )
    console.print(view(reading, rates))
    return console


def test_the_picture_has_the_figures_and_says_what_is_unknown() -> None:
    text = picture(READING, {("ocr", "normal"): 3.25}).export_text()
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert any("redis up store unavailable disk alarm" in line for line in lines)
    assert "ocr high 0 1 0 s 2 2" in lines
    assert "normal 1,234 1 1 h 6 min 3.2 2" in lines
    assert not [line for line in lines if line.startswith("ner")]
    assert "retries 3 at 30s" in lines
    assert "callbacks 5 waiting, 1 given up" in lines
    assert "batches ?" in lines
    assert "? the object store is unavailable" in lines
    assert "late scans by 1 h 1 min" in lines
    assert "gpu-1-7 ocr busy 1/1 ocr_001, and 1 more PP-OCRv6 on cuda:0 6.0/24 GiB 0.1.0" in lines
    assert "gpu-2-7 ocr paused for object store 0/1 PP-OCRv6 on cuda:0 0.1.0" in lines
    assert "scans-20261130 feeding 800 2,000 12.5 1 min 35 s" in lines


def test_unknown_is_never_shown_as_zero() -> None:
    unknown = {name: "Redis is unavailable" for name in Stats.model_fields if name not in ("at", "unknown")}
    text = picture(
        Reading(Stats(unknown=unknown), WorkerList(unknown="Redis is unavailable")), {}
    ).export_text()
    assert "0" not in text
    assert text.count("Redis is unavailable") == 1
    half = stats(queues=(lane("normal", 3, None, None, oldest_seconds=None),))
    lines = picture(Reading(half, READING.workers), {}).export_text().splitlines()
    assert "ocr normal 3 ? ? 2 2" in [" ".join(line.split()) for line in lines]


def test_texts_of_others_cannot_steer_the_terminal() -> None:
    evil = worker("\x1b[2Jgpu", "idle", version="[red]1")
    text = picture(Reading(stats(), WorkerList(items=(evil,))), {}).export_text()
    assert "\x1b[2J" not in text
    assert "\\u001b[2Jgpu" in text
    assert "[red]1" in text


def test_a_narrow_terminal_loses_no_figure() -> None:
    lines = [" ".join(line.split()) for line in picture(READING, {}, width=80).export_text().splitlines()]
    assert "normal 1,234 1 1 h 6 min 2" in lines
    assert "gpu-1-7 ocr busy 1/1 ocr_001, and PP-OCRv6 on 6.0/24 GiB 0.1.0" in lines
    text = "".join(picture(READING, {}, width=50).export_text().split())
    assert "1,234" in text


def test_rates_come_from_two_rounds_of_the_monitor() -> None:
    rates = Rates()
    assert rates.after(stats(taken=400)) == {}
    assert rates.after(stats(taken=400)) == {}, "the same round"
    later = rates.after(stats(NOW + timedelta(seconds=5), taken=450))
    assert later["ocr", "normal"] == 10
    assert later["ocr", "high"] == 0
    stale = {"redis": NOW + timedelta(seconds=5)}
    assert rates.after(stats(NOW + timedelta(seconds=8), taken=450, read_at=stale)) == later, "not read anew"
    anew = rates.after(stats(NOW + timedelta(seconds=10), taken=3))  # Redis lost the counts
    assert ("ocr", "normal") not in anew
    assert rates.after(Stats()) == anew


class Api(BaseHTTPRequestHandler):
    """The gateway's answers; 503 while `away`, 401 while `locked`."""

    away = locked = False

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        page = json.dumps({"items": [b.model_dump(mode="json") for b in READING.batches], "cursor": None})
        answers = {
            "/v1/stats": READING.stats.model_dump_json(),
            "/v1/workers": READING.workers.model_dump_json(),
            "/v1/batches": page,
        }
        code = 503 if Api.away else 401 if Api.locked else 200
        body = (answers[path] if code == 200 else '{"code": "away", "detail": "Redis is down"}').encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        return


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    Api.away = Api.locked = False
    server = ThreadingHTTPServer(("127.0.0.1", 0), Api)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("INFERQ_API_URL", url)
    monkeypatch.setenv("INFERQ_API_KEY", "iq_test")
    yield url
    server.shutdown()
    server.server_close()


def test_once_is_for_scripts(api: str) -> None:
    ran = CliRunner().invoke(app, ["top", "--once", "--json"])
    assert ran.exit_code == 0
    document = json.loads(ran.output)
    assert Stats.model_validate(document["stats"]) == READING.stats
    assert document["stats"]["batches"] is None, "an unknown figure is null, not left out"
    assert [item["worker_id"] for item in document["workers"]["items"]] == ["gpu-1-7", "gpu-2-7"]
    assert [batch["batch_id"] for batch in document["batches"]] == ["scans-20261130"]
    for arguments in (["--once"], []):  # a pipe is no terminal
        ran = CliRunner().invoke(app, ["top", *arguments])
        assert ran.exit_code == 0
        assert "1,234" in ran.output
    Api.locked = True
    assert isinstance(CliRunner().invoke(app, ["top", "--once"]).exception, Unauthorized)


@contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch, pause: Callable[[float], None]) -> Iterator[io.StringIO]:
    """A terminal that keeps what was written to it; `pause` takes the place of each wait."""
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=120, height=50)
    monkeypatch.setattr(top, "console", console)
    monkeypatch.setattr(top.time, "sleep", pause)
    yield written


def test_it_goes_on_while_the_gateway_is_away_and_ends_at_ctrl_c(
    api: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[str] = []

    def pause(seconds: float) -> None:
        looks.append(written.getvalue())
        written.truncate(0)
        Api.away = len(looks) == 1
        if len(looks) == 3:
            raise KeyboardInterrupt
        assert seconds == 0.5

    with terminal(monkeypatch, pause) as written:
        ran = CliRunner().invoke(app, ["top", "--interval", "0.5"], catch_exceptions=False)
    assert ran.exit_code == 0
    there, away, back = looks
    assert "1,234" in there
    assert "still trying" in away
    assert "1,234" in away, "the last figures stay"
    assert "still trying" not in back
    assert "\x1b[?1049l" in written.getvalue(), "the terminal is as before"


def test_an_api_that_is_refused_ends_it(api: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Api.locked = True
    with terminal(monkeypatch, lambda _seconds: None):
        ran = CliRunner().invoke(app, ["top"])
    assert isinstance(ran.exception, Unauthorized)


def test_the_first_look_may_fail(api: str) -> None:
    Api.away = True
    with Client(retries=0) as client:
        shown = top._screens(client, Rates())
        first: Any = next(shown)
        assert "still trying" in str(first)
        Api.away = False
        assert eventually(lambda: not isinstance(next(shown), type(first)))
