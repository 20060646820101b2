"""Signatures: what nobody signed, somebody else signed, or was changed since, is refused where a key is asked for."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from hypothesis import given
from hypothesis import strategies as st

from kvcc.artifact import update_file
from kvcc.cli import cli
from kvcc.errors import ArtifactDigest, ArtifactError, ArtifactPath, ArtifactSignature, DataError
from kvcc.runtime import load
from kvcc.runtime.artifact import read_artifact
from kvcc.signing import private_key, sign_artifact
from tests.saved import save_tiny_llama

GOLDEN = Path(__file__).parent / "golden/tiny.kvcc"


def write_keys(folder: Path, name: str) -> tuple[Path, Path]:
    """A new pair of keys as PEM files: private, public."""
    key = Ed25519PrivateKey.generate()
    private, public = folder / f"{name}.pem", folder / f"{name}.public.pem"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_keys(tmp_path_factory.mktemp("keys"), "ours")


@pytest.fixture(scope="module")
def signed(keys: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("signed") / "a.kvcc"
    shutil.copytree(GOLDEN, path)
    sign_artifact(path, private_key(keys[0]))
    return path


@pytest.fixture
def copy(signed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(signed, tmp_path / "a.kvcc"))


def test_what_was_signed_loads_with_the_key_and_without(signed: Path, keys: tuple[Path, Path]) -> None:
    assert read_artifact(signed).signer is None
    signer = read_artifact(signed, key=keys[1]).signer
    assert signer == json.loads((signed / "signature.json").read_text())["key"]
    assert load(signed, key=keys[1]).recipe == load(signed).recipe
    assert (signed / "manifest.json").read_bytes() == (GOLDEN / "manifest.json").read_bytes()


def test_signing_again_replaces_the_signature(copy: Path, tmp_path: Path, keys: tuple[Path, Path]) -> None:
    private, public = write_keys(tmp_path, "theirs")
    sign_artifact(copy, private_key(private))
    assert read_artifact(copy, key=public).signer
    with pytest.raises(ArtifactSignature, match="which is not in"):
        read_artifact(copy, key=keys[1])


def test_any_of_several_keys_may_have_signed(signed: Path, tmp_path: Path, keys: tuple[Path, Path]) -> None:
    both = tmp_path / "both.pem"
    both.write_bytes(write_keys(tmp_path, "theirs")[1].read_bytes() + b"\n# ours\n" + keys[1].read_bytes())
    assert read_artifact(signed, key=both).signer


def test_the_signature_is_openssl_s(signed: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    """Another implementation, and the words of docs/format.md."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    found = json.loads((signed / "signature.json").read_text())
    message, signature = tmp_path / "message", tmp_path / "signature"
    message.write_bytes(b"manifest.json of kvcc, version 1\n" + (signed / "manifest.json").read_bytes())
    signature.write_bytes(bytes.fromhex(found["signature"]))
    command = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", keys[1], "-rawin", "-in", message]
    made = subprocess.run([*command, "-sigfile", signature], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stdout + made.stderr


def _edit_manifest(path: Path) -> None:
    data = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(data | {"recipe_name": "better"}))


def _flip_weight(path: Path) -> None:
    data = bytearray((path / "weights.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "weights.safetensors").write_bytes(data)


def _signature(**change: object) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        data = json.loads((path / "signature.json").read_text())
        (path / "signature.json").write_text(json.dumps(data | change))

    return spoil


def _link(path: Path) -> None:
    (path / "signature.json").rename(path.parent / "elsewhere")
    (path / "signature.json").symlink_to(path.parent / "elsewhere")


SPOILT: dict[str, tuple[Callable[[Path], object], type[ArtifactError], str]] = {
    "missing": (lambda path: (path / "signature.json").unlink(), ArtifactSignature, "not signed"),
    "a link": (_link, ArtifactSignature, "not signed"),
    "another key": (_signature(key="0" * 64), ArtifactSignature, "which is not in"),
    "zeros": (_signature(signature="0" * 128), ArtifactSignature, "altered after it was signed"),
    "short": (_signature(signature="00"), ArtifactSignature, "signature.json: signature"),
    "another algorithm": (_signature(algorithm="none"), ArtifactSignature, "algorithm"),
    "more": (_signature(trusted=True), ArtifactSignature, "trusted"),
    "no JSON": (lambda path: (path / "signature.json").write_text("{"), ArtifactSignature, "not the JSON"),
    "large": (lambda path: (path / "signature.json").write_text(" " * 9999), ArtifactSignature, "bytes"),
    "manifest": (_edit_manifest, ArtifactSignature, "altered after it was signed"),
    "weights": (_flip_weight, ArtifactDigest, "weights.safetensors"),
    "report added by hand": (
        lambda path: (path / "report.html").write_text("<p>as good as new"), ArtifactError, "report.html"
    ),
    "accuracy stored": (lambda path: update_file(path, "accuracy.json", b"{}"), ArtifactSignature, "not signed"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILT)
def test_everything_else_is_refused(
    name: str, copy: Path, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil, error, message = SPOILT[name]
    spoil(copy)
    with pytest.raises(error, match=message):
        load(copy, key=keys[1])
    with pytest.raises(error, match=message):  # a key leaves no choice
        load(copy, key=keys[1], verify=False)
    monkeypatch.setenv("KVCC_TRUSTED_KEY", str(keys[1]))
    with pytest.raises(error, match=message):
        load(copy, verify="sizes")
    made = CliRunner().invoke(cli, ["inspect", str(copy), "--verify"])
    assert isinstance(made.exception, ArtifactError)


@given(data=st.data())
def test_no_byte_of_the_manifest_can_change(
    data: st.DataObject, signed: Path, keys: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    manifest = (signed / "manifest.json").read_bytes()
    at = data.draw(st.integers(0, len(manifest) - 1))
    bit = data.draw(st.integers(0, 7))
    folder = tmp_path_factory.mktemp("flipped")
    shutil.copy(signed / "signature.json", folder)
    (folder / "manifest.json").write_bytes(
        manifest[:at] + bytes([manifest[at] ^ 1 << bit]) + manifest[at + 1 :]
    )
    with pytest.raises(ArtifactSignature, match="altered"):
        read_artifact(folder, key=keys[1])


def test_a_signature_that_nobody_asks_for_is_a_file_like_others(copy: Path) -> None:
    _signature(signature="0" * 128)(copy)
    assert read_artifact(copy).signer is None
    _link(copy)
    with pytest.raises(ArtifactPath, match=r"signature\.json: not a regular file"):
        read_artifact(copy)


def test_an_altered_artifact_is_not_signed(copy: Path, keys: tuple[Path, Path]) -> None:
    _flip_weight(copy)
    before = (copy / "signature.json").read_bytes()
    with pytest.raises(ArtifactDigest, match="is not signed"):
        sign_artifact(copy, private_key(keys[0]))
    assert (copy / "signature.json").read_bytes() == before


def test_keys_that_are_none(signed: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    ours = private_key(keys[0])
    files = {
        "not PEM": (b"key", "no private key", "no public key"),
        "large": (b" " * (1 << 17), "so no key", "so no key"),
        "password": (
            ours.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"x")),
            "has a password",
            "no public key",
        ),
        "public": (keys[1].read_bytes(), "no private key", ""),
        "private": (keys[0].read_bytes(), "", "no public key"),
        "damaged": (
            b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----",
            "no private key",
            "cannot be read",
        ),
    }
    other = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    public = other.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    files["RSA public"] = (public, "no private key", "not Ed25519")
    private = other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    files["RSA"] = (private, "not an Ed25519 key", "no public key")
    for name, (content, as_private, as_public) in files.items():
        path = tmp_path / name
        path.write_bytes(content)
        if as_private:
            with pytest.raises(DataError, match=as_private):
                private_key(path)
        if as_public:
            with pytest.raises(DataError, match=as_public):
                read_artifact(signed, key=path)
    with pytest.raises(DataError, match="cannot be read"):
        private_key(tmp_path / "absent")
    with pytest.raises(DataError, match="cannot be read"):
        read_artifact(signed, key=tmp_path / "absent")


def test_without_cryptography_nothing_is_trusted(
    signed: Path, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cryptography", None)
    load(signed)
    with pytest.raises(
        DataError, match=r"signatures need the package cryptography; pip install 'kvcc\[sign\]'"
    ):
        load(signed, key=keys[1])


def test_on_the_command_line(copy: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    def call(*words: object) -> str:
        made = CliRunner().invoke(cli, [str(word) for word in words], catch_exceptions=False)
        assert made.exit_code == 0
        return made.output

    assert "not checked (--key)" in call("inspect", copy)
    assert "verified" in call("inspect", copy, "--verify", "--key", keys[1])
    (copy / "signature.json").unlink()
    assert json.loads(call("inspect", copy, "--json"))["signature"] is None
    key = json.loads(call("sign", copy, "--key", keys[0], "--json"))["key"]
    facts = json.loads(call("inspect", copy, "--key", keys[1], "--json"))
    assert facts["signature"] == {"key": key, "verified": True}
    assert facts["digests"] == "verified"


def test_export_signs_what_it_wrote(keys: tuple[Path, Path], tmp_path: Path) -> None:
    model, path = save_tiny_llama(tmp_path / "model"), tmp_path / "a.kvcc"
    words = ["export", str(model), "--recipe", "exact", "--output", str(path), "--json", "--sign"]
    made = CliRunner().invoke(cli, [*words, str(keys[0])], catch_exceptions=False)
    signer = json.loads(made.stdout)["signed_by"]
    assert read_artifact(path, key=keys[1]).signer == signer
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")] == []


def test_export_trusts_what_it_makes(
    keys: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a key has to vouch for artifacts: checked before it is signed, and loadable afterwards."""
    monkeypatch.setenv("KVCC_TRUSTED_KEY", str(keys[1]))
    model, path = save_tiny_llama(tmp_path / "model", context=200), tmp_path / "a.kvcc"
    words = ["export", str(model), "--recipe", "exact", "--output", str(path), "--check", "--json", "--sign"]
    made = CliRunner().invoke(cli, [*words, str(keys[0])])
    assert made.exit_code == 0, made.output
    monkeypatch.setenv("KVCC_TRUSTED_KEY", str(keys[1]))
    accuracy = read_artifact(path).accuracy
    assert accuracy is not None
    size = accuracy["size"]  # what a context of 200 holds
    assert (size["length"], size["context"], size["retrieval_lengths"]) == (200, 133, [])


def test_a_bad_key_is_told_before_the_model_is_read(keys: tuple[Path, Path], tmp_path: Path) -> None:
    words = ["export", "no-such-model", "--recipe", "exact", "--output", str(tmp_path / "a.kvcc"), "--sign"]
    made = CliRunner().invoke(cli, [*words, str(keys[1])])
    assert isinstance(made.exception, DataError)
    assert "no private key" in str(made.exception)
    made = CliRunner().invoke(cli, [*words, str(keys[0]), "--format", "compressed-tensors"])
    assert "--sign are for artifacts" in made.output
