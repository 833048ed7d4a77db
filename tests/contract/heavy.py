"""Describes a task type, and imports an engine along the way."""

from __future__ import annotations

from tests.contract.broken import Sound
from tests.contract.counting import CountTask


class HeavyTask(CountTask):
    """Counts."""

    engine_name: str = Sound.__name__
