"""The sentiment engine keeps what every engine has to keep."""

from __future__ import annotations

from inferq.testing import Sample, Subject, engine_contract
from inferq_sentiment import task_type

test_contract = engine_contract(
    Subject(
        task_type,
        samples=[
            Sample({"text": "The view is lovely. The room isn't clean, and the service was slow!"}),
            Sample({"text": "这家店不错，就是有点贵。", "options": {"neutral_below": 0.0}}),
        ],
        refused=[
            Sample({"text": ""}, code="invalid_task"),
            Sample({"text": "12:30 ?!"}, code="no_words"),
            Sample({"text": "fine", "options": {"neutral_below": 2}}, code="invalid_task"),
        ],
    )
)
