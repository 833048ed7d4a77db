"""The NER engine: texts in, entities out, with any of the models."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from inferq.consumers.ner import Entity, NerOutput, NerTask, TextEntities
from inferq.consumers.ner.backend import Backend, Span
from inferq.consumers.ner.folding import fold
from inferq.consumers.ner.reading import iso_dates, reading
from inferq.consumers.ner.segments import segments
from inferq.consumers.ner.settings import NerSettings
from inferq.consumers.ner.terms import Dictionary
from inferq.consumers.ner.texts import check_length, read_text
from inferq.consumers.weights.cache import model_folder
from inferq.engine import Context, Engine
from inferq.schemas import EngineInfo, InstallationError

_BATCH_CHARACTERS = 8192
"""The most characters in one batch. It bounds memory, and a run can stop only between two batches."""

_ZEROS = {"○", "◯"}
"""Circles that people write instead of 〇 (zero)."""

_PARTS_OF_ONE = {"LOC", "TIME"}
"""Types whose adjacent spans are joined: models sometimes split addresses and dates."""


@dataclass(frozen=True)
class _Piece:
    """A piece of a text; `text` is the text's number."""

    text: int
    start: int
    end: int


class NerEngine(Engine[NerTask]):
    """Reads texts sentence by sentence, many sentences at a time."""

    def __init__(self, settings: NerSettings | None = None, *, backend: Backend | None = None) -> None:
        """`settings` default to the environment's. `backend`: a loaded one; else `load` loads it."""
        self._settings = settings or NerSettings.load()
        self._loaded = backend

    def load(self) -> EngineInfo:
        """Load the model that INFERQ_NER_BACKEND names onto the device that INFERQ_DEVICE names."""
        self._loaded = load_backend(self._settings)
        return self._loaded.info

    def warm_up(self) -> None:
        """Read generated sentences: libraries choose kernels and allocate memory on the first ones."""
        sentence = "王小明今天上午在北京大学参加了会议。"
        self._backend.read([sentence])
        self._backend.read([sentence] * min(self._settings.ner_batch_size, 8))

    def run(self, task: NerTask, context: Context) -> NerOutput:
        """Read the text or the texts of a task."""
        texts = self._texts(task, context)
        readings = [reading(text) for text in texts]
        found = self._read([read.text for read in readings], context)
        dictionary = Dictionary(task.options.dictionary)
        outputs = []
        for text, read, spans in zip(texts, readings, found, strict=True):
            context.check_abort()
            terms = dictionary.find(read.text, context.check_abort)
            names = _prefer(terms, _prefer(iso_dates(read.text), _join(spans)))
            outputs.append(_entities(text, [read.original(span) for span in names]))
        context.progress(1.0, "read")
        return NerOutput(model=self._backend.info.model, texts=tuple(outputs))

    def close(self) -> None:
        self._loaded = None

    @property
    def _backend(self) -> Backend:
        if self._loaded is None:
            raise RuntimeError("the NER engine is not loaded: call load() first")
        return self._loaded

    def _texts(self, task: NerTask, context: Context) -> Sequence[str]:
        limit = self._settings.ner_max_characters
        if task.text_url is not None:
            text = read_text(context.inputs["text_url"].path, limit)
            check_length(text, limit, "the file at text_url")
            return [text]
        if task.text is not None:
            check_length(task.text, limit, "text")
            return [task.text]
        texts = task.texts or ()
        for number, text in enumerate(texts):
            check_length(text, limit, f"texts[{number}]")
        return texts

    def _read(self, texts: Sequence[str], context: Context) -> list[list[Span]]:
        """The model's spans in each text, in order, without invisible characters at their edges."""
        pieces = [
            _Piece(number, start, end)
            for number, text in enumerate(texts)
            for start, end in segments(text, self._backend.window)
        ]
        characters = sum(piece.end - piece.start for piece in pieces)
        done = 0
        found: list[list[Span]] = [[] for _ in texts]
        for batch in _batches(pieces, self._settings.ner_batch_size):
            context.check_abort()
            context.progress(done / characters, f"{done} of {characters} characters")
            read = self._backend.read([texts[piece.text][piece.start : piece.end] for piece in batch])
            for piece, spans in zip(batch, read, strict=True):
                for span in spans:
                    moved = replace(span, start=piece.start + span.start, end=piece.start + span.end)
                    if (trimmed := _trim(texts[piece.text], moved)) is not None:
                        found[piece.text].append(trimmed)
            done += sum(piece.end - piece.start for piece in batch)
        return [sorted(spans, key=lambda span: span.start) for spans in found]


def load_backend(settings: NerSettings) -> Backend:
    """The backend that the settings name, with its model loaded.

    Raises InstallationError if the library, its weights or the device is missing; it never falls back to
    another one.
    """
    device = settings.device
    if settings.ner_device == "cpu" or (settings.ner_device == "gpu" and device == "cpu"):
        device = settings.ner_device
    settings.pick_precision(["fp32"], f"NER with {settings.ner_backend}")
    if settings.ner_backend == "paddlenlp":
        from inferq.consumers.ner.taskflow import TaskflowBackend

        return TaskflowBackend(
            mode=settings.ner_mode,
            device=device,
            batch_size=settings.ner_batch_size,
            threads=len(os.sched_getaffinity(0)),
            model_dir=settings.ner_model_dir and model_folder(settings.ner_model_dir),
            gpu_memory_fraction=settings.gpu_memory_fraction,
        )
    if device != "cpu":
        raise InstallationError(
            f"NER is set to run on {device}, but the backend lac computes on the CPU only: set "
            "INFERQ_NER_BACKEND=paddlenlp, or INFERQ_NER_DEVICE=cpu",
            code="device_unavailable",
        )
    from inferq.consumers.ner.lac import LacBackend

    return LacBackend()


def _batches(pieces: list[_Piece], most: int) -> Iterator[list[_Piece]]:
    """Batches of pieces of similar length, so that padding to the longest one costs little."""
    batch: list[_Piece] = []
    for piece in sorted(pieces, key=lambda piece: piece.start - piece.end):
        longest = batch[0].end - batch[0].start if batch else 0
        if batch and (len(batch) == most or (len(batch) + 1) * longest > _BATCH_CHARACTERS):
            yield batch
            batch = []
        batch.append(piece)
    if batch:
        yield batch


def _trim(text: str, span: Span) -> Span | None:
    """The span without symbols and invisible characters at its edges; None if it then has no letter and no digit."""
    start, end = span.start, span.end
    while start < end and not _belongs(text[start]):
        start += 1
    while end > start and not _belongs(text[end - 1]):
        end -= 1
    if not any(character.isalnum() for character in text[start:end]):
        return None
    return replace(span, start=start, end=end)


def _belongs(character: str) -> bool:
    """Whether a name may begin or end with the character: no emoji, no dot between names, no selector of a form."""
    if character in _ZEROS:
        return True
    return (
        character.isprintable()
        and not character.isspace()
        and unicodedata.category(character) not in {"So", "Sk"}
        and fold(character) != "·"
        and not "\ufe00" <= character <= "\ufe0f"
    )


def _join(spans: Sequence[Span]) -> list[Span]:
    joined: list[Span] = []
    for span in spans:
        last = joined[-1] if joined else None
        if last and last.type == span.type and last.type in _PARTS_OF_ONE and last.end == span.start:
            joined[-1] = replace(last, end=span.end)
        else:
            joined.append(span)
    return joined


def _prefer(first: Sequence[Span], second: Sequence[Span]) -> list[Span]:
    """All of `first`, and the spans of `second` that overlap none of them; both are sorted."""
    kept = list(first)
    index = 0
    for span in second:
        while index < len(first) and first[index].end <= span.start:
            index += 1
        if index == len(first) or span.end <= first[index].start:
            kept.append(span)
    return sorted(kept, key=lambda span: span.start)


def _entities(text: str, spans: Sequence[Span]) -> TextEntities:
    return TextEntities(
        characters=len(text),
        entities=tuple(
            Entity(
                type=span.type,
                text=text[span.start : span.end],
                start=span.start,
                end=span.end,
                score=span.score,
                label=span.label,
                source=span.source,
            )
            for span in spans
        ),
    )
