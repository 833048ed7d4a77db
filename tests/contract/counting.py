"""Describes a task type, as a type's package does."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from inferq.schemas import Options, Task


class CountOptions(Options):
    upward: bool = True


class CountTask(Task):
    task_type: Literal["count"]
    steps: int = 3
    options: CountOptions = CountOptions()


class LaxOptions(BaseModel):
    """Not of inferq.schemas.Options: takes whatever comes."""


class LaxTask(CountTask):
    options: LaxOptions = LaxOptions()  # type: ignore[assignment]


class CountOutput(BaseModel):
    share: float = Field(ge=0, le=1)
