"""Signing artifacts; `kvcc.runtime.signature` checks what is written here (see docs/format.md)."""

from pathlib import Path
from typing import TYPE_CHECKING

from kvcc.artifact import put_signature
from kvcc.errors import DataError
from kvcc.runtime.signature import (
    Signature,
    fingerprint,
    need_cryptography,
    read_key_file,
    signed_bytes,
)

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey


def private_key(path: Path) -> "Ed25519PrivateKey":
    """An Ed25519 private key from a PEM file without a password. Raises DataError for anything else."""
    need_cryptography()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(read_key_file(path), password=None)
    except TypeError as error:
        raise DataError(f"{path}: the key has a password, and kvcc asks for none; give it without") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise DataError(
            f"{path}: no private key in PEM form; make one by openssl genpkey -algorithm ed25519 -out key.pem"
        ) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise DataError(f"{path}: not an Ed25519 key; make one by openssl genpkey -algorithm ed25519")
    return key


def sign_artifact(path: str | Path, key: "Ed25519PrivateKey") -> str:
    """Sign an artifact's manifest as it is now, in place of an older signature; gives the key's fingerprint.

    All digests are checked first: a signature vouches for every file. Raises ArtifactError.
    """

    def sign(manifest: bytes) -> Signature:
        return Signature(key=fingerprint(key.public_key()), signature=key.sign(signed_bytes(manifest)).hex())

    return put_signature(path, sign).key
