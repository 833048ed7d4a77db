"""A client that openapi-python-client generates from the gateway's own document, used against that gateway."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from inferq.storage.batches.store import output_key
from tests.gateway.conftest import Gateway
from tests.gateway.test_gateway_batches import ended, made
from tests.gateway.test_gateway_results import with_artifact

ROOT = Path(__file__).parents[2]
GENERATOR = ROOT / ".venv-client/bin/openapi-python-client"
PACKAGE = "generated_gateway_client"


@pytest.fixture(scope="module")
def document(shared_gateway: Gateway) -> dict[str, Any]:
    served: dict[str, Any] = shared_gateway.get_openly("/openapi.json").json()
    return served


@pytest.fixture(scope="module")
def package(document: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The generated package, which can be imported. A warning of the generator is an error."""
    if not GENERATOR.exists():
        pytest.fail("the generator is not installed; run: make .make/client")
    folder = tmp_path_factory.mktemp("generated")
    (folder / "openapi.json").write_text(json.dumps(document), "utf-8")
    config = (ROOT / "docs/openapi-python-client.yaml").read_text("utf-8")
    (folder / "config.yaml").write_text(f"{config}\npost_hooks: []\n", "utf-8")
    command = [str(GENERATOR), "generate", "--path", "openapi.json", "--config", "config.yaml"]
    run = subprocess.run(
        [*command, "--meta", "none", "--output-path", PACKAGE, "--fail-on-warning"],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield
    for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
        del sys.modules[name]


class Api:
    """The functions of the generated package, called with one client."""

    def __init__(self, document: dict[str, Any], url: str, key: str) -> None:
        client_class = import_module(f"{PACKAGE}.client").AuthenticatedClient
        self.models = import_module(f"{PACKAGE}.models")
        self.types = import_module(f"{PACKAGE}.types")
        self.client = client_class(url, token=key, raise_on_unexpected_status=True)
        self._document = document

    def __call__(self, function: str, *arguments: Any, **named: Any) -> tuple[int, Any]:
        """The status code, and the answer that the client parsed. The answer must have its documented form."""
        module = import_module(f"{PACKAGE}.api.{function}")
        response = module.sync_detailed(*arguments, client=self.client, **named)
        documented = self._documented(function, str(response.status_code.value))
        content_type = response.headers["content-type"].partition(";")[0]
        assert content_type in documented or "*/*" in documented, (function, content_type)
        if content_type in {"application/json", "application/problem+json"}:
            schema = documented[content_type]["schema"] | {"components": self._document["components"]}
            faults = Draft202012Validator(schema).iter_errors(json.loads(response.content))
            assert not [fault.message for fault in faults], (function, response.content)
        return response.status_code.value, response.parsed

    def _documented(self, function: str, code: str) -> dict[str, Any]:
        """The documented content of an operation's answer, by content type."""
        for tag, operation in operations_of(self._document):
            if function == f"{tag}.{operation['operationId']}":
                found: dict[str, Any] = (
                    operation["responses"].get(code) or operation["responses"][f"{code[0]}XX"]
                )
                if "$ref" in found:
                    found = self._document["components"]["responses"][found["$ref"].rpartition("/")[2]]
                content: dict[str, Any] = found["content"]
                return content
        raise AssertionError(f"the document has no {function}")

    def echo(self, **fields: Any) -> Any:
        return self.models.EchoTask(task_type="echo", **fields)


def operations_of(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each operation, with its tag."""
    for path in document["paths"].values():
        for operation in path.values():
            yield operation["tags"][0], operation


@pytest.fixture
def api(gateway: Gateway, document: dict[str, Any], package: None) -> Iterator[Api]:
    api = Api(document, gateway.url, gateway.key)
    with api.client:
        yield api


def test_no_operation_is_left_out(document: dict[str, Any], package: None) -> None:
    found = [f"{tag}.{operation['operationId']}" for tag, operation in operations_of(document)]
    assert "batches.post_batch" in found
    for operation in found:
        assert callable(import_module(f"{PACKAGE}.api.{operation}").sync_detailed), operation


def test_a_task_is_submitted_followed_and_read(gateway: Gateway, api: Api) -> None:
    models = api.models
    metadata = models.EchoTaskMetadata.from_dict({"a": 1})
    code, task = api("tasks.post_task", body=api.echo(payload={"n": 1}, metadata=metadata))
    assert (code, type(task), task.state) == (202, models.TaskAnswer, "queued")
    code, again = api("tasks.put_task", "mine", body=api.echo(payload="hello"))
    assert (code, again.task_id) == (202, "mine")
    code, problem = api("tasks.get_result", "mine", prefer="wait=0")
    assert (code, type(problem), problem.code, problem.state) == (409, models.Problem, "not_ended", "queued")

    gateway.end(gateway.task("mine", payload="hello"), output={"payload": "hello"})
    code, status = api("tasks.get_task", "mine")
    assert (code, status.state, status.progress) == (200, models.TaskAnswerState.SUCCEEDED, 1.0)
    code, result = api("tasks.get_result", "mine", prefer="wait=5")
    assert (code, type(result), result.task_type) == (200, models.Result, "echo")
    assert models.EchoOutput.from_dict(result.output).payload == "hello"
    code, page = api("tasks.list_tasks", limit=1)
    assert (code, [item.task_id for item in page.items]) == (200, ["mine"])
    code, page = api("tasks.list_tasks", cursor=page.cursor)
    assert (code, [item.task_id for item in page.items], page.cursor) == (200, [task.task_id], None)
    code, problem = api("tasks.cancel_task", "mine")
    assert (code, type(problem), problem.code) == (409, models.Problem, "already_ended")


def test_the_result_of_an_unreadable_message_is_read(gateway: Gateway, api: Api) -> None:
    task = gateway.task("unreadable", payload=1)
    gateway.end(task.model_copy(update={"task_type": ""}), "failed")
    code, result = api("tasks.get_result", "unreadable")
    assert (code, result.task_type, result.error.code) == (200, "", "broken")


def test_files_are_uploaded_and_downloaded(gateway: Gateway, api: Api, tmp_path: Path) -> None:
    file = api.types.File(BytesIO(b"\x00picture"), "a.png")
    code, uploaded = api("files.post_file", body=file, filename="a.png")
    assert (code, uploaded.bytes_, uploaded.content_type) == (201, 8, "image/png")
    code, form = api("files.post_file", body=api.models.PostFileFilesBody(file=file))
    assert (code, form.bytes_, form.sha256) == (201, 8, uploaded.sha256)
    code, task = api("tasks.post_task", body=api.models.OcrTask(task_type="ocr", image_url=uploaded.url))
    assert (code, task.task_type) == (202, "ocr")

    task = with_artifact(gateway, tmp_path, data=b"abc")
    code, artifact = api("files.get_artifact", task.task_id, "a.txt")
    assert (code, artifact.payload.read()) == (200, b"abc")


def test_batches_are_submitted_as_json_and_as_jsonl(gateway: Gateway, api: Api) -> None:
    models = api.models
    lines = b'{"task_type": "echo", "payload": 1}\n'
    _, uploaded = api("files.post_file", body=api.types.File(BytesIO(lines)), filename="in.jsonl")
    defaults = models.BatchDefaults.from_dict({"options": {}})
    body = models.Batch(source=uploaded.url, batch_id="one", task_type="echo", defaults=defaults)
    code, batch = api("batches.post_batch", body=body)
    assert (code, type(batch), batch.batch_id) == (202, models.BatchAnswer, "one")
    code, streamed = api(
        "batches.post_batch", body=api.types.File(BytesIO(lines)), spec='{"batch_id": "two"}'
    )
    assert (code, streamed.batch_id) == (202, "two")
    code, page = api("batches.list_batches")
    assert (code, {item.batch_id for item in page.items}) == (200, {"one", "two"})
    code, status = api("batches.cancel_batch", "one")
    assert (code, status.cancel_requested) == (202, True)
    code, problem = api("batches.get_output", "two")
    assert (code, type(problem), problem.code) == (409, models.Problem, "not_ended")

    made(gateway)
    gateway.store.put(output_key(gateway.tenant, "b"), BytesIO(b'{"task_id": "b.1"}\n'))
    ended(gateway)
    code, output = api("batches.get_output", "b")
    assert (code, output.payload.read()) == (200, b'{"task_id": "b.1"}\n')


def test_every_refusal_is_a_problem_that_names_its_reason(
    api: Api, document: dict[str, Any], gateway: Gateway
) -> None:
    models = api.models
    code, problem = api("tasks.get_task", "none")
    assert (code, type(problem), problem.code) == (404, models.Problem, "not_found")
    code, problem = api("tasks.post_task", body=api.echo(delay=-1))
    assert (code, problem.code, [fault.field for fault in problem.errors]) == (422, "invalid_task", ["delay"])
    body = models.Batch(source="s3://scans/in/")
    code, problem = api("batches.post_batch", body=body)
    assert (code, problem.code, [fault.field for fault in problem.errors]) == (
        422,
        "invalid_batch",
        ["task_type"],
    )
    code, problem = api("tasks.put_task", "a", body=api.echo(task_id="b"))
    assert (code, problem.code) == (422, "id_mismatch")
    with (stranger := Api(document, gateway.url, "iq_unknown")).client:
        code, problem = stranger("tasks.list_tasks")
    assert (code, problem.code) == (401, "unknown_api_key")


def test_the_health_pages_are_read(api: Api) -> None:
    assert api("health.healthz")[0] == 200
    code, readiness = api("health.readyz")
    assert (code, readiness.status, readiness.checks["broker"].ok) == (200, "ready", True)
    code, text = api("health.metrics")
    assert code == 200
    assert "inferq_http_requests_total" in text
