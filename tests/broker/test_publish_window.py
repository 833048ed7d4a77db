"""Waiting for a slot in the publish window, from asyncio."""

from __future__ import annotations

import asyncio

import pytest

from inferq.broker import BrokerSettings, BrokerUnavailable, Publisher, task_message
from inferq.broker.publisher import _Window
from inferq.schemas import parse_task


async def test_slots_go_to_those_who_wait_in_order_and_none_is_lost() -> None:
    window = _Window(1)
    assert await window.acquire_one(1)
    served: list[int] = []

    async def wait(number: int, timeout: float = 20) -> bool:
        got = await window.acquire_one(timeout)
        if got:
            served.append(number)
        return got

    waiting = [asyncio.create_task(wait(number)) for number in range(4)]
    await asyncio.sleep(0)
    assert not await wait(9, timeout=0.05)
    waiting[1].cancel()
    await asyncio.to_thread(window.release, 1)
    # This one is granted its slot and cancelled before it learns that: the slot goes on to the next.
    window.release(1)
    waiting[2].cancel()
    await asyncio.wait(waiting)
    assert served == [0, 3]
    assert [task.cancelled() for task in waiting] == [False, True, True, False]
    window.release(1)
    assert window.acquire(5) == 1


async def test_waiting_for_a_slot_does_not_poll(monkeypatch: pytest.MonkeyPatch) -> None:
    publisher = Publisher(BrokerSettings(publish_window=1), name="unstarted")
    message = task_message(parse_task({"task_id": "t", "task_type": "echo", "payload": 1}))
    publisher.publish(message)
    looked: list[int] = []
    acquire = publisher._window.acquire
    monkeypatch.setattr(publisher._window, "acquire", lambda most, *_: looked.append(1) or acquire(most))
    for ended in await asyncio.gather(
        *(publisher.confirm(message, timeout=0.1) for _ in range(20)), return_exceptions=True
    ):
        assert isinstance(ended, BrokerUnavailable)
    assert len(looked) <= 20
    publisher.close(0)
