"""ner: finds the people, places, organisations and times in Chinese text, with their offsets."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    field_validator,
    model_validator,
)

from inferq.consumers.ner.folding import fold, says_something
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
    if not says_something(term) or term != term.strip():
        raise ValueError("a term must begin and end with something that can be seen")
    return term


Term = Annotated[str, StringConstraints(min_length=1, max_length=MAX_TERM), AfterValidator(_check_term)]
TypeOfTerms = Annotated[str, StringConstraints(pattern=r"^[^\W\d_][\w-]{0,31}$")]


class NerOptions(Options):
    """What else to look for."""

    dictionary: dict[TypeOfTerms, tuple[Term, ...]] = Field(
        {},
        max_length=MAX_TYPES,
        description=f"Terms of your own, by type: at most {MAX_TERMS} of them, each of at most {MAX_TERM} "
        "characters. They are found wherever they stand, in full or half width, the case as given; Latin "
        "terms as whole words only. Where matches overlap the longest holds, and a match always holds "
        "against what the model found there.",
        examples=[{"DISEASE": ["2型糖尿病", "高血压"], "DRUG": ["二甲双胍"]}],
    )

    @field_validator("dictionary")
    @classmethod
    def _unambiguous(cls, dictionary: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        count = sum(len(terms) for terms in dictionary.values())
        if count > MAX_TERMS:
            raise ValueError(f"it has {count} terms, at most {MAX_TERMS} are taken")
        seen: dict[str, str] = {}
        for kind, terms in dictionary.items():
            for term in terms:
                if seen.setdefault(fold(term), kind) != kind:
                    raise ValueError(f"the term {term!r} stands under {seen[fold(term)]} and under {kind}")
        return dictionary


class NerTask(Task):
    """Finds the entities in `text`, in the file at `text_url`, or in each of `texts`: exactly one of them."""

    task_type: Literal["ner"]
    text: str | None = Field(None, description="The text itself.")
    text_url: InputUrl | None = Field(
        None,
        description="A file of UTF-8 text: `https:`, `http:`, `s3:`, `data:`, or `inferq:` (an uploaded "
        "file). A byte order mark counts as a character, as do CR and LF.",
    )
    texts: tuple[str, ...] | None = Field(
        None, min_length=1, max_length=MAX_TEXTS, description="Several texts, computed together."
    )
    options: NerOptions = NerOptions()

    @field_validator("text")
    @classmethod
    def _text_says_something(cls, text: str | None) -> str | None:
        if text is not None and not says_something(text):
            raise ValueError("the text is empty, or nothing but white space")
        return text

    @field_validator("texts")
    @classmethod
    def _texts_say_something(cls, texts: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for number, text in enumerate(texts or ()):
            if not says_something(text):
                raise ValueError(f"texts[{number}] is empty, or nothing but white space")
        return texts

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [name for name in ("text", "text_url", "texts") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of text, text_url and texts; got {' and '.join(given) or 'none of them'}"
            )
        return self


class Entity(BaseModel):
    """A name in a text: `text[start:end]` is `Entity.text`, always."""

    model_config = ConfigDict(frozen=True)

    type: str = Field(
        description="PER, LOC, ORG, TIME, WORK (a title), MISC (another name); a type of the model's own, "
        "or of the dictionary."
    )
    text: str
    start: int = Field(ge=0, description="Where it begins: the number of characters (code points) before it.")
    end: int = Field(ge=1, description="Where it ends: the number of characters up to and with its last.")
    score: float | None = Field(None, ge=0, le=1, description="How certain it is, where the model says so.")
    label: str | None = Field(None, description="What the model itself calls it; none from the dictionary.")
    source: Literal["model", "dictionary"] = "model"


class TextEntities(BaseModel):
    """One text's entities, in the order of their starts; no two overlap."""

    model_config = ConfigDict(frozen=True)

    characters: int = Field(ge=1, description="How many characters (code points) the text has.")
    entities: tuple[Entity, ...]


class NerOutput(BaseModel):
    """What was found, whichever backend looked. A lone text is a batch of one."""

    model_config = ConfigDict(frozen=True)

    model: str = Field(description="The model that looked.")
    texts: tuple[TextEntities, ...] = Field(description="One for each text, in the order of the task.")


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
