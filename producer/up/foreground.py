"""A supervisor in this process: from the plan of a data folder to the end of the last part."""

from __future__ import annotations

import asyncio
import secrets
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from inferq.producer.up.folder import DataFolder
from inferq.producer.up.plan import Plan, make_plan
from inferq.producer.up.supervisor import Report, Supervisor


@dataclass(frozen=True)
class Wish:
    """The options of `inferq up`. `types` are checked names; a `port` of 0 takes a free one."""

    data: Path
    port: int
    types: tuple[str, ...]


def keep_up(
    wish: Wish,
    *,
    report: Callable[[Report], None],
    when_ready: Callable[[Plan], None],
    watch: Callable[[asyncio.AbstractEventLoop, Supervisor], None] | None = None,
) -> None:
    """Start everything, report when it is ready, and return once a signal has ended everything.

    SIGINT, SIGTERM and SIGHUP (unless ignored) stop the parts in order; a second signal stops them at once.
    `watch` may look for other reasons to stop. Call it on the main thread. Raises InferqError if the start fails;
    everything has stopped then.
    """
    folder = DataFolder(wish.data)
    held = folder.hold()
    # Held until this process ends: when the folder is free, everything is gone.
    asyncio.run(_keep_up(folder, held, wish, report, when_ready, watch))


async def _keep_up(
    folder: DataFolder,
    held: int,
    wish: Wish,
    report: Callable[[Report], None],
    when_ready: Callable[[Plan], None],
    watch: Callable[[asyncio.AbstractEventLoop, Supervisor], None] | None,
) -> None:
    plan = make_plan(folder, port=wish.port, types=wish.types)
    supervisor = Supervisor(plan.parts, folder.logs, mark=secrets.token_hex(16), report=report, held=held)
    loop = asyncio.get_running_loop()
    signals = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup leaves it
        signals.append(signal.SIGHUP)
    for number in signals:
        loop.add_signal_handler(number, supervisor.request_stop)
    if watch is not None:
        watch(loop, supervisor)
    await supervisor.run(lambda: when_ready(plan))
