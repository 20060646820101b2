"""What commands share: where text goes, and how sizes read."""

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars

from kvcc.progress import OnProgress, unseen

LINE_EVERY = 10.0  # seconds between lines where there is no terminal
out = Console()
err = Console(stderr=True)

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON document and nothing else."
)


def print_json(data: Any) -> None:
    """One JSON document on standard output; what is not finite is null there."""
    click.echo(json.dumps(_finite(data), indent=2, default=str, allow_nan=False))


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


@contextmanager
def progress(quiet: bool) -> Iterator[OnProgress]:
    """Shows stages on standard error: as a bar, as a line now and then where there is no terminal, or not (`quiet`)."""
    if quiet:
        yield unseen
    elif not err.is_terminal:
        yield _lines()
    else:
        columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
        with Bars(TextColumn("{task.description}"), *columns, console=err, transient=True) as bars:
            task = bars.add_task("", total=None)
            yield lambda stage, done, total: bars.update(task, description=stage, completed=done, total=total)


def _lines() -> OnProgress:
    """A line when a stage begins and ends, and now and then in between."""
    told: dict[str, float] = {}

    def advance(stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if stage not in told or done == total or now - told[stage] >= LINE_EVERY:
            told[stage] = now
            click.echo(f"{stage} {done}/{total}", err=True)

    return advance


def size(nbytes: float) -> str:
    """Bytes for people: 6,480 B, 25.3 MiB."""
    if nbytes < 10_000:
        return f"{nbytes:,.0f} B"
    units = iter(("KiB", "MiB", "GiB"))
    nbytes, unit = nbytes / 1024, next(units)
    while nbytes >= 1000 and unit != "GiB":
        nbytes, unit = nbytes / 1024, next(units)
    return f"{nbytes:,.1f} {unit}"
