"""A task type in a distribution of its own is installed, and nothing else is touched."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from inferq.schemas import installed_types
from inferq.schemas.errors import EXIT_CONFIG
from tests.conftest import RabbitMQ
from tests.installation import inferq, installation

EXAMPLE = Path(__file__).parents[2] / "examples" / "sentiment"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that pip installed the example into, from a copy: building leaves files beside the sources."""
    folder = tmp_path_factory.mktemp("sentiment")
    shutil.copytree(EXAMPLE, folder / "source", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    subprocess.run(
        [
            sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation",
            "--disable-pip-version-check", "--target", str(folder / "site"), str(folder / "source"),
        ],
        check=True,
    )  # fmt: skip
    return folder / "site"


@pytest.fixture(scope="module")
def installed(
    site: Path, shared_rabbitmq: RabbitMQ, redis_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, str]]:
    """A gateway and `inferq worker sentiment`, with the example installed."""
    folder = tmp_path_factory.mktemp("plugged-in")
    with installation(shared_rabbitmq, redis_url, folder, "sentiment", PYTHONPATH=str(site)) as env:
        yield env


@pytest.fixture
def http(installed: dict[str, str]) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {installed['INFERQ_API_KEY']}", "Prefer": "wait=60"}
    with httpx.Client(base_url=installed["INFERQ_API_URL"], headers=headers, timeout=30) as client:
        yield client


def publish(folder: Path, env: dict[str, str], *more: str) -> dict[str, Any]:
    subprocess.run(
        [sys.executable, "-P", "-m", "inferq.schemas.publish", str(folder), *more], env=env, check=True
    )
    return {path.name: json.loads(path.read_text("utf-8")) for path in folder.iterdir()}


def test_its_schemas_are_published_with_the_others(site: Path, tmp_path: Path) -> None:
    env = os.environ | {"PYTHONPATH": str(site)}
    published = publish(tmp_path, env, "--all")
    assert published["task.sentiment.schema.json"]["properties"]["text"]["maxLength"] == 20_000
    assert set(published["output.sentiment.schema.json"]["properties"]) == {"label", "score", "words"}
    assert published["asyncapi.json"]["channels"]["sentiment"]["address"] == "task_type.sentiment.{priority}"
    assert "task.echo.schema.json" in published
    # inferq's own documents stay what they are, whatever is installed beside it.
    own = publish(tmp_path, env)
    assert own == publish(tmp_path, dict(os.environ))
    assert "task.sentiment.schema.json" not in own


def test_the_gateway_describes_it(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()
    assert document["components"]["schemas"]["AnyTask"]["discriminator"]["mapping"]["sentiment"].endswith(
        "/SentimentTask"
    )
    assert "neutral_below" in document["components"]["schemas"]["SentimentOptions"]["properties"]


def test_the_command_line_submits_to_it(installed: dict[str, str]) -> None:
    texts = ("I love it", "这家餐厅太吵，菜也不好吃", "It is a table")
    run = inferq(installed, "submit", "sentiment", *texts, "--wait", "--json")
    assert run.returncode == 0, run.stderr
    results = json.loads(run.stdout)
    assert [result["output"]["label"] for result in results] == ["positive", "negative", "neutral"]
    assert results[0]["engine"]["name"] == "lexicon"


def test_an_option_reaches_it(installed: dict[str, str]) -> None:
    text = "Great food; slow, rude service"
    for threshold, label in (("0.2", "negative"), ("0.5", "neutral")):
        option = ("--set", f"neutral_below={threshold}")
        run = inferq(installed, "submit", "sentiment", text, *option, "--wait", "--json")
        assert json.loads(run.stdout)[0]["output"]["label"] == label


def test_http_submits_to_it(http: httpx.Client) -> None:
    answer = http.put("/v1/tasks/review-1", json={"task_type": "sentiment", "text": "这家餐厅不错"})
    assert answer.is_success, answer.text
    output = http.get("/v1/tasks/review-1/result").json()["output"]
    assert output == {"label": "positive", "score": 1.0, "words": 1}


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"text": ""}, "text: string should have at least 1 character"),
        ({"text": "x" * 20_001}, "text: string should have at most 20000 characters"),
        ({}, "text: is missing"),
        ({"text": "fine", "options": {"neutral": 1}}, "options.neutral: is unknown"),
        ({"text": "fine", "options": {"neutral_below": 2}}, "options.neutral_below: input should be less"),
    ],
)
def test_bad_input_is_refused_by_name(http: httpx.Client, fields: dict[str, Any], complaint: str) -> None:
    answer = http.post("/v1/tasks", json={"task_type": "sentiment", **fields})
    assert answer.status_code in {400, 422}
    assert complaint in answer.json()["detail"]


def test_what_only_the_engine_can_refuse_fails_at_once_and_says_why(installed: dict[str, str]) -> None:
    run = inferq(installed, "submit", "sentiment", "12:30 ?!", "--wait", "--json")
    assert run.returncode == 1
    (result,) = json.loads(run.stdout)
    assert (result["error"]["code"], result["attempts"]) == ("no_words", 1)
    assert "send a text in English or Chinese" in result["error"]["message"]


def test_its_setting_is_listed_but_not_in_the_page_of_inferq(site: Path) -> None:
    env = os.environ | {"PYTHONPATH": str(site), "COLUMNS": "200"}
    assert "INFERQ_SENTIMENT_LEXICON" in inferq(env, "settings").stdout
    assert (
        inferq(env, "settings", "--markdown").stdout
        == inferq(dict(os.environ), "settings", "--markdown").stdout
    )


def test_a_wrong_setting_ends_the_worker_with_one_line(installed: dict[str, str], tmp_path: Path) -> None:
    lexicon = tmp_path / "words.txt"
    run = inferq(installed | {"INFERQ_SENTIMENT_LEXICON": str(lexicon)}, "worker", "sentiment")
    assert run.returncode == 1
    assert f"INFERQ_SENTIMENT_LEXICON={lexicon} cannot be read" in run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.skipif("sentiment" in installed_types(), reason="the example is installed here, too")
def test_without_it_the_type_is_unknown(installed: dict[str, str]) -> None:
    run = inferq(installed | {"PYTHONPATH": ""}, "worker", "sentiment")
    assert run.returncode == EXIT_CONFIG
    assert "'sentiment' is not known here; known are:" in run.stderr


def test_its_own_tests_pass_with_the_contract_among_them(site: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(site.parent / "source")],
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"[1-9][0-9]+ passed", run.stdout)


def test_the_guide_quotes_the_code_as_it_stands() -> None:
    guide = (EXAMPLE / "README.md").read_text("utf-8")
    sources = [path.read_text("utf-8") for path in EXAMPLE.rglob("*") if path.suffix in {".py", ".toml"}]
    quotes = re.findall(r"```(?:python|toml)\n(.*?)```", guide, re.DOTALL)
    assert len(quotes) == 5
    assert not [quote for quote in quotes if not any(quote in source for source in sources)]
