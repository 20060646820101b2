"""kvcc profile: look at profiles and merge them."""

from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich import box
from rich.markup import escape
from rich.table import Table

from kvcc.cli._console import json_option, out, print_json

if TYPE_CHECKING:
    from kvcc.profile import Profile

_PATH = click.Path(path_type=Path)


@click.group("profile")
def command() -> None:
    """Show a calibration profile, or merge several."""


@command.command("merge")
@click.argument("profiles", nargs=-1, required=True, type=_PATH)
@click.option("-o", "--output", required=True, type=_PATH, help="Folder of the merged profile.")
@json_option
def _merge(profiles: tuple[Path, ...], output: Path, as_json: bool) -> None:
    """Add profiles of one model up: the result is that of one run over all their prompts."""
    from kvcc.profile import Profile, merge

    whole = merge(Profile.load(path) for path in profiles)
    whole.save(output)
    if as_json:
        print_json({"profile": str(output), "prompts": len(whole.prompts), "tokens": whole.tokens})
    else:
        click.echo(f"{output}: {len(whole.prompts)} prompts, {whole.tokens} tokens")


@command.command("show")
@click.argument("profile", type=_PATH)
@json_option
def _show(profile: Path, as_json: bool) -> None:
    """Print what a profile was taken on, and a line for every layer."""
    from kvcc.profile import Profile

    loaded = Profile.load(profile)
    if as_json:
        print_json(describe(loaded))
    else:
        _print(loaded)


def describe(profile: "Profile") -> dict[str, object]:
    """What `kvcc profile show --json` prints."""
    from kvcc.profile import summarize

    return {
        "model": profile.model.model_dump(),
        "skip_first": profile.skip_first,
        "statistics_version": profile.statistics_version,
        "sources": [source.model_dump() for source in profile.sources],
        "prompts": len(profile.prompts),
        "tokens": profile.tokens,
        "layers": summarize(profile),
    }


def _print(profile: "Profile") -> None:
    from kvcc.profile import summarize

    model = profile.model
    out.print(
        f"{escape(model.name)} ({model.model_type}, {model.dtype}), {len(profile.prompts)} prompts, "
        f"{profile.tokens} tokens, the first {profile.skip_first} of each prompt left out"
    )
    for source in profile.sources:
        out.print(
            f"  {escape(source.name)}: {source.samples} prompts, {source.tokens} tokens, seed {source.seed}"
        )
    table = Table(
        box=box.SIMPLE,
        padding=0,
        caption="K top: share of mean k² in the strongest tenth of channels. outl.: channels over 4 times "
        "the median. sinks, mid, recent: attention that the first 16 tokens, those between and the last 64 "
        "get. think: share of ThinK's score in the better half of the channels.",
    )
    heads = "layer", "KV×D", "tokens", "K top", "outl.", "max|K|", "max|V|", "sinks", "mid", "recent"
    for head in (*heads, "think"):
        table.add_column(head, justify="right", no_wrap=True)
    for row in summarize(profile):
        table.add_row(
            str(row["layer"]),
            f"{row['kv_heads']}×{row['head_dim']}",
            str(row["tokens"]),
            f"{row['k_energy_top10']:.0%}",
            str(row["k_outliers"]),
            f"{row['k_max_abs']:.1f}",
            f"{row['v_max_abs']:.1f}",
            *(f"{row[f'mass_{name}']:.0%}" for name in ("sinks", "middle", "recent")),
            f"{row['think_top_half']:.0%}",
        )
    out.print(table)
