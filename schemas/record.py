"""What the models of records and events share, so that neighbouring versions of inferq understand each other."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

SCHEMA_VERSION = 1
"""The version of what travels: task messages, jobs, events and results. What names none is of version 1.

It counts up with each field or value that older parts do not know. A field keeps its meaning for ever, and a
new one has a default, so that parts of neighbouring versions work side by side.
"""


class Record(BaseModel):
    """What one part of inferq writes and another one reads.

    Fields that this version does not know are kept, and are written again with the rest. What users write is
    read strictly instead: an unknown field is most likely a typing error.
    """

    model_config = ConfigDict(extra="allow", frozen=True)
