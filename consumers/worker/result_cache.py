"""The result cache answers a task that was computed before without its engine.

A success leaves `cache/<tenant>/<key>.json` in the object store, which names the task that has the result. The
key is a digest of everything that determines an output. An entry is only a hint: if the result or one of its
artifacts is gone, the task is computed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from contextlib import closing
from importlib import metadata
from pathlib import Path

from pydantic import AwareDatetime, BaseModel, ConfigDict, JsonValue, ValidationError

from inferq.consumers.runtime.messages import Done, FileRef
from inferq.schemas import Artifact, EngineInfo, Result, Settings, Task, TaskId, TaskType
from inferq.storage import ObjectNotFound, ObjectStore, ResultStore, UnreadableResult, cache_entry_key

_FORM = 2
"""Part of each key, so that a change in how keys or entries are made finds no old ones."""

_NO_MATTER = {"gpu_memory_fraction"}
"""Settings that never change an output."""

_NUMBER = re.compile(r":\d+")

_log = logging.getLogger(__name__)


class Entry(BaseModel):
    """A cache entry: which of the tenant's tasks has the result, and which of its results."""

    model_config = ConfigDict(frozen=True)

    task_id: TaskId
    digest: str | None
    finished_at: AwareDatetime

    @classmethod
    def of(cls, result: Result) -> Entry:
        return cls(task_id=result.task_id, digest=result.digest, finished_at=result.finished_at)


class ResultCache:
    """The cache of a worker for one task type. Its calls may raise StoreOutage."""

    def __init__(self, task_type: TaskType, store: ObjectStore, results: ResultStore) -> None:
        self._task_type = task_type
        self._version = _version(task_type.distribution)
        self._settings = task_type.settings.load() if task_type.settings is not None else None
        self._unpinned = unpinned(self._settings)
        if self._unpinned:
            _log.warning(
                "the result cache stays off: the content of %s is not pinned by a version",
                ", ".join(self._unpinned),
            )
        self._store = store
        self._results = results

    def may_have(self, task: Task) -> bool:
        """Whether the task's result can be reused."""
        return not self._unpinned and self._task_type.cacheable(task)

    def key(self, task: Task, inputs: Mapping[str, FileRef], engine: EngineInfo) -> str | None:
        """The key of a task with its inputs fetched; None if its result cannot be reused."""
        if not self.may_have(task):
            return None
        contents = {name: [note.sha256, note.content_type] for name, note in inputs.items()}
        return result_key(task, contents, engine, self._settings, self._version)

    def find(self, tenant: str, key: str, scratch: Path) -> Done | None:
        """The answer of an earlier task, its artifacts copied to `scratch`; None if there is none.

        A miss costs one round trip, a hit three, and one more for each artifact.
        """
        result = self._known(tenant, key)
        if result is None:
            return None
        notes = {}
        for number, artifact in enumerate(result.artifacts):
            scratch.mkdir(parents=True, exist_ok=True)
            path = scratch / f"cached-{number}"
            if not self._copy(result, artifact, path):
                return None
            notes[artifact.name] = FileRef(
                path=path, content_type=artifact.content_type, bytes=artifact.bytes
            )
        return Done(output=_compact(result.output), artifacts=notes, seconds=0.0)

    def keep(self, result: Result, key: str) -> None:
        """Make this success the answer to `key`, in place of an earlier one."""
        entry = Entry.of(result).model_dump_json().encode()
        self._store.put(cache_entry_key(result.tenant, key), entry, content_type="application/json")

    def _known(self, tenant: str, key: str) -> Result | None:
        try:
            entry = Entry.model_validate_json(self._store.get(cache_entry_key(tenant, key)))
            result = self._results.load(tenant, entry.task_id)
        except (ObjectNotFound, UnreadableResult, ValidationError):
            return None
        if result is None or result.status != "succeeded" or result.task_type != self._task_type.name:
            return None
        # After a result is deleted, its id may be used again for another task.
        return result if Entry.of(result) == entry else None

    def _copy(self, result: Result, artifact: Artifact, path: Path) -> bool:
        """Copy the artifact to `path`. False if it is gone or changed."""
        digest = hashlib.sha256()
        key = self._results.artifact_key(result.tenant, result.task_id, artifact.name, result=result)
        try:
            pieces = self._store.stream(key)
        except ObjectNotFound:
            return False
        with closing(pieces), path.open("wb") as file:
            for piece in pieces:
                digest.update(piece)
                file.write(piece)
        return digest.hexdigest() == artifact.sha256


def _compact(output: JsonValue) -> bytes | None:
    return None if output is None else json.dumps(output, ensure_ascii=False, separators=(",", ":")).encode()


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution) if distribution else ""
    except metadata.PackageNotFoundError:
        return ""


def unpinned(settings: Settings | None) -> list[str]:
    """The settings that name a file or folder whose content may change, unlike that of `weights:NAME`."""
    if settings is None:
        return []
    prefix = str(type(settings).model_config.get("env_prefix", ""))
    return [
        f"{prefix}{name}".upper()
        for name, value in settings
        if isinstance(value, Path) and not str(value).startswith("weights:")
    ]


def result_key(
    task: Task,
    contents: Mapping[str, list[str | None]],
    engine: EngineInfo,
    settings: Settings | None,
    version: str,
) -> str:
    """SHA-256 (hex) of everything that determines a task's output.

    That is its type and the type's own fields, the options with their defaults, and the inputs' `contents`
    (SHA-256 and content type by field) instead of their URLs. Also the engine's name, version, model, named
    weights, kind of device, precision and settings, and the `version` of the type's distribution.
    """
    own = set(type(task).model_fields) - set(Task.model_fields) - set(contents)
    said: dict[str, JsonValue] = {
        "form": _FORM,
        "task_type": task.task_type,
        "inline": task.model_dump(mode="json", include=own),
        "options": task.options.model_dump(mode="json"),
        "inputs": {name: list(content) for name, content in contents.items()},
        "version": version,
        # All GPUs of a machine compute the same output; a CPU may not.
        "engine": [
            engine.name,
            engine.version,
            engine.model,
            _NUMBER.sub("", engine.device),
            engine.precision,
        ],
        "weights": list(engine.weights),
        "settings": settings.model_dump(mode="json", exclude=_NO_MATTER) if settings is not None else None,
    }
    canonical = json.dumps(said, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()
