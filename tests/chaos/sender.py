"""A producer that may be killed at any moment: what is not known to be confirmed is sent again.

`python -m tests.chaos.sender PLAN LEDGER START` publishes each task of the plan once it is due, counted from
START (Unix time), and ends with status 0 when all of them are confirmed. Where GATEWAY_URL is set, they are
submitted to the gateway, else published to the broker.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path

import httpx

from inferq.broker import BrokerSettings, Message, Publisher, task_message, topology_for
from inferq.schemas import InferqError, parse_task
from tests.chaos import plan
from tests.chaos.ledger import Ledger
from tests.chaos.plan import PlannedTask

_log = logging.getLogger(__name__)

CALLBACK_URL = "CHAOS_CALLBACK_URL"
"""The variable that says where the ends of tasks are to be called back."""

GATEWAY_URL = "CHAOS_GATEWAY_URL"
"""The variable with the URL of the gateway that takes the tasks; INFERQ_API_KEY has the key."""

EXPIRES_AFTER = 400
"""The AMQP `expiration` of a task with the trouble `expiring`, in milliseconds."""

_GATEWAY_THREADS = 4

Submit = Callable[[PlannedTask], Future[None]]
"""Submits a task once; the future ends when it is confirmed. Raises InferqError."""


def main(plan_file: str, ledger_file: str, start: str) -> None:
    logging.basicConfig(level="INFO", format="%(asctime)s %(levelname)s %(message)s")
    tasks = plan.read(Path(plan_file))
    ledger = Ledger(Path(ledger_file))
    if GATEWAY_URL in os.environ:
        with ThreadPoolExecutor(_GATEWAY_THREADS) as threads, _gateway() as gateway:
            _submit_all(tasks, partial(_by_gateway, threads, gateway, ledger), ledger, float(start))
        return
    publisher = Publisher(BrokerSettings.load(), name="sender", topology=topology_for(["witness"]))
    publisher.start()
    _submit_all(tasks, partial(_by_broker, publisher), ledger, float(start))
    publisher.close()


def _submit_all(tasks: Sequence[PlannedTask], submit: Submit, ledger: Ledger, start: float) -> None:
    while todo := _unconfirmed(tasks, ledger):
        _submit(todo, submit, ledger, start)


def _unconfirmed(tasks: Sequence[PlannedTask], ledger: Ledger) -> list[PlannedTask]:
    confirmed = ledger.confirmed()
    return [task for task in tasks if task.id not in confirmed]


def _submit(tasks: Sequence[PlannedTask], submit: Submit, ledger: Ledger, start: float) -> None:
    answers: list[Future[None]] = []
    for task in tasks:
        time.sleep(max(0.0, start + task.due - time.time()))
        for _ in range(task.copies):
            ledger.note("sent", task.id)
            try:
                answer = submit(task)
            except InferqError as error:
                _log.info("%s: %s", task.id, error)
                continue
            answer.add_done_callback(partial(_answered, ledger, task.id))
            answers.append(answer)
    wait(answers)


class _Expiring(Message):
    """A message with an `expiration`, as other AMQP clients set it."""

    def encoded_properties(self) -> bytes:
        properties = self.properties()
        properties.expiration = str(EXPIRES_AFTER)
        return b"".join(properties.encode())


def _by_broker(publisher: Publisher, task: PlannedTask) -> Future[None]:
    message = task_message(parse_task(_body(task)))
    return publisher.publish(_Expiring(*message) if task.trouble == "expiring" else message)


def _gateway() -> httpx.Client:
    headers = {"Authorization": f"Bearer {os.environ['INFERQ_API_KEY']}"}
    return httpx.Client(base_url=os.environ[GATEWAY_URL], headers=headers, timeout=30)


def _by_gateway(
    threads: ThreadPoolExecutor, gateway: httpx.Client, ledger: Ledger, task: PlannedTask
) -> Future[None]:
    def put() -> None:
        answer = gateway.put(f"/v1/tasks/{task.id}", json=_body(task))
        if answer.status_code in (404, 409, 422):
            # The task is as it should be: a service that is unavailable is a 503.
            ledger.note("denied", task.id, what=f"PUT, {answer.status_code}")
        answer.raise_for_status()

    return threads.submit(put)


def _body(task: PlannedTask) -> dict[str, object]:
    url = {"callback_url": os.environ[CALLBACK_URL]} if task.callback else {}
    return task.body() | url


def _answered(ledger: Ledger, task: str, answer: Future[None]) -> None:
    if (error := answer.exception()) is None:
        ledger.note("confirmed", task)
    else:
        _log.info("%s: %s", task, error)


if __name__ == "__main__":
    main(*sys.argv[1:])
