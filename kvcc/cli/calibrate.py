"""kvcc calibrate: take a profile of a model on prompts."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from kvcc.cli._console import LINE_EVERY, err, json_option, print_json

if TYPE_CHECKING:
    from kvcc.calibration import Progress

_DTYPES = click.Choice(["float32", "bfloat16", "float16"])


@click.command("calibrate")
@click.argument("model")
@click.option("--data", "-d", required=True, metavar="NAME|FILE", help="Prompt sets, with commas between.")
@click.option(
    "--output", "-o", required=True, type=click.Path(path_type=Path), help="Profile folder to write."
)
@click.option(
    "--field", default="text", show_default=True, help="Field of a .jsonl file or data set to read."
)
@click.option("--samples", default=16, show_default=True, type=click.IntRange(1), help="Prompts in all.")
@click.option(
    "--length", default=1024, show_default=True, type=click.IntRange(1), help="Most tokens of a prompt."
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Draws the prompts.")
@click.option("--batch-size", default=1, show_default=True, type=click.IntRange(1), help="Prompts per pass.")
@click.option(
    "--dtype", default="float32", show_default=True, type=_DTYPES, help="Of weights and activations."
)
@click.option(
    "--skip-first",
    default=16,
    show_default=True,
    type=click.IntRange(0),
    help="First tokens of a prompt that means and covariances leave out.",
)
@click.option(
    "--gradients",
    is_flag=True,
    help="Also measure what errors in keys and values cost (four times the time).",
)
@click.option(
    "--own",
    default=0,
    show_default=True,
    type=click.IntRange(0),
    help="Prompts that the model writes itself, beside those of --data: for text of other kinds than these.",
)
@click.option(
    "--positions",
    type=click.IntRange(0),
    help="Length of the contexts to be served: prompts are moved to positions up to it, since keys turn with theirs. "
    "[default: the model's context]",
)
@click.option(
    "--save-every",
    default=30.0,
    show_default=True,
    type=click.FloatRange(0),
    help="Seconds between checkpoints for --resume.",
)
@click.option("--resume", is_flag=True, help="Go on where a run that was killed stopped.")
@json_option
def command(model: str, data: str, output: Path, as_json: bool, **options: Any) -> None:
    """Run MODEL over prompts and write what passes need to know about its queries, keys and values.

    MODEL is a folder, a hub id, a .gguf file or pypi:PACKAGE.
    """
    from kvcc.calibration import calibrate_model

    started = time.monotonic()
    shown = _Quiet() if as_json else _Terminal() if err.is_terminal else _Lines()
    with shown:
        profile = calibrate_model(model, data, output, progress=shown.advance, say=shown.say, **options)
    counts = {"profile": str(output), "prompts": len(profile.prompts), "tokens": profile.tokens}
    if as_json:
        print_json(counts | {"seconds": round(time.monotonic() - started, 3)})
    else:
        click.echo(f"{output}: {len(profile.prompts)} prompts, {profile.tokens} tokens")


class _Quiet:
    """Shows nothing; the protocol of the other two."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass

    def say(self, line: str) -> None:
        pass

    def advance(self, progress: "Progress") -> None:
        pass


class _Lines(_Quiet):
    """A line now and then on standard error, for logs."""

    def __init__(self) -> None:
        self.last = -LINE_EVERY

    def say(self, line: str) -> None:
        click.echo(line, err=True)

    def advance(self, progress: "Progress") -> None:
        if progress.seconds - self.last >= LINE_EVERY or progress.tokens == progress.total_tokens:
            self.last = progress.seconds
            left = "" if progress.seconds_left is None else f", {progress.seconds_left:.0f} s left"
            done = f"prompt {progress.prompts}/{progress.total_prompts}"
            self.say(f"{done}, {progress.tokens_per_second:.0f} tokens/s{left}")


class _Terminal(_Quiet):
    """A progress bar on standard error."""

    def __init__(self) -> None:
        columns = BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn()
        self.bar = Bar(TextColumn("{task.description}"), *columns, console=err)
        self.task = self.bar.add_task("", total=None, rate="", visible=False)

    def __enter__(self) -> None:
        self.bar.start()

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def say(self, line: str) -> None:
        self.bar.console.print(line, markup=False, highlight=False)

    def advance(self, progress: "Progress") -> None:
        self.bar.update(
            self.task,
            description=f"prompt {progress.prompts}/{progress.total_prompts}",
            completed=progress.tokens,
            total=progress.total_tokens,
            rate=f"{progress.tokens_per_second:.0f} tokens/s",
            visible=True,
        )
