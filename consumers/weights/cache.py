"""The cache of model weights: processes share it, and verify before each load the files that may have changed.

The manifest (inferq.consumers.weights.manifest) lists all weights, with the size and the SHA-256 of each file.

    <cache>/<name>/<version>/           the files, complete
    <cache>/<name>/<version>.partial/   the files and parts that are fetched so far
    <cache>/<name>/<version>.lock       locked exclusively during a fetch, shared during use
    <cache>/.verified-UID/              which files were verified (inferq.consumers.weights.stamps)

The kernel releases these locks when their process ends, also after a crash.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, BinaryIO, Literal
from urllib.parse import quote, unquote, urlsplit

from pydantic import Field

from inferq.consumers.weights.manifest import (
    Manifest,
    Weights,
    WeightsFile,
    WeightsRefused,
    check_signature,
    read_manifest,
)
from inferq.consumers.weights.stamps import Figures, Stamps, figures
from inferq.schemas import Settings, TransientFailure, expand_home

_CHUNK_BYTES = 1 << 20
_CONNECT_SECONDS = 30.0
_COMPLETE = ""
_PARTIAL = ".partial"


class WeightsSettings(Settings):
    """The manifest of the weights, its public key, and the cache."""

    weights_manifest: str | None = Field(
        None,
        description="The manifest of all weights, `weights.toml`: a path, or a URL (`s3://`, `file://`, "
        "`https://`). Engines with weights in a package need no manifest.",
    )
    weights_cache: Path = Field(
        default_factory=lambda: Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "inferq" / "weights",
        description="The folder of the weights' cache. Workers on one machine can share it.",
    )
    weights_public_key: Path | None = Field(
        None,
        description="The ed25519 public key (a PEM file) that verifies the manifest's signature. Without it, "
        "signatures are not checked.",
    )
    weights_check: Literal["changed", "always"] = Field(
        "changed",
        description="Which cached files are read and compared with the manifest before each load: those that "
        "`changed` since they were last compared, or `always` all.",
    )


class WeightsUnavailable(TransientFailure):
    """A source cannot be read, or the cache cannot be written, for example because its disk is full."""

    code = "weights_unavailable"


@dataclass
class LoadedWeights:
    """A version in use. The cache keeps it until `close` or the end of this process."""

    name: str
    folder: Path
    version: str
    _lock: BinaryIO = field(repr=False)

    @property
    def open(self) -> bool:
        return not self._lock.closed

    def close(self) -> None:
        self._lock.close()


def use_weights(name: str) -> LoadedWeights:
    """The current version of named weights, verified. They are fetched if the cache lacks them.

    Raises WeightsRefused if a file or the manifest is wrong, WeightsUnavailable if a source or the cache is.
    """
    weights = WeightsCache(WeightsSettings.load()).use(name)
    _in_use.append(weights)
    return weights


_in_use: list[LoadedWeights] = []


def weights_in_use() -> tuple[str, ...]:
    """The weights that this process uses, each as `name version`."""
    return tuple(sorted({f"{w.name} {w.version}" for w in _in_use if w.open}))


def model_folder(where: Path) -> Path:
    """The folder that an engine's setting names: a path, or `weights:NAME` for an entry of the manifest.

    The cache keeps named weights until this process ends. Raises WeightsRefused and WeightsUnavailable.
    """
    scheme, _, name = str(where).partition(":")
    if scheme != "weights":
        return where
    return use_weights(name).folder


class WeightsCache:
    """This machine's cache of the manifest's weights. Many processes can use it at once."""

    def __init__(self, settings: WeightsSettings) -> None:
        self._settings = settings
        self._root = expand_home("INFERQ_WEIGHTS_CACHE", settings.weights_cache)

    def manifest(self) -> Manifest:
        """The current manifest. Its signature is checked if a public key is set."""
        where = self._settings.weights_manifest
        if where is None:
            raise WeightsRefused(
                "there is no manifest of weights: set INFERQ_WEIGHTS_MANIFEST to a weights.toml"
            )
        data = self._read(where)
        if self._settings.weights_public_key is not None:
            check_signature(data, self._read(f"{where}.sig"), self._settings.weights_public_key, where)
        return read_manifest(data, where)

    def use(self, name: str) -> LoadedWeights:
        """The current version, verified and locked against removal. Removes older versions that are not in use."""
        weights = self._current(name)
        while True:
            lock = self._lock(name, weights.version)
            try:
                fcntl.flock(lock, fcntl.LOCK_SH)
                if (folder := self._folder(name, weights.version)).is_dir():
                    self._check(folder, name, weights, trusted=self._settings.weights_check == "changed")
                    break
            except BaseException:
                lock.close()
                raise
            lock.close()
            self.pull(name)
        self.prune(name)
        return LoadedWeights(name, folder, weights.version, lock)

    def pull(self, name: str, progress: Callable[[int], None] = lambda _count: None) -> Path:
        """Fetch the current version unless the cache holds it and all its files match. Gives its folder.

        `progress` gets the number of bytes of each piece. Files that do not match are fetched again; if a
        process uses them, this raises WeightsRefused.
        """
        weights = self._current(name)
        folder = self._folder(name, weights.version)
        with self._lock(name, weights.version) as lock:
            fcntl.flock(lock, fcntl.LOCK_SH if folder.is_dir() else fcntl.LOCK_EX)
            if folder.is_dir():
                try:
                    self._check(folder, name, weights)
                except WeightsRefused:
                    self._set_aside(lock, folder)
                else:
                    return folder
            partial, verified = self._folder(name, weights.version, _PARTIAL), {}
            for path, file in weights.files.items():
                found = self._fetch(_join(weights.source, path), partial / path, file, progress)
                verified[path] = (file.sha256, found)
            with _disk(partial):
                _flush(partial)
                partial.rename(folder)
                _flush(folder.parent)
            Stamps(self._root, name, weights.version).save(verified)
        return folder

    def verify(self, name: str) -> None:
        """Read and check all cached files of the current version. Raises WeightsRefused for the first bad one."""
        weights = self._current(name)
        folder = self._folder(name, weights.version)
        if not folder.is_dir():
            raise WeightsRefused(
                f"weights {name} {weights.version} are not in {self._root}: run inferq weights pull {name}"
            )
        self._check(folder, name, weights)

    def prune(self, name: str) -> list[str]:
        """Remove the versions that are neither current nor in use. Gives the removed ones."""
        current = self._current(name).version
        gone = []
        for version in self.versions(name):
            if version == current:
                continue
            with self._lock(name, version) as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                for stage in (_COMPLETE, _PARTIAL):
                    shutil.rmtree(self._folder(name, version, stage), ignore_errors=True)
                Stamps(self._root, name, version).forget()
                gone.append(version)
        return gone

    def versions(self, name: str) -> list[str]:
        """The versions in the cache, complete or partial."""
        with suppress(FileNotFoundError):
            return sorted(
                {p.name.removesuffix(_PARTIAL) for p in (self._root / name).iterdir() if p.is_dir()}
            )
        return []

    def held(self, name: str) -> bool:
        """Whether the cache holds the complete current version. This does not read its files."""
        return self._folder(name, self._current(name).version).is_dir()

    def _current(self, name: str) -> Weights:
        manifest = self.manifest()
        if name not in manifest:
            known = ", ".join(sorted(manifest)) or "none"
            raise WeightsRefused(
                f"{self._settings.weights_manifest} has no weights {name!r}; it has: {known}"
            )
        return manifest[name]

    def _folder(self, name: str, version: str, stage: str = _COMPLETE) -> Path:
        return self._root / name / f"{version}{stage}"

    def _lock(self, name: str, version: str) -> BinaryIO:
        path = self._root / name / f"{version}.lock"
        with _disk(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            # Never remove lock files: another process may have opened the file, and would then lock a deleted one.
            return path.open("ab")

    def _check(self, folder: Path, name: str, weights: Weights, *, trusted: bool = False) -> None:
        """Raises WeightsRefused for a file that does not match. `trusted`: stamps spare reading unchanged files."""
        stamps = Stamps(self._root, name, weights.version)
        known = stamps.load() if trusted else {}
        verified = {}
        for path, wanted in weights.files.items():
            found = _check_file(folder / path, wanted, known.get(path))
            if isinstance(found, str):
                stamps.forget()
                raise WeightsRefused(
                    f"weights {name} {weights.version}: {folder / path} {found}; "
                    f"fetch it again: inferq weights pull {name}"
                )
            verified[path] = (wanted.sha256, found)
        if verified != known:
            stamps.save(verified)

    def _set_aside(self, lock: BinaryIO, folder: Path) -> None:
        """Make a complete version with bad files a partial one, so that the next fetch repairs it."""
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise WeightsRefused(
                f"a file in {folder} does not match the manifest, and a worker uses it: "
                "stop the workers, then pull again"
            ) from None
        partial = folder.with_name(folder.name + _PARTIAL)
        with _disk(folder):
            shutil.rmtree(partial, ignore_errors=True)
            folder.rename(partial)

    def _fetch(self, url: str, path: Path, wanted: WeightsFile, progress: Callable[[int], None]) -> Figures:
        """Fetch what is missing of a file, and gives its figures. What is fetched is hashed on its way to the disk."""
        with _disk(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            have = path.stat().st_size if path.exists() else 0
            if have == wanted.size and not isinstance(found := _check_file(path, wanted), str):
                progress(have)
                return found
            if have >= wanted.size:
                path.unlink(missing_ok=True)
                have = 0
            with path.open("a+b") as file:
                file.seek(0)
                digest = hashlib.file_digest(file, "sha256") if have else hashlib.sha256()
                digest = self._append(url, file, digest, have, wanted.size, progress)
                file.flush()
                os.fsync(file.fileno())
                status = os.fstat(file.fileno())
        fault = _fault_of(status.st_size, wanted) or _fault_of_content(digest.hexdigest(), wanted)
        if fault:
            if status.st_size >= wanted.size:
                path.unlink()  # a short file can be continued; a wrong one cannot
            raise WeightsRefused(f"{url} {fault}: correct the source or the manifest")
        return figures(status)

    def _append(
        self,
        url: str,
        file: IO[bytes],
        digest: Any,
        have: int,
        size: int,
        progress: Callable[[int], None],
    ) -> Any:
        """Append the rest of a file, of which `digest` has seen `have` bytes. Gives the digest of all of it."""
        with self._open(url) as source:
            if have:
                try:
                    source.seek(have)
                except io.UnsupportedOperation:  # the server does not support ranges: start again
                    file.truncate(0)
                    return self._append(url, file, hashlib.sha256(), 0, size, progress)
                progress(have)
            left = size + 1 - have  # one byte more reveals a file that is too long, without fetching it all
            while left > 0 and (piece := source.read(min(_CHUNK_BYTES, left))):
                with _disk(Path(file.name)):
                    file.write(piece)
                digest.update(piece)
                progress(len(piece))
                left -= len(piece)
        return digest

    def _read(self, where: str) -> bytes:
        if "://" not in where:
            where = expand_home("INFERQ_WEIGHTS_MANIFEST", Path(where)).absolute().as_uri()
        with self._open(where) as source:
            return source.read()

    @contextmanager
    def _open(self, url: str) -> Iterator[IO[bytes]]:
        """Open a source for reading. Raises WeightsUnavailable, also for errors during the read."""
        scheme = urlsplit(url).scheme
        parameters: dict[str, Any] = {}
        errors: tuple[type[Exception], ...] = (OSError, ValueError)  # requests' errors are OSErrors
        if scheme == "s3":
            from botocore.exceptions import BotoCoreError, ClientError

            from inferq.storage.objects.s3 import s3_client
            from inferq.storage.settings import StorageSettings

            parameters["client"] = s3_client(StorageSettings.load().s3_endpoint_url)
            errors += (BotoCoreError, ClientError)
        elif scheme == "https":
            parameters["timeout"] = _CONNECT_SECONDS
        try:
            if scheme == "file":
                with Path(unquote(urlsplit(url).path)).open("rb") as file:
                    yield file
            else:
                import smart_open  # it imports requests, which is slow; local files do not need it

                with smart_open.open(url, "rb", compression="disable", transport_params=parameters) as far:
                    yield far
        except io.UnsupportedOperation:  # the source is fine, but cannot seek
            raise
        except errors as error:
            raise WeightsUnavailable(f"{url} cannot be read: {error}") from error


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise WeightsUnavailable(
            f"the weights cache cannot be used: {path}: {error.strerror}; "
            "free disk space, or set INFERQ_WEIGHTS_CACHE to another folder"
        ) from error


def _check_file(path: Path, wanted: WeightsFile, known: tuple[str, Figures] | None = None) -> Figures | str:
    """The figures of a file that matches, or its fault. A file that is as `known` is not read."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return "is missing"
    with file:
        status = os.fstat(file.fileno())
        if fault := _fault_of(status.st_size, wanted):
            return fault
        if known == (wanted.sha256, figures(status)):
            return figures(status)
        return _fault_of_content(hashlib.file_digest(file, "sha256").hexdigest(), wanted) or figures(status)


def _fault_of(size: int, wanted: WeightsFile) -> str | None:
    if size == wanted.size:
        return None
    more = " or more" if size > wanted.size else ""
    return f"has {size}{more} bytes instead of {wanted.size}"


def _fault_of_content(sha256: str, wanted: WeightsFile) -> str | None:
    return None if sha256 == wanted.sha256 else f"has the SHA-256 {sha256} instead of {wanted.sha256}"


def _join(source: str, path: str) -> str:
    quoted = path if source.startswith("s3:") else quote(path)  # an S3 key is not quoted
    return f"{source.rstrip('/')}/{quoted}"


def _flush(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
