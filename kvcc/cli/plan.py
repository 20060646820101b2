"""kvcc plan: find the recipe that loses least within a budget."""

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.markup import escape
from rich.table import Table

from kvcc.cli._console import json_option, out, print_json, progress
from kvcc.cli._outputs import check_outputs, write_output
from kvcc.errors import DataError

if TYPE_CHECKING:
    from kvcc.graph import Graph
    from kvcc.planner import Goal, Search
    from kvcc.trials import Measured


@click.command("plan")
@click.argument("model", metavar="MODEL|GRAPH")
@click.option(
    "--profile",
    "-p",
    type=click.Path(path_type=Path),
    help="Calibration profile (kvcc calibrate --gradients).",
)
@click.option(
    "--budget", metavar="RATIO", help="How many times smaller than fp16 pages shall be, such as 4x."
)
@click.option("--bytes-per-token", type=click.FloatRange(1), help="The same in bytes of a token, all layers.")
@click.option(
    "--max-kl", type=click.FloatRange(0, min_open=True), help="Or: the fewest bytes within this KL, in nats."
)
@click.option(
    "--max-attention-ms",
    type=click.FloatRange(0, min_open=True),
    help="Also try recipes that trade time for bytes; all layers attend over 4,096 tokens within this time, here.",
)
@click.option("--output", "-o", required=True, type=click.Path(path_type=Path), help="plan.json to write.")
@click.option(
    "--recipe",
    "recipe_file",
    type=click.Path(path_type=Path),
    help="Also write the winner's recipe, for export.",
)
@click.option("--plot", type=click.Path(path_type=Path), help="Also draw bits against KL, as .svg.")
@click.option("--texts", default=2, show_default=True, type=click.IntRange(1), help="Texts of each kind.")
@click.option(
    "--tokens", default=256, show_default=True, type=click.IntRange(8), help="Predictions of a text."
)
@click.option(
    "--context", default=1024, show_default=True, type=click.IntRange(64), help="Tokens before them."
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Draws the texts.")
@click.option(
    "--dtype", default="float32", type=click.Choice(["float32", "bfloat16", "float16"]), show_default=True
)
@click.option("--resume", is_flag=True, help="Keep what an interrupted run has measured.")
@json_option
def command(
    model: str,
    profile: Path | None,
    budget: str | None,
    bytes_per_token: float | None,
    max_kl: float | None,
    max_attention_ms: float | None,
    output: Path,
    recipe_file: Path | None,
    plot: Path | None,
    dtype: str,
    resume: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure recipes through the real cache, and choose one that meets a budget.

    MODEL is a folder, a hub id, a .gguf file or pypi:PACKAGE. GRAPH is one that was captured before: the artifact of
    a model with the recipe exact. It opens in seconds, and in its own dtype.
    """
    if sum(given is not None for given in (budget, bytes_per_token, max_kl)) != 1:
        raise click.UsageError("give one of --budget, --bytes-per-token and --max-kl")
    if not all(math.isfinite(x) for x in (bytes_per_token, max_kl, max_attention_ms) if x is not None):
        raise click.UsageError("--bytes-per-token, --max-kl and --max-attention-ms take finite numbers")
    ratio = ratio_of(budget) if budget is not None else None
    check_outputs(output, recipe_file, plot)
    from kvcc.planner import search
    from kvcc.profile import Profile
    from kvcc.uncompressed import opened

    statistics = Profile.load(profile) if profile else None
    if statistics is None:
        click.echo(UNCALIBRATED, err=True)
    graph, reference = opened(model, dtype)
    goal = replace(goal_of(graph, ratio, bytes_per_token, max_kl), attention_ms=max_attention_ms)
    state = output.with_name(f"{output.name}.partial")
    if not resume:
        state.unlink(missing_ok=True)
    with progress(as_json) as advance:
        found = search(graph, reference, statistics, goal, state=state, on_progress=advance, **options)
    save(found, output, recipe_file, plot)
    state.unlink(missing_ok=True)
    if as_json:
        print_json(found.as_dict())
    else:
        show(found, graph.model.name)


UNCALIBRATED = (
    "without --profile only passes that need none are measured; transform, which loses least, wants one of "
    "kvcc calibrate --gradients"
)


def ratio_of(text: str) -> float:
    """4.0 for 4x or 4. Raises UsageError."""
    try:
        ratio = float(text.lower().removesuffix("x"))
    except ValueError:
        ratio = 0.0
    if not 0 < ratio < math.inf:
        raise click.UsageError(f"--budget {text}: give a ratio to fp16, such as 4x")
    return ratio


def goal_of(
    graph: "Graph", ratio: float | None, bytes_per_token: float | None, max_kl: float | None
) -> "Goal":
    """The goal in bits per element. Raises DataError for a budget that nothing could meet."""
    from kvcc.passes import Windows, start
    from kvcc.planner import Goal

    if max_kl is not None:
        return Goal(kl=max_kl)
    if ratio is not None:
        return Goal(bits=16 / ratio)
    plain = start(graph, None, Windows()).plan.uncompressed_bytes_per_token()
    if not plain:
        raise DataError(f"{graph.model.name} has sliding windows only: its cache does not grow")
    assert bytes_per_token is not None
    return Goal(bits=16 * bytes_per_token / plain)


def save(found: "Search", output: Path, recipe: Path | None, plot: Path | None) -> None:
    """Write plan.json and what else was asked for. Raises ArtifactUnwritable where that is not possible."""
    import json

    files = {output: json.dumps(found.as_dict(), indent=2)}
    if recipe is not None:
        files[recipe] = f"name: {recipe.stem}\n{found.winner.recipe}"
    if plot is not None:
        files[plot] = drawn(found)
    for path, text in files.items():
        write_output(path, f"{text}\n")


def drawn(found: "Search") -> str:
    """An SVG file of the front and of everything that was measured."""
    from kvcc.charts import Line
    from kvcc.fronts import front_file

    dots = [Line(row(m)[0], ((m.bits, m.kl),), quiet=m not in found.front) for m in found.measured]
    return front_file(sorted((m.bits, m.kl) for m in found.front), dots)


def show(found: "Search", model: str) -> None:
    """The front as a table, the winner marked."""
    table = Table(title=f"{model}: recipes that no other beats")
    timed = found.goal.attention_ms is not None
    for column in ("", "recipe", "bits", "bytes per token", "KL", *(["attention, ms"] if timed else [])):
        table.add_column(column, justify="left" if column in ("", "recipe") else "right")
    for each in found.front:
        table.add_row("*" if each.recipe == found.winner.recipe else "", *row(each))
    out.print(table)
    if found.refused:
        first, why = next(iter(found.refused.items()))
        about = (
            f"{len(found.refused)} that this model does not take, such as {recipe_name(first)}: {escape(why)}"
        )
        out.print(f"left out: {about}")
    out.print("chosen, measured again on other texts:")
    name, bits, size, kl, *time = row(found.winner)
    taken = f", attention {time[0]} ms" if time else ""
    out.print(f"  {name}: {bits} bits per element, {size} bytes per token, KL {kl}{taken}")


def row(each: "Measured") -> tuple[str, ...]:
    """Recipe, bits, bytes and KL of one measurement, and attention's milliseconds where they were measured."""
    time = () if each.attention_ms is None else (f"{each.attention_ms:.1f}",)
    return (
        recipe_name(each.recipe),
        f"{each.bits:.2f}",
        f"{each.bytes_per_token:,.0f}",
        f"{each.kl:.4f}",
        *time,
    )


def recipe_name(recipe: str) -> str:
    """The passes of a recipe that the planner wrote, in one line, for rich."""
    return escape(recipe.split("passes:")[1].strip().removeprefix("- "))
