"""A producer that may be killed at any moment: what is not known to be confirmed is sent again.

`python -m tests.chaos.sender PLAN LEDGER START` publishes each task of the plan once it is due, counted from
START (Unix time), and ends with status 0 when the broker has confirmed all of them.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, wait
from functools import partial
from pathlib import Path

from inferq.broker import BrokerSettings, Publisher, task_message, topology_for
from inferq.schemas import InferqError, parse_task
from tests.chaos import plan
from tests.chaos.ledger import Ledger
from tests.chaos.plan import PlannedTask

_log = logging.getLogger(__name__)

CALLBACK_URL = "CHAOS_CALLBACK_URL"
"""The variable that says where the ends of tasks are to be called back."""


def main(plan_file: str, ledger_file: str, start: str) -> None:
    logging.basicConfig(level="INFO", format="%(asctime)s %(levelname)s %(message)s")
    tasks = plan.read(Path(plan_file))
    ledger = Ledger(Path(ledger_file))
    publisher = Publisher(BrokerSettings.load(), name="sender", topology=topology_for(["witness"]))
    publisher.start()
    while todo := _unconfirmed(tasks, ledger):
        _publish(todo, publisher, ledger, float(start))
    publisher.close()


def _unconfirmed(tasks: Sequence[PlannedTask], ledger: Ledger) -> list[PlannedTask]:
    confirmed = ledger.confirmed()
    return [task for task in tasks if task.id not in confirmed]


def _publish(tasks: Sequence[PlannedTask], publisher: Publisher, ledger: Ledger, start: float) -> None:
    answers: list[Future[None]] = []
    for task in tasks:
        time.sleep(max(0.0, start + task.due - time.time()))
        url = {"callback_url": os.environ[CALLBACK_URL]} if task.callback else {}
        message = task_message(parse_task(task.body() | url))
        for _ in range(task.copies):
            ledger.note("sent", task.id)
            try:
                answer = publisher.publish(message)
            except InferqError as error:
                _log.info("%s: %s", task.id, error)
                continue
            answer.add_done_callback(partial(_answered, ledger, task.id))
            answers.append(answer)
    wait(answers)


def _answered(ledger: Ledger, task: str, answer: Future[None]) -> None:
    if (error := answer.exception()) is None:
        ledger.note("confirmed", task)
    else:
        _log.info("%s: %s", task, error)


if __name__ == "__main__":
    main(*sys.argv[1:])
