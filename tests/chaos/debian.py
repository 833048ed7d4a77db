"""RabbitMQ 4 on a machine that has another one: from a Debian 13 root, entered with chroot."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

_MIRROR = "http://deb.debian.org/debian"
_PROGRAMS = ("rabbitmq-server", "rabbitmqctl")

# The mounts belong to a namespace of the program's own, and are gone with it.
_WRAPPER = """\
#!/bin/sh
exec unshare --mount -- sh -c '
root=$1; program=$2; shift 2
mount --rbind /proc "$root/proc" && mount --rbind /dev "$root/dev" || exit 1
mkdir -p "$root{temporary}" && mount --bind {temporary} "$root{temporary}" || exit 1
exec chroot "$root" "/usr/lib/rabbitmq/bin/$program" "$@"' sh '{root}' {program} "$@"
"""


class NotHere(Exception):
    """This machine does not allow it; the message says why."""


def rabbitmq_4(folder: Path) -> Path:
    """A folder for RABBITMQ_HOME, below `folder`, whose programs are those of RabbitMQ 4.

    Made on first use, which downloads 100 MB and takes a minute or two. Raises NotHere.
    """
    root, home = folder / "root", folder / "home"
    if not (folder / "complete").exists():
        _make(root)
        (folder / "complete").touch()
    shutil.copy("/etc/hosts", root / "etc" / "hosts")
    for program in _PROGRAMS:
        wrapper = home / "sbin" / program
        wrapper.parent.mkdir(parents=True, exist_ok=True)
        text = _WRAPPER.format(root=root, program=program, temporary=tempfile.gettempdir())
        wrapper.write_text(text, "utf-8")
        wrapper.chmod(0o755)
    tried = subprocess.run(
        [str(home / "sbin" / "rabbitmqctl"), "version"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if tried.returncode:
        raise NotHere(f"RabbitMQ 4 does not start in {root}: {tried.stdout}{tried.stderr}")
    return home


def _make(root: Path) -> None:
    if os.geteuid() != 0:
        raise NotHere("a Debian 13 root for RabbitMQ 4 can only be made by root")
    if shutil.which("debootstrap") is None:
        raise NotHere(
            "debootstrap is not installed; run: apt-get install --no-install-recommends debootstrap"
        )
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    made = subprocess.run(
        ["debootstrap", "--variant=minbase", "--include=rabbitmq-server,ca-certificates", "trixie",
         str(root), _MIRROR],
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    if made.returncode:
        raise NotHere(f"debootstrap failed: {made.stdout[-500:]}{made.stderr[-500:]}")
