"""Shared libraries that an environment needs and an image does not have.

This machine may have a library that the image lacks. Then everything starts here and nothing does there.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from elftools.common.exceptions import ELFError
from elftools.elf.dynamic import DynamicSection
from elftools.elf.elffile import ELFFile

# python:slim: Debian's essential packages, and what Python's own modules are linked with.
BASE = frozenset(
    [
        *(
            "ld-linux-x86-64.so.2",
            "ld-linux-aarch64.so.1",
            "libc.so.6",
            "libcrypt.so.1",
            "libdl.so.2",
            "libm.so.6",
        ),
        *("libmvec.so.1", "libpthread.so.0", "libresolv.so.2", "librt.so.1", "libutil.so.1", "libgcc_s.so.1"),
        *(
            "libstdc++.so.6",
            "libbz2.so.1.0",
            "libcrypto.so.3",
            "libffi.so.8",
            "liblzma.so.5",
            "libncursesw.so.6",
        ),
        *("libreadline.so.8", "libsqlite3.so.0", "libssl.so.3", "libtinfo.so.6", "libuuid.so.1", "libz.so.1"),
    ]
)
# The NVIDIA container runtime brings the driver's libraries.
DRIVER = frozenset({"libcuda.so.1", "libnvidia-ml.so.1"})
# NVIDIA's plug-ins for clusters are loaded only where their network is.
PLUG_INS = ("nvshmem_transport_", "nvshmem_bootstrap_", "libcufile_rdma")
OF_PACKAGES = {"libgomp1": frozenset({"libgomp.so.1"}), "curl": frozenset[str](), "ffmpeg": frozenset[str]()}


def missing(environment: Path, packages: frozenset[str]) -> dict[str, list[str]]:
    """The missing libraries, each with the files that need it.

    `packages` are the Debian packages that the image installs.
    """
    files = list(_files(environment))
    known = {path.name for path in files} | BASE | DRIVER
    known.update(*(OF_PACKAGES[package] for package in packages))
    lacking: dict[str, list[str]] = {}
    for path in files:
        own, needed = _names(path)
        known.add(own)
        for name in needed:
            lacking.setdefault(name, []).append(str(path.relative_to(environment)))
    return {name: needing for name, needing in sorted(lacking.items()) if name not in known}


def _files(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*.so*"):
        if path.is_file() and not path.is_symlink() and not path.name.startswith(PLUG_INS):
            yield path


def _names(path: Path) -> tuple[str, list[str]]:
    """The name that a library has for others, and the names of those that it needs."""
    with path.open("rb") as file:
        try:
            section = ELFFile(file).get_section_by_name(".dynamic")
        except ELFError:
            return "", []
        if not isinstance(section, DynamicSection):
            return "", []
        tags = list(section.iter_tags())
        own = next((tag.soname for tag in tags if tag.entry.d_tag == "DT_SONAME"), "")
        return own, [tag.needed for tag in tags if tag.entry.d_tag == "DT_NEEDED"]
