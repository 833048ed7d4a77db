"""What a scenario submits: tasks drawn from a seed, when each is due, and how each has to end."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any, Literal

from inferq.schemas import PRIORITIES, Priority

Trouble = Literal["none", "transient", "hopeless", "invalid", "crash", "poison", "container", "expiring"]
"""What a task does to its engine: `transient` and `crash` befall its first run only, the others every one.

`expiring` spares the engine: the message has an AMQP `expiration`, so that RabbitMQ may drop it."""

_ALWAYS = 1_000_000
_FAULT_OF: Mapping[Trouble, tuple[str, int]] = {
    "none": ("none", 0),
    "transient": ("transient", 1),
    "hopeless": ("transient", _ALWAYS),
    "invalid": ("invalid", _ALWAYS),
    "crash": ("crash", 1),
    "poison": ("crash", _ALWAYS),
    "container": ("container", _ALWAYS),
    "expiring": ("none", 0),
}
_CODE_OF: Mapping[Trouble, str] = {
    "hopeless": "not_now",
    "invalid": "never",
    "poison": "poison",
    "container": "poison",
}
_STARTS_OF: Mapping[Trouble, int] = {"transient": 2, "crash": 2, "hopeless": 5, "poison": 3}


@dataclass(frozen=True)
class PlannedTask:
    """A task to submit, `due` seconds after the beginning; `seconds` is how long a run computes.

    `callback`: whether its end is to be called back. `input_url`: an input to fetch. `helpers`: whether its run
    starts processes that outlive it. `droppable`: whether RabbitMQ may drop its message, so that it fails.
    `line`: whether it is a line of the batch, which nobody else submits.
    """

    id: str
    due: float = 0.0
    seconds: float = 0.0
    priority: Priority = "normal"
    trouble: Trouble = "none"
    copies: int = 1
    callback: bool = False
    input_url: str = ""
    helpers: bool = False
    droppable: bool = False
    line: bool = False

    @property
    def code(self) -> str | None:
        """The code of the failure that it has to end with; None: it has to succeed."""
        return _CODE_OF.get(self.trouble)

    @property
    def starts(self) -> int | None:
        """How many engine starts it takes if nothing else breaks; None where that is open."""
        return None if self.trouble == "container" else _STARTS_OF.get(self.trouble, 1)

    def body(self) -> dict[str, Any]:
        """The task as its producer spells it."""
        fault, times = _FAULT_OF[self.trouble]
        return {
            "task_id": self.id,
            "task_type": "witness",
            "seconds": self.seconds,
            "priority": self.priority,
            "fault": fault,
            "options": {"times": times},
            "helpers": self.helpers,
        } | ({"input_url": self.input_url} if self.input_url else {})

    def line_of_batch(self) -> str:
        """The task as a line of a batch, which names it."""
        return json.dumps({name: value for name, value in self.body().items() if name != "task_id"}) + "\n"


@dataclass(frozen=True)
class Load:
    """How many tasks, over how many seconds, how busy they keep one worker, and what troubles come along.

    `busy` is the seconds of computing that fall due per second. `troubles` gives counts.
    """

    tasks: int
    seconds: float
    busy: float
    troubles: Mapping[Trouble, int]


def draw(name: str, load: Load, random: Random) -> list[PlannedTask]:
    """The tasks of one scenario, in the order in which they fall due.

    They come in bursts, on all lanes, mostly short and some long; a few are submitted twice.
    """
    if sum(load.troubles.values()) > load.tasks:
        raise ValueError(f"{name} plans more troubles than its {load.tasks} tasks")
    mean = load.busy * load.seconds / load.tasks
    troubles: list[Trouble] = [trouble for trouble, count in load.troubles.items() for _ in range(count)]
    troubles += ["none"] * (load.tasks - len(troubles))
    random.shuffle(troubles)
    dues: list[float] = []
    while len(dues) < load.tasks:
        dues += [random.uniform(0, load.seconds)] * random.randint(1, 20)
    return [
        PlannedTask(
            id=f"{name}-{number:05d}",
            due=round(due, 3),
            seconds=round(min(random.expovariate(1 / mean), 8 * mean), 4),
            priority=random.choice(PRIORITIES),
            trouble=trouble,
            copies=2 if random.random() < 0.03 else 1,
        )
        for number, (due, trouble) in enumerate(zip(sorted(dues[: load.tasks]), troubles, strict=True))
    ]


def write(path: Path, tasks: Sequence[PlannedTask]) -> None:
    path.write_text("".join(json.dumps(asdict(task)) + "\n" for task in tasks), "utf-8")


def read(path: Path) -> list[PlannedTask]:
    return [PlannedTask(**json.loads(line)) for line in path.read_text("utf-8").splitlines()]
