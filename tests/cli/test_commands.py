"""The command line, run as a person runs it, against a gateway and a worker that run as they do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from inferq.broker import BrokerSettings, Topology, connect, job_topology
from inferq.broker.topology import Queue, delay_level
from inferq.producer.gateway.keys import KeyFile
from inferq.schemas.errors import EXIT_CONFIG
from tests.conftest import RabbitMQ
from tests.installation import inferq, inferq_here, installation
from tests.waiting import eventually

PAGES = Path(__file__).parents[2] / "examples" / "pages"


@pytest.fixture(scope="module", name="installation")
def installation_of_three_types(
    shared_rabbitmq: RabbitMQ, redis_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, str]]:
    folder = tmp_path_factory.mktemp("installation")
    # The one page and the few texts that are read here warm the engines up.
    with installation(shared_rabbitmq, redis_url, folder, "echo", "ocr", "ner", INFERQ_WARMUP="0") as env:
        yield env


def run_quickly(env: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command in this process, unless it is the worker, which sets up logging and signals."""
    return (inferq if arguments[0] == "worker" else inferq_here)(env, *arguments)


def answer(run: subprocess.CompletedProcess[str], status: int = 0) -> Any:
    assert run.returncode == status, run.stdout + run.stderr
    return json.loads(run.stdout)


def test_a_file_is_read_and_saved(installation: dict[str, str], tmp_path: Path) -> None:
    page = PAGES / "notice.png"
    run = inferq(
        installation, "submit", "ocr", str(page), "--set", "annotated=true", "--wait", "--out", str(tmp_path)
    )
    assert run.returncode == 0, run.stderr
    for line in (PAGES / "notice.txt").read_text("utf-8").splitlines():
        assert line in run.stdout
    (folder,) = tmp_path.iterdir()
    assert (folder / "annotated.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((folder / "result.json").read_text())
    assert result["status"] == "succeeded"
    assert result["timings"]["inference"] > 0


def test_texts_and_files_of_text_are_searched_for_names(installation: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "文章.txt"
    file.write_text("李娜在上海。\n", "utf-8")
    inputs = ["张伟在北京看糖尿病。", str(file), "2024"]
    dictionary = 'dictionary={"DISEASE": ["糖尿病"]}'
    submitted = inferq_here(installation, "submit", "ner", *inputs, "--set", dictionary, "--wait", "--json")
    results = answer(submitted)
    found = [
        [(entity["type"], entity["text"]) for entity in result["output"]["texts"][0]["entities"]]
        for result in results
    ]
    assert found == [
        [("PER", "张伟"), ("LOC", "北京"), ("DISEASE", "糖尿病")],
        [("PER", "李娜"), ("LOC", "上海")],
        [],
    ]
    refused = inferq_here(installation, "submit", "ner", " ")
    assert refused.returncode != 0
    assert "only white space" in refused.stdout + refused.stderr


def test_several_texts_make_several_tasks(installation: dict[str, str]) -> None:
    results = answer(inferq_here(installation, "submit", "echo", "one", '{"two": 2}', "--wait", "--json"))
    assert [result["output"]["payload"] for result in results] == ["one", {"two": 2}]


def test_status_result_list_and_a_second_submit_of_the_same_id(installation: dict[str, str]) -> None:
    made = inferq_here(installation, "submit", "echo", "x", "--id", "mine", "--priority", "high")
    assert made.stdout.strip() == "mine"
    result = answer(inferq_here(installation, "result", "mine", "--wait", "20", "--json"))
    assert result["output"] == {"payload": "x"}
    status = answer(inferq_here(installation, "status", "mine", "--json"))
    assert (status["state"], status["priority"]) == ("succeeded", "high")
    assert "succeeded" in inferq_here(installation, "status", "mine").stdout
    listed = answer(inferq_here(installation, "list", "--type", "echo", "--status", "succeeded", "--json"))
    assert "mine" in [task["task_id"] for task in listed]
    again = inferq_here(installation, "submit", "echo", "x", "--id", "mine", "--priority", "high")
    assert again.returncode == 0
    other = inferq_here(installation, "submit", "echo", "y", "--id", "mine")
    assert other.returncode == 1
    assert "error:" in other.stderr
    assert "Traceback" not in other.stderr


def test_a_running_task_is_cancelled(installation: dict[str, str]) -> None:
    inferq_here(installation, "submit", "echo", "x", "--set", "delay=60", "--id", "slow")
    eventually(lambda: answer(inferq_here(installation, "status", "slow", "--json"))["state"] == "running")
    assert "cancelled" in inferq_here(installation, "cancel", "slow").stdout
    result = answer(inferq_here(installation, "result", "slow", "--wait", "20", "--json"), status=1)
    assert result["status"] == "cancelled"


def test_a_failure_is_told_dead_lettered_and_redriven(installation: dict[str, str], tmp_path: Path) -> None:
    picture = tmp_path / "text.png"
    picture.write_text("this is no picture")
    run = inferq_here(installation, "submit", "ocr", str(picture), "--wait", "--id", "bad")
    assert run.returncode == 1
    assert "not_an_image" in run.stderr
    (letter,) = answer(inferq_here(installation, "dead", "list", "ocr", "--json"))
    assert (letter["task_id"], letter["reason"]) == ("bad", "not_an_image")
    assert "not_an_image" in inferq_here(installation, "dead", "list", "ocr").stdout
    (shown,) = answer(inferq_here(installation, "dead", "show", "ocr", "bad"))
    assert json.loads(shown["body"])["task_id"] == "bad"
    assert "none" in inferq_here(installation, "dead", "list", "ocr", "--reason", "other").stdout
    assert "none" in inferq_here(installation, "dead", "list", "ocr", "--since", "2999-01-01").stdout
    assert "1 would be redriven" in inferq_here(installation, "dead", "redrive", "ocr", "--dry-run").stdout
    assert (
        "1 redriven"
        in inferq_here(installation, "dead", "redrive", "ocr", "--id", "bad", "--since", "1h").stdout
    )
    eventually(lambda: answer(inferq_here(installation, "dead", "list", "ocr", "--json")))
    assert inferq(installation, "dead", "purge", "ocr", stdin="n\n").returncode != 0
    assert "1 purged" in inferq_here(installation, "dead", "purge", "ocr", "--yes").stdout
    assert answer(inferq_here(installation, "dead", "list", "ocr", "--json")) == []


def test_plain_amqp_is_enough(installation: dict[str, str]) -> None:
    example = Path(__file__).parents[2] / "examples" / "plain_amqp.py"
    page = "data:image/png;base64,iVBORw0KGgo="
    run = subprocess.run(
        [sys.executable, str(example), page], env=installation, capture_output=True, text=True, check=True
    )
    result = answer(
        inferq_here(installation, "result", run.stdout.strip(), "--wait", "20", "--json"), status=1
    )
    assert result["error"]["code"] == "truncated_image"


def test_the_topology_is_shown_applied_and_checked(installation: dict[str, str]) -> None:
    assert "inference.retry.5s" in inferq_here(installation, "topology", "show").stdout
    assert {"declare": "exchange_declare"}.items() <= answer(
        inferq_here(installation, "topology", "show", "--types", "echo", "--json")
    )[0].items()
    assert inferq_here(installation, "topology", "apply").returncode == 0
    assert answer(inferq_here(installation, "topology", "check", "--json")) == []
    assert "right arguments" in inferq_here(installation, "topology", "check").stdout


def test_what_jobs_rest_in_is_shown_and_applied_and_a_difference_in_it_found(fresh_amqp_url: str) -> None:
    env = {"INFERQ_AMQP_URL": fresh_amqp_url}
    shown = answer(inferq_here(env, "topology", "show", "--types", "echo", "--json"))
    named = [part["queue"] for part in shown if part["declare"] == "queue_declare"]
    assert {queue.name for queue in job_topology().queues} <= set(named)
    assert len(named) == len(set(named))
    assert inferq_here(env, "topology", "apply", "--types", "echo").returncode == 0
    other = Queue(delay_level(3))
    with closing(connect(BrokerSettings(amqp_url=fresh_amqp_url), name="test")) as connection:
        channel = connection.channel()
        channel.queue_delete(other.name)
        Topology((), (other,), ()).apply(channel)
    (found,) = answer(inferq_here(env, "topology", "check", "--types", "echo", "--json"), status=1)
    assert found["name"] == other.name
    assert "should be celery_delayed_2" in found["problem"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("submit", "unheard", "x"), "'unheard' is not known here; known are:"),
        (("submit", "ocr", "missing.png"), "'missing.png' is neither a file here nor a URL"),
        (("submit", "ocr", "--set", "colour=red"), "no such field or option"),
        (("submit", "ocr"), "image_url: is missing"),
        (("submit", "echo", "x", "--priority", "urgent"), "not one of high, normal, low"),
        (("submit", "echo", "x", "y", "--id", "one"), "these inputs make 2"),
        (("submit", "echo", "x", "--id", "a b"), "task_id"),
        (("status", "never-submitted"), "never-submitted"),
        (("list", "--status", "sleeping"), "not one of queued"),
        (("dead", "list", "echo", "--since", "yesterday"), "'yesterday' is neither a span"),
        (("dead", "show", "echo", "nobody"), "no dead letter"),
        (("worker", "unheard"), "known are:"),
        (("submit", "echo", "1", "--callback", "mailto:me@example.com"), "callback_url"),
    ],
)
def test_bad_input_is_one_clear_line(
    installation: dict[str, str], arguments: tuple[str, ...], complaint: str
) -> None:
    run = run_quickly(installation, *arguments)
    assert run.returncode == (EXIT_CONFIG if arguments[0] == "worker" else 1)
    assert complaint in run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize(
    ("change", "arguments", "complaint", "status"),
    [
        ({"INFERQ_API_KEY": "iq_wrong"}, ("status", "x"), "key", 1),
        ({"INFERQ_API_URL": "http://127.0.0.1:1"}, ("status", "x"), "127.0.0.1:1", 1),
        (
            {"INFERQ_AMQP_URL": "amqp://127.0.0.1:1"},
            ("topology", "check"),
            "127.0.0.1:1 cannot be reached",
            1,
        ),
        ({"INFERQ_AMQP_URL": "http://x"}, ("topology", "check"), "must start with amqp", EXIT_CONFIG),
        ({"INFERQ_AMQP_HEARTBEAT": "soon"}, ("topology", "check"), "INFERQ_AMQP_HEARTBEAT", EXIT_CONFIG),
        ({"INFERQ_STORE_URL": "ftp://x"}, ("worker", "echo"), "INFERQ_STORE_URL", EXIT_CONFIG),
    ],
)
def test_a_bad_setting_is_named(
    installation: dict[str, str],
    change: dict[str, str],
    arguments: tuple[str, ...],
    complaint: str,
    status: int,
) -> None:
    run = run_quickly(installation | change, *arguments)
    assert run.returncode == status
    assert complaint in run.stderr
    assert "Traceback" not in run.stderr


def test_keys_are_made_listed_and_removed(tmp_path: Path) -> None:
    file = str(tmp_path / "keys.json")
    key = inferq_here(dict(os.environ), "keys", "add", "acme", "--name", "ci", "--file", file).stdout.strip()
    assert key.startswith("iq_")
    assert key not in Path(file).read_text()
    listed = inferq_here(dict(os.environ), "keys", "list", "--file", file).stdout
    assert "acme" in listed
    key_id = listed.splitlines()[1].split()[0]
    assert inferq_here(dict(os.environ), "keys", "remove", key_id, "--file", file).returncode == 0
    assert KeyFile(Path(file)).tenant_of(key) is None


def test_every_setting_is_documented() -> None:
    documented = Path(__file__).parents[2] / "docs" / "settings.md"
    made = inferq(dict(os.environ), "settings", "--markdown").stdout  # tests define settings of their own
    assert made == documented.read_text("utf-8")
    rows = [line.split(" | ") for line in made.splitlines() if line.startswith("| `")]
    assert len(rows) > 40
    assert not [row[0] for row in rows if len(row[-1]) < 10]


def test_fifty_submissions_of_one_id_are_one_task(installation: dict[str, str]) -> None:
    task = {"task_type": "echo", "payload": "once", "delay": 0.2}
    headers = {"Authorization": f"Bearer {installation['INFERQ_API_KEY']}"}
    with httpx.Client(base_url=installation["INFERQ_API_URL"], headers=headers, timeout=30) as client:

        def put(_number: int) -> int:
            return client.put("/v1/tasks/fifty", json=task).status_code

        with ThreadPoolExecutor(50) as threads:
            assert set(threads.map(put, range(50))) <= {200, 202}
        result = answer(inferq_here(installation, "result", "fifty", "--wait", "20", "--json"))
        assert result["attempts"] == 1
        assert put(51) == 200
        assert client.get("/v1/tasks/fifty/result").json()["finished_at"] == result["finished_at"]


def test_a_command_loads_nothing_that_only_others_need() -> None:
    code = (
        "import sys; from inferq.producer.cli import app; "
        "app(['keys', '--help'], standalone_mode=False); print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "inferq.producer.gateway.keys" in loaded
    assert not loaded & {"celery", "inferq.consumers.worker.cli", "fastapi", "httpx", "pika"}


def test_a_mistyped_command_is_set_right(capfd: pytest.CaptureFixture[str]) -> None:
    assert "Did you mean 'submit'?" in inferq_here({}, "sumbit").stderr
