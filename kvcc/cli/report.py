"""kvcc report: an artifact's report as one HTML page, or its numbers as JSON."""

from pathlib import Path

import click

from kvcc.cli._console import json_option, out, print_json
from kvcc.errors import ArtifactError, ArtifactUnwritable


@click.command("report")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Where to write the HTML page.")
@json_option
def command(artifact: Path, output: Path | None, as_json: bool) -> None:
    """Write what ARTIFACT stores, and the accuracy that was measured, as a page that needs no network."""
    from kvcc.report import render_report, stored_facts

    if output is None and not as_json:
        raise click.UsageError("give -o FILE for the page, or --json for its numbers")
    if output is not None:
        if output.resolve().is_relative_to(artifact.resolve()):
            raise ArtifactError(
                f"{output} is inside the artifact, which would no longer match its digests; "
                "write it elsewhere (kvcc check --store keeps a report inside)"
            )
        page = render_report(artifact, None)
        try:
            output.write_text(page, encoding="utf-8")
        except OSError as error:
            raise ArtifactUnwritable(f"{output}: the report cannot be written: {error.strerror}") from error
    if as_json:
        print_json(stored_facts(artifact))
    else:
        out.print(f"wrote {output}", markup=False, highlight=False, soft_wrap=True)
