"""A loaded NER engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from inferq.consumers.engine import Context, InputFile
from inferq.consumers.ner import NerOutput, NerTask
from inferq.consumers.ner.engine import NerEngine
from inferq.consumers.ner.lac import LacBackend


@pytest.fixture(scope="session")
def engine() -> Iterator[NerEngine]:
    """LAC on the CPU, loaded once."""
    engine = NerEngine()
    engine.load()
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def lac(engine: NerEngine) -> LacBackend:
    assert isinstance(engine._backend, LacBackend)
    return engine._backend


@pytest.fixture
def make_context(tmp_path: Path) -> Callable[..., Context]:
    """A context, for an input file where there is one; `reports` collects the progress."""

    def make(
        path: Path | None = None,
        reports: list[tuple[float, str]] | None = None,
        abort: Callable[[], bool] = lambda: False,
    ) -> Context:
        collected = reports if reports is not None else []
        inputs = {"text_url": InputFile(path, path.stat().st_size, "text/plain")} if path else {}
        return Context(
            folder=tmp_path / "scratch",
            inputs=inputs,
            report=lambda fraction, note: collected.append((fraction, note)),
            abort_requested=abort,
        )

    return make


@pytest.fixture
def read(engine: NerEngine, make_context: Callable[..., Context]) -> Callable[..., NerOutput]:
    """Runs the engine on a task's fields, or on the content of a file."""

    def run(content: bytes | None = None, **fields: Any) -> NerOutput:
        context = make_context()
        if content is not None:
            path = context.scratch / "input"
            path.write_bytes(content)
            context, fields = make_context(path), {**fields, "text_url": "data:,x"}
        output = engine.run(ner_task(**fields), context)
        check(output, content.decode() if content is not None else fields.get("text") or fields["texts"])
        return output

    return run


def ner_task(**fields: Any) -> NerTask:
    return NerTask.model_validate({"task_id": "t", "task_type": "ner", **fields})


def check(output: NerOutput, given: str | list[str]) -> None:
    """What holds for every output: offsets, order, and no overlap."""
    texts = [given] if isinstance(given, str) else given
    assert len(output.texts) == len(texts)
    for text, found in zip(texts, output.texts, strict=True):
        assert found.characters == len(text)
        end = 0
        for entity in found.entities:
            assert text[entity.start : entity.end] == entity.text
            assert end <= entity.start < entity.end
            assert entity.text.strip()
            end = entity.end


def named(output: NerOutput) -> list[tuple[str, str]]:
    """The entities of the first text, as (type, text)."""
    return [(entity.type, entity.text) for entity in output.texts[0].entities]
