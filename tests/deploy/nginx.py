"""The nginx of Debian with the configuration of deploy/nginx, on this machine's loopback addresses."""

from __future__ import annotations

import ssl
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from inferq.producer.up.part import find_program, free_ports
from tests.certificates import certificate
from tests.deploy.units import ROOT
from tests.waiting import eventually

CONFIGURATION = ROOT / "deploy/nginx"
_FOLDERS = [ROOT / ".make/nginx/usr/sbin", Path("/usr/sbin")]
_NAME = "inferq.example.com"

_MAIN = """
daemon off;
master_process off;
pid {folder}/pid;
error_log {folder}/error.log;
events {{}}
http {{
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/other;
    uwsgi_temp_path {folder}/other;
    scgi_temp_path {folder}/other;
    access_log off;
    gzip on;
    include {folder}/inferq.conf;
}}
"""


@dataclass(frozen=True)
class Nginx:
    """A running nginx. `url` is its address with TLS, `plain_url` the one without."""

    folder: Path
    url: str
    plain_url: str
    trusting: ssl.SSLContext
    pid: int

    def client(self, key: str = "", *, address: str = "127.0.0.2", path: str = "") -> httpx.Client:
        """A client with that address, below a path."""
        transport = httpx.HTTPTransport(verify=self.trusting, local_address=address)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(base_url=self.url + path, headers=headers, transport=transport, timeout=70)

    def log(self) -> list[str]:
        return (self.folder / "access.log").read_text("utf-8").splitlines()

    def on_disk(self) -> list[str]:
        """Bodies of requests and answers that nginx has on the disk. It unlinks such a file once it is open."""
        opened = []
        for file in Path(f"/proc/{self.pid}/fd").iterdir():
            with suppress(FileNotFoundError):
                opened.append(str(file.readlink()))
        return [name for name in opened if name.startswith((f"{self.folder}/body/", f"{self.folder}/proxy/"))]


class Ports:
    """The ports of an nginx, known before it and the gateway behind it run."""

    def __init__(self) -> None:
        self.tls, self.plain = free_ports(2)
        self.url = f"https://127.0.0.1:{self.tls}"


@contextmanager
def running_nginx(
    folder: Path, upstream: str, ports: Ports, *, edit: Callable[[str], str] = lambda text: text
) -> Iterator[Nginx]:
    """Run nginx in front of `upstream`. `edit` gets each file of the configuration, as a person would edit it."""
    program = find_program("nginx", _FOLDERS)
    if program is None:
        pytest.skip("nginx is neither on PATH nor in .make/nginx; `make nginx` fetches it")
    _, trusting = certificate(folder, _NAME)
    trusting.check_hostname = False
    here = {
        "server 127.0.0.1:8000;": f"server {urlsplit(upstream).netloc};",
        "listen 80;": f"listen 127.0.0.1:{ports.plain};",
        "listen [::]:80;": "",
        "listen 443 ssl http2;": f"listen 127.0.0.1:{ports.tls} ssl http2;",
        "listen [::]:443 ssl http2;": "",
        "/etc/nginx/inferq/fullchain.pem": f"{folder}/{_NAME}.pem",
        "/etc/nginx/inferq/privkey.pem": f"{folder}/{_NAME}.pem",
        "/var/log/nginx/inferq.log": f"{folder}/access.log",
        "include inferq/": f"include {folder}/inferq/",
    }
    (folder / "inferq").mkdir()
    for file in CONFIGURATION.rglob("*.conf"):
        text = edit(file.read_text("utf-8"))
        for line, other in here.items():
            assert line in text or file.name != "inferq.conf", line
            text = text.replace(line, other)
        (folder / file.relative_to(CONFIGURATION)).write_text(text, "utf-8")
    (folder / "nginx.conf").write_text(_MAIN.format(folder=folder), "utf-8")
    process = subprocess.Popen(
        [program, "-p", folder, "-e", folder / "error.log", "-c", folder / "nginx.conf"]
    )
    try:
        nginx = Nginx(folder, ports.url, f"http://127.0.0.1:{ports.plain}", trusting, process.pid)
        eventually(lambda: process.poll() is not None or _listens(nginx.plain_url))
        assert process.poll() is None, (folder / "error.log").read_text("utf-8")
        yield nginx
    finally:
        process.terminate()
        process.wait(20)


def _listens(url: str) -> bool:
    try:
        httpx.get(url, trust_env=False)
    except httpx.TransportError:
        return False
    return True
