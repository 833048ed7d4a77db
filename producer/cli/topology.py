"""inferq topology: show, apply and check the exchanges and queues."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, TypeVar

import pika
import typer
from pika.exceptions import AMQPError

from inferq.broker import BrokerSettings, BrokerUnavailable, Topology, connect, job_topology, topology_for
from inferq.producer.cli.output import JsonFlag, console, print_json, print_table
from inferq.schemas import get_type, installed_types

app = typer.Typer(
    name="topology", help="Show, declare and check the exchanges and queues.", no_args_is_help=True
)

Part = TypeVar("Part")
Types = Annotated[
    str | None, typer.Option("--types", help="Task types, e.g. ocr,ner (default: all installed).")
]


def _topology(types: str | None) -> Topology:
    names = [name.strip() for name in types.split(",")] if types else list(installed_types())
    tasks, jobs = topology_for(get_type(name).name for name in names), job_topology()
    return Topology(
        _once(tasks.exchanges, jobs.exchanges),
        _once(tasks.queues, jobs.queues),
        # Those that are removed stay last.
        tuple(sorted(_once(tasks.bindings, jobs.bindings), key=lambda binding: binding.removed)),
    )


def _once(tasks: tuple[Part, ...], jobs: tuple[Part, ...]) -> tuple[Part, ...]:
    return (*tasks, *(part for part in jobs if part not in tasks))


@contextmanager
def _connection() -> Iterator[pika.BlockingConnection]:
    connection = connect(BrokerSettings.load(), name="topology")
    try:
        yield connection
    except AMQPError as error:
        raise BrokerUnavailable(f"RabbitMQ refused, or the connection was lost: {error!r}") from error
    finally:
        if connection.is_open:
            connection.close()


@app.command()
def show(types: Types = None, as_json: JsonFlag = False) -> None:
    """Print the exchanges and queues that inferq needs, without a broker."""
    wanted = _topology(types)
    if as_json:
        print_json([{"declare": method, **arguments} for method, arguments in wanted.declarations()])
        return
    rows: list[tuple[str, str, str]] = []
    for exchange in wanted.exchanges:
        rows.append((f"{exchange.kind} exchange", exchange.name, _arguments(exchange.arguments)))
    for queue in wanted.queues:
        rows.append(("quorum queue", queue.name, _arguments(queue.arguments)))
    for binding in wanted.bindings:
        if not binding.removed:
            told = binding.routing_key or _arguments(binding.arguments)
            rows.append(("binding", f"{binding.exchange} → {binding.queue}", told))
    print_table(["kind", "name", "arguments"], rows)


def _arguments(arguments: dict[str, object]) -> str:
    return ", ".join(f"{name}={value}" for name, value in arguments.items())


@app.command()
def apply(types: Types = None) -> None:
    """Declare the missing exchanges, queues and bindings on the broker."""
    wanted = _topology(types)
    with _connection() as connection:
        wanted.apply(connection.channel())
    console.print(f"{len(wanted.exchanges)} exchanges and {len(wanted.queues)} queues are in place")


@app.command()
def check(types: Types = None, as_json: JsonFlag = False) -> None:
    """Compare the broker with the topology that inferq needs. Exit status 1 if it differs.

    It changes nothing. It does not compare bindings, because AMQP cannot list them; `apply` makes them.
    """
    wanted = _topology(types)
    with _connection() as connection:
        found = wanted.differences(connection)
    if as_json:
        print_json([{"kind": d.kind, "name": d.name, "problem": d.problem} for d in found])
    else:
        for difference in found:
            console.print(str(difference), soft_wrap=True)
        if not found:
            console.print("the broker has all exchanges and queues, with the right arguments")
    if found:
        raise typer.Exit(1)
