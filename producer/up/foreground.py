"""A supervisor in this process: from the plan of a data folder to the end of the last part."""

from __future__ import annotations

import asyncio
import secrets
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from inferq.producer.descriptors import raise_descriptor_limit
from inferq.producer.up.folder import DataFolder
from inferq.producer.up.plan import Plan, make_plan
from inferq.producer.up.supervisor import PartFailed, Report, Supervisor

FEW_DESCRIPTORS = 1024
"""With fewer open files, RabbitMQ may stop answering new connections, and does not say why."""


@dataclass(frozen=True)
class UpOptions:
    """The options of `inferq up`. `types` are checked names; a `port` of 0 takes a free one.

    Unless all types are `required`, those whose engines cannot start are left out. With `max_loaded`, one worker
    serves all types.
    """

    data: Path
    port: int
    types: tuple[str, ...]
    required: bool = True
    max_loaded: int | None = None


def run_until_stopped(
    options: UpOptions,
    *,
    report: Callable[[Report], None],
    when_ready: Callable[[Plan], None],
    watch: Callable[[asyncio.AbstractEventLoop, Supervisor], None] | None = None,
    extend: Callable[[DataFolder, Plan], Plan] | None = None,
) -> None:
    """Start everything, report when it is ready, and return once a signal has ended everything.

    SIGINT, SIGTERM and SIGHUP (unless ignored) stop the parts in order; a second signal stops them at once.
    `watch` may look for other reasons to stop; `extend` may add parts to the plan. Call it on the main thread.
    Raises InferqError if the start fails; everything has stopped then.
    """
    folder = DataFolder(options.data)
    held = folder.hold()
    # Held until this process ends: when the folder is free, everything is gone.
    asyncio.run(_run_until_stopped(folder, held, options, report, when_ready, watch, extend))


async def _run_until_stopped(
    folder: DataFolder,
    held: int,
    options: UpOptions,
    report: Callable[[Report], None],
    when_ready: Callable[[Plan], None],
    watch: Callable[[asyncio.AbstractEventLoop, Supervisor], None] | None,
    extend: Callable[[DataFolder, Plan], Plan] | None,
) -> None:
    limit = raise_descriptor_limit()  # the parts inherit it
    plan = make_plan(
        folder,
        port=options.port,
        types=options.types,
        required=options.required,
        max_loaded=options.max_loaded,
    )
    if extend is not None:
        plan = extend(folder, plan)
    if limit < FEW_DESCRIPTORS:
        plan = replace(plan, facts={**plan.facts, "open files": _few(limit)})
    supervisor = Supervisor(plan.parts, folder.logs, mark=secrets.token_hex(16), report=report, held=held)
    loop = asyncio.get_running_loop()
    signals = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup leaves it
        signals.append(signal.SIGHUP)
    for number in signals:
        loop.add_signal_handler(number, supervisor.request_stop)
    if watch is not None:
        watch(loop, supervisor)
    try:
        await supervisor.run(lambda: when_ready(plan.without(supervisor.left_out, late=supervisor.late)))
    except PartFailed as error:
        if limit < FEW_DESCRIPTORS:
            raise PartFailed(
                f"{error.message}\nThe cause may be the limit of open files: {_few(limit)}"
            ) from error
        raise


def _few(limit: int) -> str:
    return (
        f"a process may open {limit}, and RabbitMQ needs {FEW_DESCRIPTORS} or more; raise the hard limit "
        "(ulimit -Hn, or LimitNOFILE= in a systemd unit)"
    )
