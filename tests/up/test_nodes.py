"""The private RabbitMQ and Redis: where they listen, who may use them, and what they keep."""

from __future__ import annotations

import socket
import stat
from pathlib import Path

import pika
import pytest
import redis

from inferq.broker import BrokerSettings, BrokerUnavailable, connect
from inferq.producer.up import rabbitmq
from inferq.producer.up import redis as private_redis
from inferq.producer.up.part import (
    find_program,
    free_ports,
    kept_secret,
    port_answers,
    port_free,
    private_text,
)
from inferq.schemas import InstallationError

LISTEN = "0A"


def listeners(pid: int) -> set[tuple[str, int]]:
    """Address (as the kernel writes it) and port of each TCP socket on which a process listens."""
    inodes = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = str(entry.readlink())
        except FileNotFoundError:
            continue  # closed meanwhile
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTEN and fields[9] in inodes:
                address, port = fields[1].split(":")
                found.add((address, int(port, 16)))
    return found


LOOPBACK_AS_HEX = "0100007F"


def test_rabbitmq_listens_on_loopback_only(shared_rabbitmq) -> None:
    ports = shared_rabbitmq.node.ports
    expected = {ports.amqp, ports.management, ports.prometheus, ports.distribution}
    assert listeners(shared_rabbitmq.pid()) == {(LOOPBACK_AS_HEX, port) for port in expected}


def test_redis_listens_on_loopback_only(shared_redis) -> None:
    assert listeners(shared_redis.pid()) == {(LOOPBACK_AS_HEX, shared_redis.port)}


def test_rabbitmq_refuses_guest_and_wrong_passwords(shared_rabbitmq) -> None:
    port = shared_rabbitmq.port
    reason = "the broker refuses the user or the password"
    assert rabbitmq.handshake(f"amqp://guest:guest@127.0.0.1:{port}/") == reason
    assert rabbitmq.handshake(f"amqp://{rabbitmq.USER}:wrong@127.0.0.1:{port}/") == reason
    assert rabbitmq.handshake(shared_rabbitmq.url) is None


def test_a_server_that_accepts_and_is_silent_is_no_broker() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"amqp://127.0.0.1:{server.getsockname()[1]}/"
        assert "does not answer" in rabbitmq.handshake(url, seconds=0.2)
        with pytest.raises(BrokerUnavailable, match="cannot be reached"):
            connect(BrokerSettings(amqp_url=url, amqp_connect_timeout=0.5), name="test")


def test_handshake_names_a_virtual_host_that_is_not_there(shared_rabbitmq) -> None:
    assert "virtual host" in rabbitmq.handshake(shared_rabbitmq.node.url_of("nowhere"))


def test_full_redis_refuses_writes_before_the_machine_is_full(shared_redis) -> None:
    with redis.Redis.from_url(shared_redis.url) as client:
        memory = client.info("memory")
    assert memory["maxmemory_policy"] == "noeviction"
    assert 0 < memory["maxmemory"] < memory["total_system_memory"] / 2


def test_redis_takes_a_quarter_of_what_a_container_may_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "memory.max").write_text(f"{400 << 20}\n")
    monkeypatch.setattr("inferq.schemas.memory.CGROUP_LIMITS", (tmp_path / "memory.max",))
    server = private_redis.RedisServer.prepare(tmp_path / "redis", 1)
    assert f"maxmemory {100 << 20}\n" in (server.folder / "redis.conf").read_text()


def test_redis_refuses_whoever_has_no_password(shared_redis) -> None:
    assert private_redis.ping(shared_redis.url) is None
    assert "uthenticat" in private_redis.ping(f"redis://127.0.0.1:{shared_redis.port}/0")


def test_secrets_are_readable_by_their_owner_only(shared_rabbitmq, shared_redis) -> None:
    for folder, names in (
        (shared_rabbitmq.node.folder, ("password", "rabbitmq.conf", "home/.erlang.cookie")),
        (shared_redis.server.folder, ("password", "redis.conf")),
    ):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        for name in names:
            assert (folder / name).stat().st_mode & 0o077 == 0, name


def test_the_erlang_cookie_cannot_be_guessed(tmp_path: Path) -> None:
    """Erlang derives a missing one from the time (36 bits), and it lets its owner run code as the node's user."""
    cookies = []
    for made_by_erlang in (None, "QWERTYUIOPASDFGHJKLZ"):
        folder = tmp_path / str(made_by_erlang)
        cookie = folder / "home" / ".erlang.cookie"
        if made_by_erlang is not None:
            cookie.parent.mkdir(parents=True)
            cookie.write_text(made_by_erlang)
        ports = rabbitmq.RabbitPorts(*free_ports(5))
        rabbitmq.RabbitNode.prepare(folder, ports)
        cookies.append(cookie.read_text())
        rabbitmq.RabbitNode.prepare(folder, ports)
        assert cookie.read_text() == cookies[-1]
        assert len(cookies[-1]) >= 40
    assert len(set(cookies)) == 2


def test_virtual_hosts_are_empty_and_apart(fresh_amqp_url, shared_rabbitmq) -> None:
    with pika.BlockingConnection(pika.URLParameters(fresh_amqp_url)) as connection:
        connection.channel().queue_declare("apart", durable=True)
    with pika.BlockingConnection(pika.URLParameters(shared_rabbitmq.url)) as connection:
        with pytest.raises(pika.exceptions.ChannelClosedByBroker, match="NOT_FOUND"):
            connection.channel().queue_declare("apart", passive=True)


def test_rabbitmq_keeps_messages_through_a_kill(rabbit_node) -> None:
    with pika.BlockingConnection(pika.URLParameters(rabbit_node.url)) as connection:
        channel = connection.channel()
        channel.confirm_delivery()
        channel.queue_declare("kept", durable=True, arguments={"x-queue-type": "quorum"})
        channel.basic_publish("", "kept", b"1", pika.BasicProperties(delivery_mode=2))
    rabbit_node.kill()
    assert rabbitmq.handshake(rabbit_node.url) is not None
    rabbit_node.start()
    with pika.BlockingConnection(pika.URLParameters(rabbit_node.url)) as connection:
        assert connection.channel().basic_get("kept", auto_ack=True)[2] == b"1"


def test_redis_keeps_data_through_a_stop_and_a_kill(redis_node) -> None:
    with redis.Redis.from_url(redis_node.url) as client:
        client.set("a", 1)
        redis_node.stop()
        assert private_redis.ping(redis_node.url) is not None
        redis_node.start()
        client.set("b", 2)
        redis_node.kill()
        redis_node.start()
        assert (client.get("a"), client.get("b")) == (b"1", b"2")


def test_redis_runs_in_a_folder_with_an_awkward_name(tmp_path: Path) -> None:
    # The configuration must not depend on how the folder's name is quoted.
    server = private_redis.RedisServer.prepare(tmp_path / 'a "b" ü #c', free_ports(1)[0])
    part = server.part()
    assert part.probe() is not None
    from inferq.producer.up.process import spawn, stop

    process = spawn(part, tmp_path / "log")
    try:
        while (reason := part.probe()) is not None:
            assert process.poll() is None, (reason, (tmp_path / "log").read_text())
    finally:
        stop(process, part)


def test_foreign_settings_of_rabbitmq_do_not_leak_in(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("RABBITMQ_NODENAME", "theirs@elsewhere")
    monkeypatch.setenv("RABBITMQ_USE_LONGNAME", "true")
    monkeypatch.setenv("ERL_LIBS", "/theirs")
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/theirs")
    node = rabbitmq.RabbitNode.prepare(tmp_path, rabbitmq.RabbitPorts(1, 2, 3, 4, 5))
    env = node.parts()[1].env
    assert env["RABBITMQ_NODENAME"] == "inferq@localhost"
    assert not {"RABBITMQ_USE_LONGNAME", "ERL_LIBS", "NOTIFY_SOCKET"} & set(env)


def test_password_is_kept_between_runs(tmp_path: Path) -> None:
    ports = rabbitmq.RabbitPorts(1, 2, 3, 4, 5)
    first = rabbitmq.RabbitNode.prepare(tmp_path, ports)
    assert rabbitmq.RabbitNode.prepare(tmp_path, ports).url == first.url
    assert len(first.password) >= 32


def test_moved_data_are_refused(tmp_path: Path) -> None:
    ports = rabbitmq.RabbitPorts(1, 2, 3, 4, 5)
    made = rabbitmq.RabbitNode.prepare(tmp_path / "here", ports)
    made.folder.rename(tmp_path / "there")
    with pytest.raises(InstallationError, match=rf"made in {tmp_path}/here") as refused:
        rabbitmq.RabbitNode.prepare(tmp_path / "there", ports)
    assert refused.value.code == "data_moved"
    (tmp_path / "there").rename(tmp_path / "here")
    assert rabbitmq.RabbitNode.prepare(tmp_path / "here", ports).url == made.url


def test_missing_programs_are_named_with_the_command_that_installs_them(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(rabbitmq, "find_program", lambda name, folders=(): None)
    monkeypatch.setattr(private_redis, "find_program", lambda name, folders=(): None)
    with pytest.raises(InstallationError, match=r"apt-get install .*rabbitmq-server"):
        rabbitmq.find_server()
    with pytest.raises(InstallationError, match=r"apt-get install .*erlang-base"):
        rabbitmq.find_epmd()
    with pytest.raises(InstallationError, match=r"apt-get install .*redis-server"):
        private_redis.find_server()


def test_wrapper_that_changes_user_does_not_count_as_rabbitmq(monkeypatch) -> None:
    monkeypatch.setattr(rabbitmq, "find_program", lambda name, folders=(): Path("/usr/sbin") / name)
    with pytest.raises(InstallationError):
        rabbitmq.find_server()


def test_rabbitmq_home_comes_first(tmp_path: Path, monkeypatch) -> None:
    program = tmp_path / "sbin" / "rabbitmq-server"
    program.parent.mkdir()
    program.touch(mode=0o755)
    monkeypatch.setenv("RABBITMQ_HOME", str(tmp_path))
    assert rabbitmq.find_server() == program


def test_program_that_cannot_be_executed_is_passed_over(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "tool").touch(mode=0o644)
    monkeypatch.setenv("PATH", "/nonexistent")
    assert find_program("tool", [tmp_path]) is None


def test_taken_port_is_not_free() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        assert not port_free(port)
        assert port_answers(port) is None
    assert port_free(port)
    assert "refused" in port_answers(port)


def test_free_ports_differ_and_lie_below_the_outgoing_ones() -> None:
    ports = free_ports(50)
    assert len(set(ports)) == 50
    assert all(15000 <= port < 32000 for port in ports)


def test_a_port_given_out_is_kept_for_its_server() -> None:
    (port,) = free_ports(1)
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", port))
    for _ in range(2):
        with socket.create_server(("127.0.0.1", port)):
            assert port_answers(port) is None
        assert "refused" in (port_answers(port) or "")


def test_secret_is_made_once_and_an_empty_file_is_none(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    private_text(file, "\n")
    made = kept_secret(file)
    assert made
    assert kept_secret(file) == made
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [each.name for each in tmp_path.iterdir()] == ["secret"]
