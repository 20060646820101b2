"""kvcc sign: vouch for an artifact."""

from pathlib import Path

import click

from kvcc.cli._console import json_option, out, print_json


@click.command("sign")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option(
    "--key",
    required=True,
    type=click.Path(path_type=Path),
    help="Ed25519 private key, PEM: openssl genpkey -algorithm ed25519.",
)
@json_option
def command(artifact: Path, key: Path, as_json: bool) -> None:
    """Sign ARTIFACT as it is now, after checking every file's digest."""
    from kvcc.signing import private_key, sign_artifact

    fingerprint = sign_artifact(artifact, private_key(key))
    if as_json:
        print_json({"artifact": str(artifact), "key": fingerprint})
    else:
        out.print(f"signed {artifact} by key {fingerprint}", markup=False, highlight=False, soft_wrap=True)
