"""The NER engine: texts in, entities out, with any of the models."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from inferq.consumers.ner import Entity, NerOutput, NerTask, TextEntities
from inferq.consumers.ner.backend import Backend, Span
from inferq.consumers.ner.folding import fold
from inferq.consumers.ner.reading import Reading, iso_dates, reading
from inferq.consumers.ner.segments import segments
from inferq.consumers.ner.settings import NerSettings
from inferq.consumers.ner.terms import Dictionary
from inferq.consumers.ner.texts import check_length, read_text
from inferq.consumers.weights.cache import model_folder
from inferq.engine import Context, Engine, TaskAborted
from inferq.schemas import EngineInfo, InstallationError

_BATCH_CHARACTERS = 8192
"""The most characters in one batch. It bounds memory, and a run can stop only between two batches."""

_SMALL_TEXTS, _SMALL_CHARACTERS = 8, 1024
"""A task with at most this many texts and characters goes with others. Larger ones fill a batch of their own."""

_ZEROS = {"○", "◯"}
"""Circles that people write instead of 〇 (zero)."""

_PARTS_OF_ONE = {"LOC", "TIME"}
"""Types whose adjacent spans are joined: models sometimes split addresses and dates."""


@dataclass
class _Job:
    """A task, and how far it is: its texts as the model reads them, and the spans in each of them."""

    task: NerTask
    context: Context
    texts: Sequence[str] = ()
    readings: Sequence[Reading] = ()
    found: list[list[Span]] = field(default_factory=list)
    characters: int = 0
    done: int = 0
    outcome: NerOutput | Exception | None = None

    @property
    def ended(self) -> bool:
        return self.outcome is not None

    def check_abort(self) -> None:
        if self.context.should_abort():
            self.outcome = TaskAborted()


@dataclass(frozen=True)
class _Piece:
    """A piece of a text; `text` is the text's number in its task."""

    job: _Job
    text: int
    start: int
    end: int


class NerEngine(Engine[NerTask]):
    """Reads texts sentence by sentence, many sentences at a time."""

    def __init__(self, settings: NerSettings | None = None, *, backend: Backend | None = None) -> None:
        """`settings` default to the environment's. `backend`: a loaded one; else `load` loads it."""
        self._settings = settings or NerSettings.load()
        self._loaded = backend
        self.batch_size = self._settings.ner_batch_size

    def load(self) -> EngineInfo:
        """Load the model that INFERQ_NER_BACKEND names onto the device that INFERQ_DEVICE names."""
        self._loaded = load_backend(self._settings)
        return self._loaded.info

    def warm_up(self) -> None:
        """Read generated sentences: libraries choose kernels and allocate memory on the first ones."""
        sentence = "王小明今天上午在北京大学参加了会议。"
        self._backend.read([sentence])
        self._backend.read([sentence] * min(self._settings.ner_batch_size, 8))

    def batch_key(self, task: NerTask) -> Hashable:
        """Small tasks go together. A larger task and one with a file, whose length is not known yet, go alone."""
        texts = [task.text] if task.text is not None else task.texts or ()
        small = 0 < len(texts) <= _SMALL_TEXTS and sum(map(len, texts)) <= _SMALL_CHARACTERS
        return None if small else (task.tenant, task.task_id)

    def run(self, task: NerTask, context: Context) -> NerOutput:
        """Read the text or the texts of a task."""
        context.progress(0.0, "reading")
        (outcome,) = self.run_batch([task], [context])
        if isinstance(outcome, Exception):
            raise outcome
        context.progress(1.0, "read")
        return outcome

    def run_batch(self, tasks: Sequence[NerTask], contexts: Sequence[Context]) -> list[NerOutput | Exception]:
        """Read the texts of several tasks, their sentences together."""
        jobs = [_Job(task, context) for task, context in zip(tasks, contexts, strict=True)]
        _each(jobs, self._open)
        self._read([job for job in jobs if not job.ended])
        _each(jobs, self._finish)
        return [job.outcome for job in jobs if job.outcome is not None]

    def close(self) -> None:
        self._loaded = None

    @property
    def _backend(self) -> Backend:
        if self._loaded is None:
            raise RuntimeError("the NER engine is not loaded: call load() first")
        return self._loaded

    def _open(self, job: _Job) -> None:
        job.texts = self._texts(job.task, job.context)
        job.readings = [reading(text) for text in job.texts]
        job.found = [[] for _ in job.texts]

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

    def _read(self, jobs: Sequence[_Job]) -> None:
        """Find the model's spans in each text, without invisible characters at their edges."""
        pieces = [
            _Piece(job, number, start, end)
            for job in jobs
            for number, read in enumerate(job.readings)
            for start, end in segments(read.text, self._backend.window)
        ]
        for piece in pieces:
            piece.job.characters += piece.end - piece.start
        for batch in _batches(pieces, self._settings.ner_batch_size):
            for job in jobs:
                job.check_abort()
            left = [piece for piece in batch if not piece.job.ended]
            self._read_together(left)
            for job in jobs:
                if 0 < job.done < job.characters and not job.ended:
                    job.context.progress(
                        job.done / job.characters, f"{job.done} of {job.characters} characters"
                    )

    def _read_together(self, pieces: Sequence[_Piece]) -> None:
        if not pieces:
            return
        texts = [piece.job.readings[piece.text].text[piece.start : piece.end] for piece in pieces]
        for piece, text, spans in zip(pieces, texts, self._backend.read(texts), strict=True):
            found = piece.job.found[piece.text]
            found += [moved for span in spans if (moved := _trim(text, span, piece.start)) is not None]
            piece.job.done += len(text)

    def _finish(self, job: _Job) -> None:
        dictionary = Dictionary(job.task.options.dictionary)
        texts = []
        for text, read, found in zip(job.texts, job.readings, job.found, strict=True):
            terms = dictionary.find(read.text, job.context.check_abort)
            spans = _join(sorted(found, key=lambda span: span.start))
            names = _prefer(terms, _prefer(iso_dates(read.text), spans))
            texts.append(_entities(text, [read.original(span) for span in names]))
        job.outcome = NerOutput(model=self._backend.info.model, texts=tuple(texts))


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


def _each(jobs: Sequence[_Job], step: Callable[[_Job], None]) -> None:
    """Take a step with each job that has not ended. A job whose step raises fails alone."""
    for job in jobs:
        if not job.ended:
            try:
                step(job)
            except Exception as error:
                job.outcome = error


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


def _trim(text: str, span: Span, offset: int) -> Span | None:
    """The span, moved by `offset`, without symbols and invisible characters at its edges in `text`.

    None if it then has no letter and no digit.
    """
    start, end = span.start, span.end
    while start < end and not _belongs(text[start]):
        start += 1
    while end > start and not _belongs(text[end - 1]):
        end -= 1
    if not any(character.isalnum() for character in text[start:end]):
        return None
    return Span(start + offset, end + offset, span.type, span.label, span.score, span.source)


def _belongs(character: str) -> bool:
    """Whether a name may begin or end with the character: no emoji, no dot between names, no selector of a form."""
    if character.isalnum() or character in _ZEROS:
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
