"""The plots of a report as files, for papers and READMEs."""

from pathlib import Path
from typing import Literal

from kvcc import charts
from kvcc.atomic import write_atomically
from kvcc.errors import ArtifactUnwritable, DataError
from kvcc.report import Extras, report_figures

Format = Literal["svg", "png"]
ZOOM = 3  # pixels a unit: 1,404 across


def write_plots(
    artifact: Path,
    folder: Path,
    *,
    formats: tuple[Format, ...] = ("svg",),
    theme: charts.Theme = "light",
    extras: Extras | None = None,
) -> list[Path]:
    """Write each figure of an artifact's report as `folder`/NAME.svg, .png or both; gives their paths.

    `theme` auto leaves light or dark to whoever shows an SVG, and is light in a PNG. Raises what `render_report`
    does, ArtifactUnwritable, and DataError where PNG is asked for and resvg-py is not installed.
    """
    written = []
    figures = report_figures(artifact, extras)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for figure in figures:
            for kind in formats:
                fixed: charts.Theme = "light" if kind == "png" and theme == "auto" else theme
                svg = charts.beside([str(figure.svg)], title=figure.caption, theme=fixed)
                path = folder / f"{figure.name}.{kind}"
                write_atomically(path, svg.encode() if kind == "svg" else png(svg))
                written.append(path)
    except OSError as error:
        raise ArtifactUnwritable(f"{folder}: plots cannot be written: {error.strerror or error}") from error
    return written


def png(svg: str) -> bytes:
    """An SVG of a fixed theme as a PNG. Raises DataError without resvg-py."""
    try:
        import resvg_py
    except ImportError as error:
        raise DataError("PNG files need resvg-py; install kvcc[plots], or write SVG files") from error
    return bytes(resvg_py.svg_to_bytes(svg_string=svg, zoom=ZOOM))
