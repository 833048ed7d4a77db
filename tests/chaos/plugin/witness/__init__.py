"""A task type whose engine writes each of its runs into the ledger, and fails as the task asks."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from inferq.schemas import InputUrl, Options, Task, TaskType

Fault = Literal["none", "transient", "invalid", "crash", "container"]


class WitnessOptions(Options):
    times: int = Field(1, ge=0, description="In how many runs the fault occurs, the first ones.")


class WitnessTask(Task):
    """Computes for `seconds`, and then meets `fault`. `helpers`: starts processes that outlive the run."""

    task_type: Literal["witness"]
    seconds: float = Field(0.0, ge=0, le=60)
    input_url: InputUrl | None = None
    helpers: bool = False
    fault: Fault = "none"
    options: WitnessOptions = WitnessOptions()


class WitnessOutput(BaseModel):
    """`run` names the run whose output this is: the ledger knows it."""

    run: str


task_type = TaskType(
    name="witness",
    task=WitnessTask,
    output=WitnessOutput,
    engine="witness.engine:WitnessEngine",
    time_limit=30,
)
