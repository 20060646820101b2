"""What commands share: where text goes, and how sizes read."""

import json
from typing import Any

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

out = Console()
err = Console(stderr=True)

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON document and nothing else."
)


def print_json(data: Any) -> None:
    """One JSON document on standard output."""
    click.echo(json.dumps(data, indent=2, default=str))


def progress(quiet: bool) -> Progress:
    """A progress display on standard error; silent when `quiet` or when there is no terminal to draw on."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=err,
        disable=quiet or not err.is_terminal,
        transient=True,
    )


def size(nbytes: float) -> str:
    """Bytes for people: 6,480 B, 25.3 MiB."""
    if nbytes < 10_000:
        return f"{nbytes:,.0f} B"
    units = iter(("KiB", "MiB", "GiB"))
    nbytes, unit = nbytes / 1024, next(units)
    while nbytes >= 1000 and unit != "GiB":
        nbytes, unit = nbytes / 1024, next(units)
    return f"{nbytes:,.1f} {unit}"
