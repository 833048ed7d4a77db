"""All parts as processes, each with a user of its own that has the rights of docs/rights.md, and no more."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
import httpx
import redis

from inferq.broker import BrokerSettings, connect
from inferq.producer.gateway.keys import KeyFile
from inferq.producer.up.part import free_ports
from inferq.storage.objects.s3 import S3Store
from tests.conftest import RabbitMQ, Redis
from tests.rights.page import Rights, read_page
from tests.waiting import eventually, takes_work

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

TYPE = "faulty"
PASSWORD = "planted-password"
PARTS: dict[str, tuple[str, ...]] = {
    "gateway": ("gateway", "--host", "127.0.0.1"),
    "worker": ("worker", TYPE),
    "callbacks": ("callbacks", "--queues", "callbacks"),
    "batches": ("callbacks", "--queues", "batches"),
    "monitor": ("monitor",),
}
"""The users of the parts that run as processes, and their commands."""

PLUGIN = Path(__file__).parents[1] / "plugin"
_TRACE = "trace"


@dataclass
class Site:
    """The services, and the users of the page; `start` starts the parts."""

    folder: Path
    rabbitmq: RabbitMQ
    redis: redis.Redis
    redis_port: int
    s3_url: str
    s3_log: Path
    vhost: str
    page: dict[str, Rights]
    keys: dict[str, tuple[str, str]] = field(default_factory=dict)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ports = free_ports(len(PARTS))
        self.ports = dict(zip(PARTS, ports, strict=True))
        api_keys = KeyFile(self.folder / "keys.json")
        self.http = httpx.Client(
            base_url=f"http://127.0.0.1:{self.ports['gateway']}",
            headers={"Authorization": f"Bearer {api_keys.add('default')}"},
            timeout=60,
            verify=False,
        )

    def amqp_url(self, user: str) -> str:
        return f"amqp://{self.vhost}-{user}:{PASSWORD}@127.0.0.1:{self.rabbitmq.port}/{self.vhost}"

    def redis_url(self, user: str) -> str:
        """Without an ACL on the page, an address that nobody answers."""
        if not self.page[user].acl:
            return "redis://127.0.0.1:1/0"
        return f"redis://{user}:{PASSWORD}@127.0.0.1:{self.redis_port}/0"

    def s3(self, user: str) -> S3Client:
        key, secret = self.keys[user]
        return boto3.Session().client(
            "s3",
            endpoint_url=self.s3_url,
            region_name="us-east-1",
            aws_access_key_id=key,
            aws_secret_access_key=secret,
        )

    def store(self, user: str) -> S3Store:
        return S3Store("results", "inferq", client=self.s3(user))

    def env(self, user: str) -> dict[str, str]:
        key, secret = self.keys.get(user, ("none", "none"))
        return os.environ | {
            "INFERQ_AMQP_URL": self.amqp_url(user),
            "INFERQ_REDIS_URL": self.redis_url(user),
            "INFERQ_STORE_URL": "s3://results/inferq",
            "INFERQ_S3_ENDPOINT_URL": self.s3_url,
            "INFERQ_FETCH_S3_BUCKETS": "scans",
            "AWS_ACCESS_KEY_ID": key,
            "AWS_SECRET_ACCESS_KEY": secret,
            "INFERQ_API_KEYS_FILE": str(self.folder / "keys.json"),
            "INFERQ_SCHEDULES_FILE": str(self.folder / "schedules.toml"),
            "INFERQ_WEBHOOK_SECRETS_FILE": str(self.folder / "secrets.json"),
            "INFERQ_CALLBACK_ALLOWED_NETWORKS": "127.0.0.0/8",
            "INFERQ_CALLBACK_SCHEDULE": "0,1,1",
            "INFERQ_SCRATCH_DIR": str(self.folder / "scratch"),
            "INFERQ_RESULT_CACHE": "true",
            "INFERQ_MONITOR_RECORDS_INTERVAL": "1",
            "INFERQ_LOG_LEVEL": "DEBUG",
            "PYTHONPATH": str(PLUGIN),
        }

    def start(self) -> None:
        for part, command in PARTS.items():
            port = str(self.ports[part])
            with self.log(part).open("wb") as log:
                self.processes[part] = subprocess.Popen(
                    [sys.executable, "-P", "-m", "inferq.producer.cli", *command],
                    env=self.env(part) | {"INFERQ_PROBE_PORT": port, "INFERQ_GATEWAY_PORT": port},
                    stdout=log,
                    stderr=log,
                )
        for part in PARTS:
            eventually(lambda part=part: self._ready(part), f"a ready {part}", seconds=180)  # type: ignore[misc]

    def _ready(self, part: str) -> bool:
        assert self.processes[part].poll() is None, self.log(part).read_text()
        try:
            answer = httpx.get(f"http://127.0.0.1:{self.ports[part]}/readyz", timeout=10, verify=False)
        except httpx.TransportError:
            return False
        return takes_work(answer) and "degraded" not in answer.text

    def stop(self) -> None:
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            process.wait(30)

    def log(self, part: str) -> Path:
        return self.folder / f"{part}.log"

    # What the parts used.

    def used_objects(self) -> dict[str, set[tuple[str, str, bool]]]:
        """Of each user the actions, with the resource and whether it was allowed."""
        users = {key: user for user, (key, _) in self.keys.items()}
        used: defaultdict[str, set[tuple[str, str, bool]]] = defaultdict(set)
        for line in self.s3_log.read_text().splitlines():
            key, action, resource, allowed = json.loads(line)
            used[users[key]].add((action, resource, allowed))
        return used

    def used_queues(self) -> dict[str, set[str]]:
        """Of each user what it did, as `publish.EXCHANGE` and `deliver.QUEUE`, by RabbitMQ's firehose."""
        used: defaultdict[str, set[str]] = defaultdict(set)
        with _admin(self.rabbitmq, self.vhost) as channel:
            while True:
                method, properties, _ = channel.basic_get(_TRACE, auto_ack=True)
                if method is None:
                    return used
                user = properties.headers["user"].removeprefix(f"{self.vhost}-")
                used[user].add(method.routing_key)

    # Making users.

    def permit(self, user: str, permissions: tuple[str, str, str]) -> None:
        name = f"{self.vhost}-{user}"
        management = self.rabbitmq.management
        management.put(f"/users/{name}", json={"password": PASSWORD, "tags": ""}).raise_for_status()
        rights = dict(zip(("configure", "write", "read"), permissions, strict=True))
        management.put(f"/permissions/{self.vhost}/{name}", json=rights).raise_for_status()

    def set_acl(self, user: str, acl: tuple[str, ...]) -> None:
        words = [f">{PASSWORD}" if word == ">PASSWORD" else word for word in acl]
        self.redis.execute_command("ACL", "SETUSER", user, *words)

    def set_policy(self, user: str, policy: Mapping[str, Any]) -> None:
        iam = boto3.client(
            "iam", endpoint_url=self.s3_url, region_name="us-east-1",
            aws_access_key_id="none", aws_secret_access_key="none",
        )  # fmt: skip
        if user not in self.keys:
            iam.create_user(UserName=user)
            key = iam.create_access_key(UserName=user)["AccessKey"]
            self.keys[user] = key["AccessKeyId"], key["SecretAccessKey"]
        iam.put_user_policy(UserName=user, PolicyName="rights", PolicyDocument=json.dumps(policy))
        iam.close()

    def forget_users(self) -> None:
        for user in (*self.page, "less"):
            self.rabbitmq.management.delete(f"/users/{self.vhost}-{user}")


@contextmanager
def _admin(rabbitmq: RabbitMQ, vhost: str) -> Iterator[Any]:
    settings = BrokerSettings(amqp_url=rabbitmq.node.url_of(vhost))
    connection = connect(settings, name="test")
    try:
        yield connection.channel()
    finally:
        connection.close()


@contextmanager
def site_in(folder: Path, rabbitmq: RabbitMQ, server: Redis) -> Iterator[Site]:
    vhost = f"rights-{uuid.uuid4().hex[:8]}"
    rabbitmq.add_vhost(vhost)
    log = folder / "s3.log"
    moto = subprocess.Popen(
        [sys.executable, "-m", "tests.rights.moto_iam", str(log)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    site = None
    try:
        assert moto.stdout
        s3_url = f"http://127.0.0.1:{int(moto.stdout.readline())}"
        client = redis.Redis.from_url(server.url, decode_responses=True)
        site = Site(folder, rabbitmq, client, server.port, s3_url, log, vhost, read_page(task_type=TYPE))
        for user, rights in site.page.items():
            site.permit(user, rights.permissions)
            if rights.acl:
                site.set_acl(user, rights.acl)
            if rights.policy is not None:
                site.set_policy(user, rights.policy)
        everything = {"Effect": "Allow", "Action": "s3:*", "Resource": "*"}
        site.set_policy("admin", {"Version": "2012-10-17", "Statement": [everything]})
        yield site
    finally:
        if site is not None:
            site.stop()
            site.http.close()
            site.redis.close()
            site.forget_users()
        moto.kill()
        moto.communicate()
        rabbitmq.remove_vhost(vhost)


def prepare(site: Site, source: Mapping[str, bytes]) -> None:
    """Buckets, inputs, schedules that beat knows, and the trace of what is published and delivered."""
    s3 = site.s3("admin")
    for bucket in ("results", "scans"):
        s3.create_bucket(Bucket=bucket)
    for name, content in source.items():
        s3.put_object(Bucket="scans", Key=name, Body=content)
    s3.close()
    management = site.rabbitmq.management
    # Of a queue's own time to live and a policy's the shorter holds: the first retry comes at once.
    management.put(
        f"/policies/{site.vhost}/hurry",
        json={"pattern": r"^inference\.retry\.", "apply-to": "queues", "definition": {"message-ttl": 400}},
    ).raise_for_status()
    with _admin(site.rabbitmq, site.vhost) as channel:
        channel.queue_declare(_TRACE, durable=True)
        channel.queue_bind(_TRACE, "amq.rabbitmq.trace", "#")
    management.put(f"/vhosts/{site.vhost}", json={"tracing": True}).raise_for_status()
