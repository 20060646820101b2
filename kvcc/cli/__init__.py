"""The command line: one file per command under kvcc/cli, each a thin skin over one public function."""

import sys
from importlib import import_module
from importlib.resources import files

import click

from kvcc._version import __version__
from kvcc.errors import KvccError


class _Commands(click.Group):
    """Finds commands by file name and imports one only when it is called, so `kvcc --help` stays quick."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        names = (f.name for f in files("kvcc.cli").iterdir())
        return sorted(n.removesuffix(".py") for n in names if n.endswith(".py") and not n.startswith("_"))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        command = import_module(f"kvcc.cli.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="kvcc")
def cli() -> None:
    """A compiler for the KV caches of language models."""


def main() -> None:
    """Run the command line; a KvccError becomes one line on stderr and its own exit status."""
    try:
        status = cli(standalone_mode=False, prog_name="kvcc")
        sys.exit(status if isinstance(status, int) else 0)  # what a command gave to ctx.exit
    except click.exceptions.Exit as exit_:
        sys.exit(exit_.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        click.echo("kvcc: interrupted", err=True)
        sys.exit(130)
    except KvccError as error:
        click.echo(f"kvcc: {' '.join(str(error).split())} [{error.code}]", err=True)
        sys.exit(error.exit_status)
    except BrokenPipeError:
        sys.exit(141)
    except OSError as error:  # a full disk, a file without permission: what no command expected
        click.echo(f"kvcc: {error}", err=True)
        sys.exit(2)
