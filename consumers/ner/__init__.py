"""ner: finds the people, places, organisations and times in Chinese text, with their offsets.

engine     texts in, entities out, with any of the models
backend    the protocol of NER models, and the types of their labels
lac        LAC with the small model in jieba's package
bigru_crf  the network of LAC, in NumPy
taskflow   PaddleNLP
texts      reads the text of a file
reading    the text as a model should read it
segments   splits a text into pieces that fit a model's window
folding    maps equivalent characters to one form
terms      finds a user's own terms
settings   the settings of the NER engine
"""

from __future__ import annotations

from itertools import combinations
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    field_validator,
    model_validator,
)

from inferq.consumers.ner.folding import fold, has_visible_text
from inferq.consumers.ner.settings import NerSettings
from inferq.schemas import InputUrl, Options, Task, TaskType, always

MAX_TEXTS = 1000
"""The most texts in one task."""
MAX_TYPES = 50
"""The most types in one dictionary."""
MAX_TERMS = 10_000
"""The most terms in one dictionary, all types together."""
MAX_TERM = 64
"""The most characters in one term."""


def _check_term(term: str) -> str:
    if not has_visible_text(term) or term != term.strip():
        raise ValueError("a term must begin and end with a visible character")
    return term


Term = Annotated[
    str,
    StringConstraints(min_length=1, max_length=MAX_TERM),
    AfterValidator(_check_term),
    Field(json_schema_extra={"pattern": r"^\S([\s\S]*\S)?$"}),
]
Text = Annotated[str, Field(json_schema_extra={"pattern": r"\S"})]
TypeOfTerms = Annotated[str, StringConstraints(pattern=r"^[^\W\d_][\w-]{0,31}$")]


class NerOptions(Options):
    """Terms to find in addition to the model's entities."""

    dictionary: dict[TypeOfTerms, tuple[Term, ...]] = Field(
        {},
        max_length=MAX_TYPES,
        description=f"Your own terms, by type: at most {MAX_TERMS} terms of at most {MAX_TERM} characters. "
        "A term matches in full and half width, case-sensitively; Latin terms match whole words only. Of "
        "overlapping matches the longest wins, and a match replaces the model's entities that it overlaps.",
        examples=[{"DISEASE": ["2型糖尿病", "高血压"], "DRUG": ["二甲双胍"]}],
    )

    @field_validator("dictionary")
    @classmethod
    def _unambiguous(cls, dictionary: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        count = sum(len(terms) for terms in dictionary.values())
        if count > MAX_TERMS:
            raise ValueError(f"it has {count} terms; at most {MAX_TERMS} are allowed")
        seen: dict[str, str] = {}
        for kind, terms in dictionary.items():
            for term in terms:
                if seen.setdefault(fold(term), kind) != kind:
                    raise ValueError(
                        f"the term {term!r} has two types, {seen[fold(term)]} and {kind}: keep one"
                    )
        return dictionary


_SOURCES = ("text", "text_url", "texts")
_NOT_ONE_SOURCE: list[Any] = [
    {"properties": {name: {"type": "null"} for name in _SOURCES}},
    *(
        {"required": list(pair), "properties": {name: {"not": {"type": "null"}} for name in pair}}
        for pair in combinations(_SOURCES, 2)
    ),
]
"""The tasks without exactly one source, as JSON Schema. Generators of clients cannot read `oneOf` beside fields."""


class NerTask(Task):
    """Finds the entities in `text`, in the file at `text_url`, or in each of `texts`: exactly one of them."""

    model_config = ConfigDict(json_schema_extra={"not": {"anyOf": _NOT_ONE_SOURCE}})

    task_type: Literal["ner"]
    text: Text | None = Field(None, description="The text.")
    text_url: InputUrl | None = Field(
        None,
        description="A file of UTF-8 text: `https:`, `http:`, `s3:`, `data:`, or `inferq:` (an uploaded "
        "file). A byte order mark counts as a character, as do CR and LF.",
    )
    texts: tuple[Text, ...] | None = Field(
        None, min_length=1, max_length=MAX_TEXTS, description="Several texts, computed together."
    )
    options: NerOptions = NerOptions()

    @field_validator("text")
    @classmethod
    def _text_has_visible_text(cls, text: str | None) -> str | None:
        if text is not None and not has_visible_text(text):
            raise ValueError("the text is empty or only white space")
        return text

    @field_validator("texts")
    @classmethod
    def _texts_say_something(cls, texts: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for number, text in enumerate(texts or ()):
            if not has_visible_text(text):
                raise ValueError(f"texts[{number}] is empty or only white space")
        return texts

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [name for name in _SOURCES if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of text, text_url and texts; got {' and '.join(given) or 'none of them'}"
            )
        return self


class Entity(BaseModel):
    """A name in a text. `text[start:end]` always equals `Entity.text`."""

    model_config = ConfigDict(frozen=True)

    type: str = Field(
        description="PER, LOC, ORG, TIME, WORK (a title), MISC (another name), another type of the model, or a "
        "type of the dictionary."
    )
    text: str
    start: int = Field(
        ge=0, description="The start offset: the number of characters (code points) before the entity."
    )
    end: int = Field(
        ge=1, description="The end offset: the number of characters up to and including the entity's last."
    )
    score: float | None = Field(
        None, ge=0, le=1, description="The model's confidence, if the model gives one."
    )
    label: str | None = Field(None, description="The model's own label; null for a dictionary term.")
    source: Literal["model", "dictionary", "pattern"] = Field(
        "model", description="`pattern`: a date in the form of ISO 8601."
    )


class TextEntities(BaseModel):
    """One text's entities, sorted by start. No two overlap."""

    model_config = ConfigDict(frozen=True)

    characters: int = Field(ge=1, description="The number of characters (code points) of the text.")
    entities: tuple[Entity, ...]


class NerOutput(BaseModel):
    """The entities that were found, in the same form for all backends. A single text is a batch of one."""

    model_config = ConfigDict(frozen=True)

    model: str = Field(description="The model that found the entities.")
    texts: tuple[TextEntities, ...] = Field(description="One entry per text, in the order of the task.")


task_type = TaskType(
    name="ner",
    task=NerTask,
    output=NerOutput,
    engine="inferq.consumers.ner.engine:NerEngine",
    arguments=("text",),
    summary="finds people, places, organisations and times in Chinese text",
    cacheable=always,
    settings=NerSettings,
)
