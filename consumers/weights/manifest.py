"""The manifest of weights: names, versions, sources, sizes and checksums of files; and its signature.

It is a TOML file, `weights.toml`, with a table per name:

    [ace-step]
    version = "1.5"
    source = "s3://models/ace-step/1.5"     # or file:// or https://

    [ace-step.files."vae/model.safetensors"]
    size = 337455132
    sha256 = "6d25..."

A signed manifest has its ed25519 signature (base64) in the file `weights.toml.sig` beside it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    TypeAdapter,
    ValidationError,
)

from inferq.schemas import InstallationError, describe_faults

WeightsName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]


def _relative(path: str) -> str:
    # Not above: with it come Redis and HTTP, for which every engine process would take longer to start.
    from inferq.storage.objects.store import BadObjectKey, check_key

    try:
        return check_key(path)  # a valid object key also stays below its folder
    except BadObjectKey as error:
        raise ValueError(error.message) from error


RelativePath = Annotated[str, AfterValidator(_relative)]


class WeightsRefused(InstallationError):
    """The manifest or its signature is invalid, or a file does not match the manifest."""

    code = "weights_refused"


class WeightsFile(BaseModel):
    """The required size (bytes) and SHA-256 (hex) of a file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int = Field(ge=0)
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$", to_lower=True)]


class Weights(BaseModel):
    """The current version of named weights. `files` maps paths below `source` to their checksums."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: WeightsName
    source: Annotated[str, StringConstraints(pattern=r"^(s3|file|https)://.+")]
    files: Annotated[Mapping[RelativePath, WeightsFile], Field(min_length=1)]

    @property
    def size(self) -> int:
        """The total size of all files in bytes."""
        return sum(file.size for file in self.files.values())


Manifest = Mapping[WeightsName, Weights]
_manifest: TypeAdapter[Manifest] = TypeAdapter(Manifest)


def read_manifest(data: bytes, where: str) -> Manifest:
    """Parse a manifest. Raises WeightsRefused with a list of all its faults."""
    try:
        return _manifest.validate_python(tomllib.loads(data.decode()))
    except ValidationError as error:
        raise WeightsRefused(f"{where}: {'; '.join(describe_faults(error))}") from error
    except ValueError as error:  # invalid TOML, or not UTF-8
        raise WeightsRefused(f"{where} is not TOML: {error}") from error


def describe(name: str, version: str, source: str, folder: Path) -> str:
    """The manifest's table for the files in a folder, to be served at `source`.

    Raises WeightsRefused if the folder has no files, or if the table would be invalid.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if not files:
        raise WeightsRefused(f"{folder} has no files")
    lines = [f'["{name}"]', f'version = "{version}"', f'source = "{source}"']
    for path in files:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        relative = path.relative_to(folder).as_posix()
        lines += ["", f'["{name}".files."{relative}"]', f"size = {path.stat().st_size}"]
        lines += [f'sha256 = "{digest}"']
    text = "\n".join(lines) + "\n"
    read_manifest(text.encode(), f"the table of {folder}")
    return text


def sign(data: bytes, private_key: Path) -> bytes:
    """The signature (base64) of a manifest with an ed25519 private key (a PEM file).

    Raises WeightsRefused if the key cannot be read or is of another kind.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(private_key.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise WeightsRefused(f"the private key {private_key} cannot be read: {error}") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise WeightsRefused(
            f"{private_key} is not an ed25519 key; create one with: "
            "openssl genpkey -algorithm ed25519 -out private.pem"
        )
    return base64.b64encode(key.sign(data)) + b"\n"


def check_signature(data: bytes, signature: bytes, public_key: Path, where: str) -> None:
    """Raises WeightsRefused unless `signature` (base64) is a valid signature of `data` by the key."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(public_key.read_bytes())
    except (OSError, ValueError) as error:
        raise WeightsRefused(f"INFERQ_WEIGHTS_PUBLIC_KEY: {public_key} cannot be read: {error}") from error
    if not isinstance(key, Ed25519PublicKey):
        raise WeightsRefused(f"INFERQ_WEIGHTS_PUBLIC_KEY: {public_key} is not an ed25519 key")
    try:
        key.verify(base64.b64decode(signature.strip(), validate=True), data)
    except (InvalidSignature, binascii.Error) as error:
        raise WeightsRefused(
            f"{where} has no valid signature by the key {public_key}: it was changed, or signed with another key"
        ) from error
