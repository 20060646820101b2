"""The page of all commands, from click: what `kvcc COMMAND --help` says, as Markdown."""

import re
from collections.abc import Iterator
from typing import Any

import click

from kvcc.cli import cli

HEAD = """# Commands

Every command is a thin skin over one public function. Sizes are in bytes or tokens as stated; `--json` prints one JSON
document and nothing else. Exit status: 0 when all is well, 1 when an accuracy gate does not hold, 2 for bad input (one
line on standard error, with a code that [troubleshooting](troubleshooting.md) explains), 130 when interrupted.
`MODEL` is a folder, a hub id, a `.gguf` file, or `pypi:PACKAGE` for a package with a GGUF file inside.
"""


def commands_page() -> str:
    """A section a command, subcommands included."""
    return "\n".join([HEAD, *(section(name, command) for name, command in commands())])


def commands() -> Iterator[tuple[str, click.Command]]:
    """Every command by its full name, groups left out."""
    waiting: list[tuple[str, click.Command]] = [("kvcc", cli)]
    while waiting:
        name, command = waiting.pop(0)
        if isinstance(command, click.Group):
            context = click.Context(command)
            inner = [(n, command.get_command(context, n)) for n in command.list_commands(context)]
            waiting = [(f"{name} {n}", c) for n, c in inner if c is not None] + waiting
        else:
            yield name, command


def section(name: str, command: click.Command) -> str:
    """One command: its help, its usage, and its parameters."""
    context = click.Context(command, info_name=name)
    usage = " ".join([name, *command.collect_usage_pieces(context)])
    text = " ".join((command.help or "").replace("\b", "").split())
    rows = [row for p in command.get_params(context) if (row := parameter(p, context))]
    table = "\n".join(["| option | meaning |", "| --- | --- |", *rows]) if rows else ""
    return f"## {name}\n\n{escaped(text)}\n\n```text\n{usage}\n```\n\n{table}\n"


def parameter(found: click.Parameter, context: click.Context) -> str | None:
    """A row; None for arguments, which the usage names, and for --help."""
    if not isinstance(found, click.Option) or found.hidden or "--help" in found.opts:
        return None
    record = found.get_help_record(context)
    names, about = record if record else (", ".join(found.opts), "")
    return f"| `{names.replace('|', ', ')}` | {escaped(' '.join(about.split()))} |"


def escaped(text: str) -> str:
    """Text as Markdown that shows it, cells of tables included."""
    return re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", text)


def main() -> Any:
    """The page on standard output."""
    click.echo(commands_page())


if __name__ == "__main__":
    main()
