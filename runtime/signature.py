"""Who made an artifact: an Ed25519 signature over its manifest, which has the digests of all other files."""

import hashlib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kvcc.errors import ArtifactSignature, DataError
from kvcc.runtime.strict_json import first_fault, parse_json

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

SIGNATURE = "signature.json"
TRUSTED_KEY = "KVCC_TRUSTED_KEY"  # of the environment: a file of public keys, one of which must have signed
MAX_BYTES = 4096
MAX_KEY_BYTES = 1 << 16
_PURPOSE = b"manifest.json of kvcc, version 1\n"  # a signature of anything else is none of a manifest
_PEM = re.compile(rb"-----BEGIN PUBLIC KEY-----.*?-----END PUBLIC KEY-----", re.DOTALL)


class Signature(BaseModel):
    """signature.json."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    algorithm: Literal["ed25519"] = "ed25519"
    key: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]  # sha256 of the public key's 32 bytes
    signature: Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]


def signed_bytes(manifest: bytes) -> bytes:
    """What is signed, for the bytes of a manifest.json."""
    return _PURPOSE + manifest


def read_signature(folder: Path) -> Signature | None:
    """The signature that an artifact carries, not yet checked. Raises ArtifactSignature for what is none."""
    path = folder / SIGNATURE
    if path.is_symlink() or not path.is_file():  # a link is refused with the folder's other files
        return None
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        return Signature.model_validate(parse_json(data, str(path), ArtifactSignature, MAX_BYTES))
    except ValidationError as error:
        raise ArtifactSignature(f"{path}: {first_fault(error)}; sign again: kvcc sign") from error
    except OSError as error:
        raise ArtifactSignature(f"{path}: {error.strerror or error}") from error


def check_signature(folder: Path, manifest: bytes, keys: str | Path) -> str:
    """Raise ArtifactSignature unless one of the public keys in the PEM file `keys` signed these bytes.

    Gives the key's fingerprint. Raises DataError when the file holds no such keys, or `cryptography` is missing.
    """
    trusted = public_keys(keys)
    found = read_signature(folder)
    if found is None:
        raise ArtifactSignature(
            f"{folder}: not signed, and {keys} is to vouch for it; use one that was signed (kvcc export --sign, "
            "kvcc sign)"
        )
    if found.key not in trusted:
        raise ArtifactSignature(f"{folder}: signed by key {found.key[:16]}…, which is not in {keys}")
    from cryptography.exceptions import InvalidSignature

    try:
        trusted[found.key].verify(bytes.fromhex(found.signature), signed_bytes(manifest))
    except InvalidSignature as error:
        raise ArtifactSignature(
            f"{folder}: {SIGNATURE} is not of this manifest: the artifact was altered after it was signed"
        ) from error
    return found.key


def trusted_keys(given: str | Path | None) -> str | Path | None:
    """The file of keys that has to vouch for artifacts: the one given, else the environment's, else none."""
    return given if given is not None else os.environ.get(TRUSTED_KEY) or None


def public_keys(path: str | Path) -> "dict[str, Ed25519PublicKey]":
    """Ed25519 public keys of a PEM file, by fingerprint. Raises DataError without any."""
    need_cryptography()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    found = {}
    for block in _PEM.findall(read_key_file(path)):
        try:
            key = load_pem_public_key(block)
        except ValueError as error:
            raise DataError(f"{path}: holds a public key that cannot be read") from error
        if not isinstance(key, Ed25519PublicKey):
            raise DataError(f"{path}: holds a key that is not Ed25519")
        found[fingerprint(key)] = key
    if not found:
        raise DataError(
            f"{path}: no public key in PEM form; get it by openssl pkey -in key.pem -pubout -out public.pem"
        )
    return found


def fingerprint(key: Any) -> str:
    """sha256 of an Ed25519 public key's 32 bytes, in hexadecimal digits."""
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()


def read_key_file(path: str | Path) -> bytes:
    """The bytes of a key file. Raises DataError."""
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_KEY_BYTES + 1)
    except OSError as error:
        raise DataError(f"{path}: the key cannot be read: {error.strerror or error}") from error
    if len(data) > MAX_KEY_BYTES:
        raise DataError(f"{path}: more than {MAX_KEY_BYTES:,} bytes, so no key; give a PEM file")
    return data


def need_cryptography() -> None:
    """Raise DataError unless signatures can be made and checked here."""
    try:
        import cryptography.hazmat.primitives.asymmetric.ed25519  # noqa: F401
    except ImportError as error:
        raise DataError("signatures need the package cryptography; pip install 'kvcc[sign]'") from error
