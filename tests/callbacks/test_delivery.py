"""Callbacks on their way to a receiver, over real RabbitMQ, Redis and HTTP."""

from __future__ import annotations

import json

from tests.callbacks.conftest import TENANT, Caller, Receiver, callback


def test_a_callback_arrives_signed_with_every_valid_secret(caller: Caller, receiver: Receiver) -> None:
    (old,) = caller.secrets.of(TENANT)
    caller.start()
    sent = callback(receiver.url)
    caller.send(sent)
    record = caller.came_to(sent, "delivered")
    (got,) = receiver.got
    assert got.body == sent.body.encode()
    assert (got.id, got.path) == (sent.callback_id, "/hook")
    assert got.headers["content-type"] == "application/json"
    assert got.headers["user-agent"].startswith("inferq/")
    assert got.verify(old) == json.loads(sent.body)
    assert [(a.status, a.error) for a in record.attempts] == [(200, None)]
    new = caller.secrets.rotate(TENANT).secret.get_secret_value()
    again = callback(receiver.url)
    caller.send(again)
    caller.came_to(again, "delivered")
    assert receiver.got[1].verify(new) == receiver.got[1].verify(old) == json.loads(again.body)
    assert len(receiver.got[1].headers["webhook-signature"].split(" ")) == 2
