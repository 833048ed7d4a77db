"""Results: how a task ended, written once, with its artifacts beside it.

    tasks/<tenant>/<task_id>/result.json                  a success: the first writer wins
    tasks/<tenant>/<task_id>/failure.json                 a failure, until a success stands beside it
    tasks/<tenant>/<task_id>/artifacts/<attempt>/<name>   the files of one attempt
    tasks/<tenant>/<task_id>/callbacks/<id>.json          a callback that was given up (inferq.storage.callbacks)
    files/<tenant>/<file_id>                              an uploaded input
    cache/<tenant>/<key>.json                             which task has the result of work done before

Each attempt has a folder of artifacts of its own. Two runs of one task therefore never write to the same
key, and whichever result is kept names files that nobody else has touched.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from urllib.parse import quote, unquote

from pydantic import JsonValue, ValidationError

from inferq.schemas import Artifact, InferqError, InvalidTask, Result
from inferq.schemas.encoding import result_json
from inferq.schemas.result import OUTPUT_ARTIFACT
from inferq.storage.objects.store import ObjectNotFound, ObjectStore

_RESULT = "result.json"
_FAILURE = "failure.json"
_ARTIFACTS = "artifacts/"
_BEFORE_RECORDS = "f"
"""Sorts after every artifact and callback and before both records: one short listing finds them."""

_SAVE_TRIES = 5
_FILE_ID = re.compile(r"[A-Za-z0-9._-]{1,200}")
_TOKEN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")


class UnreadableResult(InferqError):
    """What stands where a result should be is not one."""

    code = "result_unreadable"


class ResultStore:
    """The results of all tasks in an object store. Every method may raise StoreOutage."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    def load(self, tenant: str, task_id: str) -> Result | None:
        """How the task ended: its success, else its failure, else None.

        One round trip where neither exists. Raises UnreadableResult.
        """
        place = folder(tenant, task_id)
        listing = self._store.list(place, start_after=place + _BEFORE_RECORDS)
        found = {info.key.removeprefix(place) for info in listing}
        for name in (_RESULT, _FAILURE):
            if name in found:
                return self._read(place + name)
        return None

    def save(self, result: Result, output: bytes | None = None) -> Result:
        """Record how a task ended, and give the record that is kept, which may be another's.

        `output` is the output as JSON text, where the result leaves it out; what is given back does, too.

        A success stands for ever. A failure or a cancellation stands until a success comes, or another
        one that was redriven more often; that of an unreadable message, which has no digest, until the task
        itself ends.
        """
        place = folder(result.tenant, result.task_id)
        data = result_json(result, output)
        if result.status == "succeeded":
            if self._create(place + _RESULT, data):
                return result
            return self._read(place + _RESULT)
        for _ in range(_SAVE_TRIES):
            kept = self.load(result.tenant, result.task_id)
            if kept is None:
                if self._create(place + _FAILURE, data):
                    return result
            elif kept.status == "succeeded" or (
                kept.redrives >= result.redrives and (kept.digest or not result.digest)
            ):
                return kept
            else:
                self._store.put(place + _FAILURE, data, content_type="application/json")
                # Another one may have replaced it at the same moment: what stands now is what counts.
                return self.load(result.tenant, result.task_id) or result
        raise UnreadableResult(
            f"{place}{_FAILURE} comes and goes: something else deletes it while it is saved"
        )

    def load_success(self, tenant: str, task_id: str) -> Result | None:
        """As `load`, and faster where the task has succeeded, as most have: one round trip."""
        try:
            return self._read(folder(tenant, task_id) + _RESULT)
        except ObjectNotFound:
            return self.load(tenant, task_id)

    def endings(self, tenant: str, prefix: str) -> Iterator[tuple[str, bool]]:
        """The ids, beginning with `prefix`, of tasks that have ended, and whether each has succeeded."""
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
        """The key of an artifact that the kept result names; `result` spares loading it.

        Raises ObjectNotFound where there is no result, or none of its artifacts has that name.
        """
        kept = result or self.load(tenant, task_id)
        for artifact in kept.artifacts if kept else ():
            if artifact.name == name:
                return _key(tenant, task_id, _attempt_of(artifact), name)
        raise ObjectNotFound(f"task {task_id!r} has no artifact {name!r}")

    def output(self, result: Result) -> JsonValue:
        """The output of a success, which is an artifact where it is large. Raises UnreadableResult."""
        if all(artifact.name != OUTPUT_ARTIFACT for artifact in result.artifacts):
            return result.output
        key = self.artifact_key(result.tenant, result.task_id, OUTPUT_ARTIFACT, result=result)
        try:
            output: JsonValue = json.loads(self._store.get(key))
        except (ObjectNotFound, ValueError) as error:
            raise UnreadableResult(f"{self._store.location(key)} is not the output that it was") from error
        return output

    def save_artifact(
        self,
        tenant: str,
        task_id: str,
        name: str,
        path: Path,
        content_type: str,
        *,
        attempt_token: str,
    ) -> Artifact:
        """Upload one file of an attempt. `attempt_token` is the attempt's own: no two runs share one."""
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        key = _key(tenant, task_id, attempt_token, name)
        info = self._store.put(key, path, content_type=content_type)
        return Artifact(
            name=name,
            url=self._store.location(key),
            content_type=content_type,
            bytes=info.bytes,
            sha256=sha256,
        )

    def discard(self, tenant: str, task_id: str, *, attempt_token: str) -> None:
        """Delete the artifacts of an attempt that lost; those that the kept result names stay."""
        kept = self.load(tenant, task_id)
        named = {_key(tenant, task_id, _attempt_of(a), a.name) for a in kept.artifacts} if kept else set()
        for info in self._store.list(_key(tenant, task_id, attempt_token, "")):
            if info.key not in named:
                self._store.delete(info.key)

    def _create(self, key: str, data: bytes) -> bool:
        return self._store.create(key, data, content_type="application/json")

    def _read(self, key: str) -> Result:
        try:
            return Result.model_validate_json(self._store.get(key))
        except ValidationError as error:
            raise UnreadableResult(
                f"{self._store.location(key)} is not a result that this version can read: {error}"
            ) from error


def folder(tenant: str, task_id: str) -> str:
    """The folder of a task in the store, with its closing slash; no name leads out of it."""
    return f"tasks/{segment(tenant)}/{segment(task_id)}/"


def upload_key(tenant: str, file_id: str) -> str:
    """The key of an uploaded file. Raises InvalidTask where `file_id` is not 1-200 of `A-Za-z0-9._-`."""
    if not _FILE_ID.fullmatch(file_id):
        raise InvalidTask(
            f"{file_id[:200]!r} is not the id of an uploaded file: use the URL that the upload answered",
            code="bad_input_url",
        )
    return f"files/{segment(tenant)}/{segment(file_id)}"


def cache_entry_key(tenant: str, key: str) -> str:
    """The key of an entry of the result cache; `key` is hexadecimal."""
    return f"cache/{segment(tenant)}/{key}.json"


def _key(tenant: str, task_id: str, attempt_token: str, name: str) -> str:
    if not _TOKEN.fullmatch(attempt_token):
        raise ValueError(f"attempt token {attempt_token!r} is not a plain name")
    return f"{folder(tenant, task_id)}{_ARTIFACTS}{attempt_token}/{name}"


def _attempt_of(artifact: Artifact) -> str:
    # The folder's name is the only part that the URL alone knows; a store may have moved since.
    return artifact.url.rsplit("/", 2)[-2]


@lru_cache(4096)
def segment(name: str) -> str:
    """A tenant or an id as one segment of a key; no name leads out of its folder."""
    if name in {".", ".."}:
        return name.replace(".", "%2E")
    return quote(name, safe=":", errors="surrogatepass")
