"""kvcc report: an artifact's report as one HTML page, its plots as files, or its numbers as JSON."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from kvcc.cli._console import json_option, out, print_json
from kvcc.cli._outputs import write_output
from kvcc.errors import ArtifactError

if TYPE_CHECKING:
    from kvcc.charts import Theme


@click.command("report")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Where to write the HTML page.")
@click.option(
    "-p",
    "--profile",
    type=click.Path(path_type=Path),
    help="Show channels by this profile (kvcc calibrate), not by what the artifact recorded of its own.",
)
@click.option(
    "--front",
    type=click.Path(path_type=Path),
    help="Show the artifact among others: a JSON file of kvcc compare -o or kvcc plan -o.",
)
@click.option("--plots", type=click.Path(path_type=Path), help="Folder to write each plot to, as a file.")
@click.option(
    "--format",
    "formats",
    multiple=True,
    type=click.Choice(["svg", "png"]),
    help="Of plots, svg by default; may be given twice. PNG needs kvcc[plots].",
)
@click.option(
    "--theme",
    type=click.Choice(["light", "dark", "auto"]),
    help="Of plots, light by default; auto: an SVG follows its reader.",
)
@json_option
def command(
    artifact: Path,
    output: Path | None,
    profile: Path | None,
    front: Path | None,
    plots: Path | None,
    formats: "tuple[Literal['svg', 'png'], ...]",
    theme: "Theme | None",
    as_json: bool,
) -> None:
    """Write what ARTIFACT stores, and the accuracy that was measured, as a page that needs no network."""
    if output is None and plots is None and not as_json:
        raise click.UsageError(
            "give -o FILE for the page, --plots FOLDER for its plots, or --json for numbers"
        )
    if plots is None and (formats or theme):
        raise click.UsageError("--format and --theme are of plots: give --plots FOLDER, too")
    for path in (output, plots):
        if path is not None and path.resolve().is_relative_to(artifact.resolve()):
            raise ArtifactError(
                f"{path} is inside the artifact, which would no longer match its digests; "
                "write it elsewhere (kvcc check --store keeps a report inside)"
            )
    from kvcc.report import Extras, render_report, stored_facts
    from kvcc.report.plots import write_plots

    extras = Extras(profile, front)
    written = []
    if output is not None:
        page = render_report(artifact, None, extras)
        write_output(output, page)
        written.append(output)
    if plots is not None:
        written += write_plots(
            artifact,
            plots,
            formats=tuple(dict.fromkeys(formats)) or ("svg",),
            theme=theme or "light",
            extras=extras,
        )
    if as_json:
        print_json(stored_facts(artifact, extras))
        return
    for path in written:
        out.print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)
