"""Results: how a task ended, written once, with its artifacts.

    tasks/<tenant>/<task_id>/result.json                  a success: the first writer wins
    tasks/<tenant>/<task_id>/failure.json                 a failure, superseded by a success
    tasks/<tenant>/<task_id>/artifacts/<run>/<name>       the files of one run
    tasks/<tenant>/<task_id>/callbacks/<id>.json          a failed callback (inferq.storage.callbacks)
    files/<tenant>/<file_id>                              an uploaded input
    cache/<tenant>/<key>.json                             the task whose result is reused

Each run has its own folder of artifacts. Two runs of one task never write to the same key, and the result that
is kept names files that no other run has written.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote, unquote

from pydantic import JsonValue, ValidationError

from inferq.schemas import Artifact, InferqError, InvalidTask, Result, describe_faults
from inferq.schemas.encoding import result_json
from inferq.schemas.result import OUTPUT_ARTIFACT
from inferq.storage.objects.store import ObjectInfo, ObjectNotFound, ObjectStore, vanished

T = TypeVar("T")

_RESULT = "result.json"
_FAILURE = "failure.json"
_ARTIFACTS = "artifacts/"
_BEFORE_RECORDS = "f"
"""Sorts after every artifact and callback and before both records: one short listing finds them."""

_SAVE_TRIES = 5
_FILE_ID = re.compile(r"[A-Za-z0-9._-]{1,200}")
_TOKEN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")


class UnreadableResult(InferqError):
    """A result or failure record cannot be read."""

    code = "result_unreadable"


class ResultStore:
    """The results of all tasks in an object store. Every method may raise StoreOutage."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    def load(self, tenant: str, task_id: str) -> Result | None:
        """How the task ended: its success, else its failure, else None.

        One round trip if neither exists. Raises UnreadableResult.
        """
        found = self._find(tenant, task_id)
        return None if found is None else self._parse(*found)

    def load_many(self, tasks: Sequence[tuple[str, str]]) -> list[Result | UnreadableResult | None]:
        """What `load` gives for each tenant and task id, in their order; UnreadableResult takes a record's place."""
        calls = [partial(_or_unreadable, partial(self.load, *task)) for task in tasks]
        return list(self._store.side_by_side(calls))

    def records(self, tenant: str, task_id: str) -> Iterator[ObjectInfo]:
        """The task's failure and its success, as far as they exist; the last one counts."""
        place = folder(tenant, task_id)
        return self._store.list(place, start_after=place + _BEFORE_RECORDS)

    def save(self, result: Result, output: bytes | None = None) -> Result:
        """Record how a task ended; return the record that is kept: `result` itself, or an earlier one.

        `output` is the output as JSON text, if the result leaves it out; the returned result then lacks it, too.
        A repeated call finds the record of the first one, whose reply may have been lost, and returns `result`.

        Nothing supersedes a success. A success supersedes a failure or a cancellation, and so does one of a later
        redrive. The failure of an unreadable message has no digest; any end of the task itself supersedes it.
        """
        place = folder(result.tenant, result.task_id)
        data = result_json(result, output)
        if result.status == "succeeded":
            if self._create(place + _RESULT, data):
                return result
            return self._own_or_parsed(result, data, place + _RESULT, self._get_known(place + _RESULT))
        for _ in range(_SAVE_TRIES):
            found = self._find(result.tenant, result.task_id)
            if found is None:
                if self._create(place + _FAILURE, data):
                    return result
                continue
            kept = self._own_or_parsed(result, data, *found)
            if kept.status == "succeeded" or (
                kept.redrives >= result.redrives and (kept.digest or not result.digest)
            ):
                return kept
            self._store.put(place + _FAILURE, data, content_type="application/json")
            # Another run may have replaced it at the same moment: the current record counts.
            found = self._find(result.tenant, result.task_id)
            return result if found is None else self._own_or_parsed(result, data, *found)
        raise UnreadableResult(f"{place}{_FAILURE} cannot be saved: another program deletes it meanwhile")

    def save_many(self, ends: Sequence[tuple[Result, bytes | None]]) -> list[Result | UnreadableResult]:
        """What `save` gives for each result and its output, in their order; UnreadableResult takes a record's place.

        It leaves what saving them one after the other leaves, in less time: they are made durable together. If one
        fails for another reason, this raises its error. Each of the others may have been saved or not; repeat the
        call.
        """
        of_task: dict[str, list[int]] = {}
        for number, (result, _) in enumerate(ends):
            of_task.setdefault(folder(result.tenant, result.task_id), []).append(number)
        # A success needs no look at earlier records. Further ends of its task come after it.
        first = {
            numbers[0]: (place + _RESULT, result_json(*ends[numbers[0]]))
            for place, numbers in of_task.items()
            if ends[numbers[0]][0].status == "succeeded"
        }
        created = self._store.create_many(list(first.values()), content_type="application/json")
        kept: dict[int, Result | UnreadableResult] = {
            number: ends[number][0] for number, is_new in zip(first, created, strict=True) if is_new
        }

        def save_others(numbers: Sequence[int]) -> None:
            for number in numbers:
                if number not in kept:
                    kept[number] = _or_unreadable(partial(self.save, *ends[number]))

        left = [numbers for numbers in of_task.values() if not kept.keys() >= set(numbers)]
        self._store.side_by_side([partial(save_others, numbers) for numbers in left])
        return [kept[number] for number in range(len(ends))]

    def load_success(self, tenant: str, task_id: str) -> Result | None:
        """Like `load`, but a success, the usual case, needs only one round trip."""
        try:
            key = folder(tenant, task_id) + _RESULT
            return self._parse(key, self._store.get(key))
        except ObjectNotFound:
            return self.load(tenant, task_id)

    def endings(self, tenant: str, prefix: str) -> Iterator[tuple[str, bool]]:
        """The ids of ended tasks that begin with `prefix`, and whether each succeeded."""
        base = f"tasks/{segment(tenant)}/"
        failed = ""
        for info in self._store.list(base + segment(prefix)):
            task_id, _, name = info.key.removeprefix(base).partition("/")
            if failed and failed != task_id:
                yield unquote(failed), False
            if name == _RESULT:
                yield unquote(task_id), True
            failed = task_id if name == _FAILURE else ""
        if failed:
            yield unquote(failed), False

    def artifact_key(self, tenant: str, task_id: str, name: str, *, result: Result | None = None) -> str:
        """The key of an artifact of the kept result. `result` avoids loading it.

        Raises ObjectNotFound if there is no result, or no artifact of that name.
        """
        kept = result or self.load(tenant, task_id)
        for artifact in kept.artifacts if kept else ():
            if artifact.name == name:
                return _key(tenant, task_id, _run_of(artifact), name)
        raise ObjectNotFound(f"task {task_id!r} has no artifact {name!r}")

    def output(self, result: Result) -> JsonValue:
        """The output of a success; a large one is an artifact. Raises UnreadableResult."""
        if all(artifact.name != OUTPUT_ARTIFACT for artifact in result.artifacts):
            return result.output
        key = self.artifact_key(result.tenant, result.task_id, OUTPUT_ARTIFACT, result=result)
        try:
            output: JsonValue = json.loads(self._store.get(key))
        except (ObjectNotFound, ValueError) as error:
            raise UnreadableResult(
                f"the output {self._store.location(key)} is missing or not JSON"
            ) from error
        return output

    def save_artifact(
        self,
        tenant: str,
        task_id: str,
        name: str,
        path: Path,
        content_type: str,
        *,
        run: str,
    ) -> Artifact:
        """Upload one file of a run; `run` is its token."""
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        key = _key(tenant, task_id, run, name)
        info = self._store.put(key, path, content_type=content_type)
        return Artifact(
            name=name,
            url=self._store.location(key),
            content_type=content_type,
            bytes=info.bytes,
            sha256=sha256,
        )

    def discard(self, tenant: str, task_id: str, *, run: str) -> None:
        """Delete the artifacts of a run, except those that the kept result names."""
        kept = self.load(tenant, task_id)
        named = {_key(tenant, task_id, _run_of(a), a.name) for a in kept.artifacts} if kept else set()
        for info in self._store.list(_key(tenant, task_id, run, "")):
            if info.key not in named:
                self._store.delete(info.key)

    def _create(self, key: str, data: bytes) -> bool:
        return self._store.create(key, data, content_type="application/json")

    def _find(self, tenant: str, task_id: str) -> tuple[str, bytes] | None:
        """The key of the record that counts, and the record."""
        place = folder(tenant, task_id)
        found = {info.key.removeprefix(place) for info in self.records(tenant, task_id)}
        for name in (_RESULT, _FAILURE):
            if name in found:
                return place + name, self._get_known(place + name)
        return None

    def _get_known(self, key: str) -> bytes:
        try:
            return self._store.get(key)
        except ObjectNotFound as error:
            raise vanished(self._store, key) from error

    def _own_or_parsed(self, result: Result, data: bytes, key: str, record: bytes) -> Result:
        """`result` if the record is its `data`, else the result that the record has."""
        return result if record == data else self._parse(key, record)

    def _parse(self, key: str, record: bytes) -> Result:
        try:
            return Result.model_validate_json(record)
        except ValidationError as error:
            raise UnreadableResult(
                f"this version cannot read the result {self._store.location(key)}: "
                + "; ".join(describe_faults(error)[:3])
            ) from error


def _or_unreadable(call: Callable[[], T]) -> T | UnreadableResult:
    try:
        return call()
    except UnreadableResult as error:
        return error


def folder(tenant: str, task_id: str) -> str:
    """The folder of a task in the store, with a trailing slash. No id can leave it."""
    return f"tasks/{segment(tenant)}/{segment(task_id)}/"


def upload_key(tenant: str, file_id: str) -> str:
    """The key of an uploaded file. Raises InvalidTask unless `file_id` is 1-200 of `A-Za-z0-9._-`."""
    if not _FILE_ID.fullmatch(file_id):
        raise InvalidTask(
            f"{file_id[:200]!r} is not the id of an uploaded file: use the URL that the upload returned",
            code="bad_input_url",
        )
    return f"files/{segment(tenant)}/{segment(file_id)}"


def cache_entry_key(tenant: str, key: str) -> str:
    """The key of an entry of the result cache; `key` is hexadecimal."""
    return f"cache/{segment(tenant)}/{key}.json"


def _key(tenant: str, task_id: str, run: str, name: str) -> str:
    if not _TOKEN.fullmatch(run):
        raise ValueError(f"run token {run!r} is not a plain name")
    return f"{folder(tenant, task_id)}{_ARTIFACTS}{run}/{name}"


def _run_of(artifact: Artifact) -> str:
    # Only the URL has it. The rest of it may be outdated if the store has moved.
    return artifact.url.rsplit("/", 2)[-2]


@lru_cache(4096)
def segment(name: str) -> str:
    """A tenant or an id as one segment of a key. No name can leave its folder."""
    if name in {".", ".."}:
        return name.replace(".", "%2E")
    return quote(name, safe=":", errors="surrogatepass")
