"""An application with modules named like inferq's rooms, and like its libraries, works with inferq beside them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from inferq.producer.up.folder import DataFolder
from tests.packaging.wheel import ROOMS

INFERQ = str(Path(sys.executable).with_name("inferq"))
APP = """
import json, sys
import broker, consumers, producer, schemas, storage
from inferq import Client, InferqError

with Client() as client:
    task = client.submit("echo", payload="hello", wait=60)
    result = client.result(task.task_id)
print(json.dumps({"output": result.output, "own": [broker.OWN, consumers.OWN, schemas.OWN, storage.OWN]}))
"""


@pytest.fixture
def app(tmp_path: Path) -> Path:
    """A user's application: five modules and packages of inferq's rooms' names, and a script that uses inferq."""
    folder = tmp_path / "app"
    folder.mkdir()
    for name in ("schemas", "broker", "producer"):
        (folder / f"{name}.py").write_text("OWN = True\n")
    for name in ("storage", "consumers"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("OWN = True\n")
    # A library's name in the working directory ended `python -m` of ours as well.
    (folder / "redis.py").write_text("raise SystemExit('the redis.py of the application was imported')\n")
    (folder / "app.py").write_text(APP)
    return folder


@pytest.fixture
def up(app: Path, tmp_path: Path, fresh_amqp_url: str, redis_url: str) -> Iterator[dict[str, str]]:
    """`inferq up` with one worker, started in the application's folder; gives the environment of other shells."""
    data = tmp_path / "data"
    services = os.environ | {"INFERQ_AMQP_URL": fresh_amqp_url, "INFERQ_REDIS_URL": redis_url}
    command = [INFERQ, "up", "--data", str(data), "--port", "0", "--types", "echo", "--detach"]
    try:
        started = subprocess.run(command, cwd=app, env=services, capture_output=True, text=True, timeout=90)
        assert started.returncode == 0, started.stdout + started.stderr
        yield os.environ | DataFolder(data).kept_env()
    finally:
        subprocess.run([INFERQ, "down", "--data", str(data)], cwd=app, capture_output=True, timeout=90)


def test_client_gateway_and_worker_share_a_folder_with_modules_of_the_same_names(
    app: Path, up: dict[str, str]
) -> None:
    (app / "redis.py").unlink()  # the script itself imports its own one, as it should
    said = subprocess.run(
        [sys.executable, "app.py"], cwd=app, env=up, capture_output=True, text=True, timeout=90
    )
    assert said.returncode == 0, said.stderr
    assert json.loads(said.stdout) == {"output": {"payload": "hello"}, "own": [True] * 4}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_cannot_be_imported_as_a_second_copy(room: str) -> None:
    script = f"import inferq, {room}"
    root = Path(__file__).parents[2]
    said = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True)
    assert said.returncode == 1
    assert f"ImportError: import inferq.{room} instead of {room}" in said.stderr
