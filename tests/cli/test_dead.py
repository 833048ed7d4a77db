"""What `inferq dead show` prints of a dead letter."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from decimal import Decimal

from inferq.producer.cli.dead import header_value


def test_the_headers_that_rabbitmq_sets_are_json() -> None:
    death = {
        "count": 2,
        "reason": "expired",
        "time": datetime(2026, 11, 30, 12, tzinfo=UTC),
        "routing-keys": ["a", "b"],
    }
    headers = {
        "x-death": [death],
        "x-attempt": 3,
        "own": b"\xff",
        "price": Decimal("1.5"),
        "ok": True,
        "void": None,
    }
    assert json.loads(json.dumps(header_value(headers))) == {
        "x-death": [
            {"count": 2, "reason": "expired", "time": "2026-11-30T12:00:00+00:00", "routing-keys": ["a", "b"]}
        ],
        "x-attempt": 3, "own": "\ufffd", "price": "1.5", "ok": True, "void": None,
    }  # fmt: skip
