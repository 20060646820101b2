"""kvcc env: versions and usable kernel backends."""

import click
from rich.table import Table

from kvcc.cli._console import json_option, out, print_json


@click.command("env")
@json_option
def command(as_json: bool) -> None:
    """Show versions, CPU features, GPU, and which kernel backends are usable (and why not)."""
    from kvcc.environment import environment

    facts = environment()
    if as_json:
        print_json(facts)
        return
    table = Table(show_header=False)
    for name in ("kvcc", "python", "system"):
        table.add_row(name, facts[name])
    table.add_row("cpu threads", str(facts["cpu"]["threads"]))
    table.add_row("cpu features", " ".join(facts["cpu"]["features"]) or "unknown")
    table.add_row("gpu", facts["gpu"] or "none")
    for name, version in facts["packages"].items():
        table.add_row(name, version or "not installed")
    for name, reason in facts["backends"].items():
        table.add_row(f"kernels: {name}", "usable" if reason is None else f"not usable: {reason}")
    out.print(table)
