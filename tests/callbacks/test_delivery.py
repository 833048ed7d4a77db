"""Callbacks on their way to a receiver, over real RabbitMQ, Redis and HTTP."""

from __future__ import annotations

import json
import time
from contextlib import ExitStack
from functools import partial
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from inferq.broker import connect, job_message
from inferq.consumers.callbacks.delivery import Job
from inferq.consumers.callbacks.settings import CallbackSettings
from inferq.schemas import InstallationError
from inferq.schemas.errors import EXIT_CONFIG
from tests.callbacks.conftest import TENANT, Caller, Receiver, callback, hang, in_turn, say
from tests.certificates import certificate
from tests.jobs.test_unreadable import put, unreadable
from tests.waiting import eventually


def drip(handler: BaseHTTPRequestHandler, _number: int) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
    for _ in range(200):
        handler.wfile.write(b"x")
        handler.wfile.flush()
        time.sleep(0.05)


def test_fields_of_a_later_version_go_on_to_the_next_attempt() -> None:
    sent = callback("http://127.0.0.1:1/").model_dump(mode="json") | {"news": 1}
    job = Job.model_validate({"callback": sent, "attempts": [], "headers": {"x": "y"}})
    _, arguments, _ = json.loads(job.message().body)
    assert arguments["headers"] == {"x": "y"}
    assert arguments["callback"] == sent


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


def test_each_kind_of_receiver_gets_what_it_deserves(caller: Caller, tmp_path: Path) -> None:
    """One process, receivers of all kinds at once: the schedule is 0, 1 and 1 s, an attempt takes 1 s."""
    (tmp_path / "trusted").mkdir()
    trusted, _ = certificate(tmp_path / "trusted", "localhost")
    self_signed, _ = certificate(tmp_path, "localhost")
    secure = {"good certificate": trusted, "another's name": trusted, "self-signed": self_signed}
    bundle = str(tmp_path / "trusted" / "localhost.pem")
    caller.start(INFERQ_CALLBACK_TIMEOUT="1", SSL_CERT_FILE=bundle)
    answers = {
        "mends": in_turn(say(500, b"oh\x00 no"), say(200)),
        "redirects": say(302, Location="http://127.0.0.1:1/"),
        "gone": say(410),
        "refuses": say(400),
        "asks to wait": in_turn(say(503, Retry_After="2"), say(204)),
        "hangs": hang(),
        "drips": drip,
    }
    with ExitStack() as stack:
        receivers = {name: stack.enter_context(Receiver(answer)) for name, answer in answers.items()}
        sent = {name: callback(receiver.url) for name, receiver in receivers.items()}
        for name, context in secure.items():
            wrap = partial(context.wrap_socket, server_side=True)
            receiver = receivers[name] = stack.enter_context(Receiver(wrap=wrap))
            host = "127.0.0.1" if name == "another's name" else "localhost"
            sent[name] = callback(f"https://{host}:{receiver.port}/hook")
        sent["private"] = callback("http://10.1.2.3/hook")
        sent["no name"] = callback("http://nowhere.invalid/hook")
        sent["no url"] = callback("http://[::1/hook")
        sent["closed"] = callback("http://127.0.0.1:1/hook")
        sent["no secret"] = callback(receivers["mends"].url, tenant="unknown")
        caller.send(*sent.values())
        arrive = ("mends", "asks to wait", "good certificate")
        delivered = {name: caller.came_to(sent[name], "delivered") for name in arrive}
        failed = {name: caller.came_to(sent[name], "failed") for name in sent.keys() - delivered.keys()}
        got = {name: receiver.got for name, receiver in receivers.items()}
    assert [a.status for a in delivered["mends"].attempts] == [500, 200]
    assert delivered["mends"].attempts[0].response is None  # its address is not public
    assert {request.id for request in got["mends"]} == {sent["mends"].callback_id}
    assert len({request.body for request in got["mends"]}) == 1
    assert got["asks to wait"][1].at - got["asks to wait"][0].at >= 2
    assert [a.status for a in failed["gone"].attempts] == [410]
    assert [a.status for a in failed["refuses"].attempts] == [400, 400, 400]
    assert [a.status for a in failed["redirects"].attempts] == [302, 302, 302]
    for name, words in {
        "hangs": "no response within 1 s",
        "drips": "did not end within 1 s",
        "private": "INFERQ_CALLBACK_ALLOWED_NETWORKS",
        "no name": "leads to no public address",
        "no url": "bad_input_url",
        "closed": "the connection failed",
        "self-signed": "certificate_refused: the server's certificate is invalid: self-signed",
        "another's name": "certificate_refused: the server's certificate is invalid: IP address mismatch",
        "no secret": "inferq secrets rotate unknown",
    }.items():
        assert words in failed[name].attempts[-1].error, name
        assert len(failed[name].attempts) == 3, name
    assert [a.status for a in delivered["good certificate"].attempts] == [200]
    assert not any(got[name] for name in secure if name != "good certificate")
    assert all(a.seconds < 8 for a in failed["drips"].attempts)
    for name, record in failed.items():
        kept = caller.records.kept(record.tenant, "task", sent[name].subject_id)
        assert [(r.callback_id, r.body) for r in kept] == [(record.callback_id, sent[name].body)], name
    listed = {r.callback_id for r in caller.records.failures(TENANT)}
    assert listed == {r.callback_id for r in failed.values() if r.tenant == TENANT}


def test_a_dead_target_holds_up_nobody_elses(caller: Caller) -> None:
    """1,000 callbacks for a target that hangs, 50 each for six more of them, then one for a healthy one.

    An attempt at a target that hangs lasts longer than the test: whatever waited for one would not arrive.
    """
    caller.start(INFERQ_CALLBACK_SCHEDULE="0,300", INFERQ_CALLBACK_TIMEOUT="300")
    with ExitStack() as stack:
        dead = stack.enter_context(Receiver(hang()))
        others = [stack.enter_context(Receiver(hang())) for _ in range(6)]
        healthy = stack.enter_context(Receiver())
        caller.send(*(callback(dead.url) for _ in range(1000)))
        sent = callback(healthy.url)
        caller.send(sent)
        caller.came_to(sent, "delivered")
        caller.send(*(callback(other.url) for other in others for _ in range(50)))
        sent = callback(healthy.url)
        caller.send(sent)
        caller.came_to(sent, "delivered")
        # Two places each for those that have never answered, and they are held. The healthy one's is given
        # back after its callback is on record.
        eventually(lambda: in_flight(caller) == 2 * 7, "two callbacks on their way to each that hangs")
        assert [len(receiver.got) for receiver in (dead, *others)] == [2] * 7
        assert "inferq_callbacks_deferred_total" in caller.get("/metrics").text


def in_flight(caller: Caller) -> float:
    lines = caller.get("/metrics").text.splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("inferq_callbacks_in_flight"))


def test_a_process_that_is_killed_in_mid_delivery_costs_no_callback(caller: Caller) -> None:
    def slow_once(handler: BaseHTTPRequestHandler, number: int) -> None:
        (hang() if number == 0 else say(200))(handler, number)

    with Receiver(slow_once) as receiver:
        process = caller.start()
        sent = callback(receiver.url)
        caller.send(sent)
        eventually(lambda: receiver.got)
        process.kill()
        process.wait()
        caller.start(ready=False)
        caller.came_to(sent, "delivered")
        assert {got.id for got in receiver.got} == {sent.callback_id}
        assert len(receiver.got) == 2


def test_what_is_no_callback_is_put_aside_and_stops_nobody(caller: Caller, receiver: Receiver) -> None:
    for arguments in ({}, {"callback": 1}, {"callback": {"url": "x"}}):
        message = job_message("callbacks.deliver", "inference.callbacks", arguments, job_id="bad")
        caller.publisher.publish(message).result()
    sent = callback(receiver.url)
    caller.send(sent)
    caller.start()
    caller.came_to(sent, "delivered")
    assert caller.site.depth("inference.callbacks") == 0
    # In the form of our own log, which Celery must leave alone.
    told = [json.loads(line) for line in caller.log.read_text().splitlines()]
    refused = [line for line in told if line["message"].startswith("job 'bad' is not a callback")]
    assert [(line["level"], line["part"]) for line in refused] == [("ERROR", "callbacks")] * 3
    eventually(lambda: caller.site.depth("inference.unroutable") == 3)


def test_whatever_the_queue_of_callbacks_holds_the_process_goes_on(
    caller: Caller, receiver: Receiver
) -> None:
    messages = unreadable("callbacks.deliver")
    connection = connect(caller.site.broker, name="test")
    for body, headers, about in messages:
        put(connection.channel(), "inference.callbacks", body, headers, **about)
    connection.close()
    sent = callback(receiver.url)
    caller.send(sent)
    caller.start()
    caller.came_to(sent, "delivered")
    eventually(lambda: caller.site.depth("inference.unroutable") == len(messages))
    assert caller.site.depth("inference.callbacks") == 0


def test_without_redis_a_callback_is_delivered_all_the_same(caller: Caller, receiver: Receiver) -> None:
    caller.start(INFERQ_REDIS_URL="redis://127.0.0.1:1/0")
    caller.send(callback(receiver.url))
    eventually(lambda: receiver.got)
    gone = callback("http://127.0.0.1:1/hook")
    caller.send(gone)
    (kept,) = eventually(lambda: caller.records.kept(TENANT, "task", gone.subject_id))
    assert len(kept.attempts) == 3


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("INFERQ_CALLBACK_SCHEDULE", "soon"),
        ("INFERQ_CALLBACK_SCHEDULE", "-1"),
        ("INFERQ_CALLBACK_SCHEDULE", "5,300"),
        ("INFERQ_CALLBACK_SCHEDULE", ","),
        ("INFERQ_CALLBACK_ALLOWED_NETWORKS", "localhost"),
        ("INFERQ_CALLBACK_TIMEOUT", "0"),
    ],
)
def test_bad_settings_are_named(monkeypatch: pytest.MonkeyPatch, setting: str, value: str) -> None:
    monkeypatch.setenv(setting, value)
    with pytest.raises(InstallationError, match=setting):
        CallbackSettings.load()


@pytest.mark.parametrize("value", ["foo", "10.0.0.1/8", "10.0.0.0/8,foo,bar"])
def test_what_is_no_network_is_told_in_words_and_once(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("INFERQ_CALLBACK_ALLOWED_NETWORKS", value)
    with pytest.raises(InstallationError) as raised:
        CallbackSettings.load()
    assert raised.value.message == (
        "INFERQ_CALLBACK_ALLOWED_NETWORKS: give networks such as 10.0.0.0/8 or fd00::/8, separated by "
        "commas, with no bits set behind the prefix"
    )


def test_a_bad_setting_ends_the_process(caller: Caller) -> None:
    assert caller.start("--check", ready=False, INFERQ_CALLBACK_TIMEOUT="0").wait(60) == EXIT_CONFIG
    assert "INFERQ_CALLBACK_TIMEOUT" in caller.log.read_text()
