"""The base of records and events. It lets neighbouring versions of inferq understand each other."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

SCHEMA_VERSION = 1
"""The version of task messages, jobs, events and results. Those without a version are of version 1.

It counts up with each new field or value. A field never changes its meaning, and a new field has a default, so
parts of neighbouring versions work side by side.
"""


class Record(BaseModel):
    """A model that one part of inferq writes and another part reads.

    It keeps fields that this version does not know, and writes them again. User input is parsed strictly
    instead, because an unknown field is most likely a typing error.
    """

    model_config = ConfigDict(extra="allow", frozen=True)
