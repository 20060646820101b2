"""kvcc compare: several artifacts of one model on the same texts."""

from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.box import SIMPLE
from rich.table import Table

from kvcc.cli._console import json_option, out, print_json, progress, size
from kvcc.cli._outputs import check_outputs, write_output

if TYPE_CHECKING:
    from kvcc.compare import Entry
    from kvcc.kernels.linear import WeightType


@click.command("compare")
@click.argument("artifacts", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--against", required=True, metavar="MODEL", help="The model they were compiled from.")
@click.option("--data", multiple=True, default=("prose", "code"), show_default=True, help="As for check.")
@click.option(
    "--texts", default=4, show_default=True, type=click.IntRange(min=1), help="Sequences of each kind."
)
@click.option(
    "--length", default=1536, show_default=True, type=click.IntRange(min=2), help="Tokens of a sequence."
)
@click.option(
    "--context", default=1024, show_default=True, type=click.IntRange(min=1), help="Of these, prefilled."
)
@click.option(
    "--retrieval", default="0", show_default=True, help="Context lengths, comma-separated; 0 for none."
)
@click.option("--retrieval-tasks", default=4, show_default=True, type=click.IntRange(min=1))
@click.option(
    "--steps", default=16, show_default=True, type=click.IntRange(min=1), help="Decode steps to time."
)
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--weights", type=click.Choice(["float32", "bfloat16", "int8"]), help="Store linear layers so (CPU)."
)
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Write the numbers as JSON.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw bits against KL, as .svg.")
@json_option
def command(
    artifacts: tuple[Path, ...],
    against: str,
    data: tuple[str, ...],
    texts: int,
    length: int,
    context: int,
    retrieval: str,
    retrieval_tasks: int,
    steps: int,
    seed: int,
    weights: "WeightType | None",
    output: Path | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Measure ARTIFACTS against their model in one run: bits, KL, top-1, perplexity, retrieval, bytes, speed."""
    import json

    from kvcc.checking import CheckSize
    from kvcc.cli.check import _lengths, kinds_of
    from kvcc.compare import as_dict, compare, drawn

    check_outputs(output, plot)
    wanted = CheckSize(texts, length, context, _lengths(retrieval), retrieval_tasks, greedy_prompts=0)
    with progress(as_json) as advance:
        found = compare(
            artifacts,
            against,
            data=kinds_of(data),
            size=wanted,
            seed=seed,
            steps=steps,
            weights=weights,
            on_progress=advance,
        )
    if as_json:
        print_json(as_dict(found))
    else:
        out.print(table_of(found, context))
    if output is not None:
        write_output(output, f"{json.dumps(as_dict(found), indent=2)}\n")
    if plot is not None:
        write_output(plot, f"{drawn(found)}\n")


def table_of(entries: "list[Entry]", context: int) -> Table:
    """A row an artifact and kind of text; artifacts that no other beats in bits and KL are marked."""
    table = Table(
        title=f"decode steps at {context:,} tokens; *: no other has a smaller KL at as few bits", box=SIMPLE
    )
    asked = any(e.retrieval_drop is not None for e in entries)
    for heading in ("artifact", "bits", "bytes", "text", "KL", "top-1", "ppl", "cache", "ms"):
        words = heading in ("artifact", "text")
        table.add_column(heading, justify="left" if words else "right", no_wrap=not words, overflow="fold")
    if asked:
        table.add_column("retrieval", justify="right")
    for e in entries:
        drop = "-" if e.retrieval_drop is None else f"{-e.retrieval_drop:+.1f}"
        about = [
            f"{e.name}{' *' if e.on_front else ''}",
            f"{e.bits_per_element:.2f}",
            f"{e.bytes_per_token:,.0f}",
        ]
        for kind in e.kl:
            text = [
                kind,
                f"{e.kl[kind]:.4f}",
                f"{100 * e.top1[kind]:.1f}%",
                f"{e.perplexity_increase[kind]:+.2f}%",
            ]
            speed = [size(e.cache_bytes), f"{e.decode_ms:.1f}", *([drop] if asked else [])]
            table.add_row(*about, *text, *(speed if about[0] else []))
            about = ["", "", ""]
    return table
