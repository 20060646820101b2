"""The README's picture: accuracy against bytes per token, and cache bytes against context, of real artifacts.

    python benchmarks/picture.py build/*.kvcc -o docs/picture.svg [--text prose] [--context 8192]

Every number is read from the artifacts: bytes from their plans, perplexity from the accuracy.json that
`kvcc check --store` left. All must be of one model, measured on the same texts with the same sizes and seed,
so that the points can be compared.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch

from kvcc import charts
from kvcc.errors import ArtifactError, KvccError
from kvcc.runtime.artifact import read_artifact
from kvcc.runtime.plan import Plan

SHORTEST = 32  # tokens


@dataclass(frozen=True)
class Measured:
    """One artifact: its recipe, its plan, and the perplexity increase (percent) on the chosen text."""

    recipe: str
    plan: Plan
    increase: float


def measured(path: Path, text: str) -> tuple[Measured, Any]:
    """An artifact's numbers, and what must be equal among artifacts in one picture. Raises ArtifactError."""
    found = read_artifact(path, verify="sizes", device=torch.device("cpu"))
    if found.accuracy is None:
        raise ArtifactError(f"{path} holds no accuracy; run kvcc check {path} --against MODEL --store")
    kinds = {t["kind"]: t["overall"]["ppl_increase_percent"] for t in found.accuracy["texts"]}
    if text not in kinds:
        raise ArtifactError(f"{path} was not measured on {text}, only on {', '.join(kinds)}")
    same = (found.manifest.model.digest, found.accuracy["seed"], found.accuracy["size"])
    return Measured(found.manifest.recipe_name, found.plan, kinds[text]), same


def trade(rows: list[Measured], text: str) -> str:
    """Perplexity increase against bytes per token: lower and further left is better."""
    return charts.lines(
        [charts.Line(r.recipe, ((r.plan.bytes_per_token(), r.increase),)) for r in rows],
        named=True,
        title=f"Perplexity increase on held-out {text} against bytes per token",
        x_label=f"cache bytes per token (fp16: {rows[0].plan.uncompressed_bytes_per_token():,})",
        y_label=f"perplexity on held-out {text}, % above uncompressed",
    )


def growth(rows: list[Measured], context: int) -> str:
    """Cache bytes of one sequence against its length, and the same in fp16."""
    lengths = [
        n for k in range(context.bit_length()) for n in (1 << k, 3 << k >> 1) if SHORTEST <= n < context
    ]
    lengths.append(context)
    widest = max(
        (r.plan for r in rows), key=lambda plan: plan.uncompressed_bytes_per_token()
    )  # folds narrow some
    curves = [charts.Line(r.recipe, tuple((n, r.plan.cache_bytes(n)) for n in lengths)) for r in rows]
    curves.append(charts.Line("fp16", tuple((n, widest.uncompressed_bytes(n)) for n in lengths), quiet=True))
    return charts.lines(
        curves,
        log="xy",
        title="Cache bytes against context length",
        x_label="context length, tokens",
        y_label="cache of one sequence, exact windows included",
        show_x=charts.token_count,
        show_y=charts.binary_size,
    )


@click.command()
@click.argument("artifacts", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", default="docs/picture.svg", show_default=True, type=click.Path(path_type=Path)
)
@click.option("--text", default="prose", show_default=True, help="Kind of held-out text.")
@click.option("--context", default=8192, show_default=True, type=click.IntRange(min=SHORTEST + 1))
def main(artifacts: tuple[Path, ...], output: Path, text: str, context: int) -> None:
    """Draw ARTIFACTS."""
    try:
        found = [measured(path, text) for path in artifacts]
    except KvccError as error:
        raise click.ClickException(str(error)) from error
    if any(same != found[0][1] for _, same in found):
        raise click.ClickException(
            "the artifacts differ in model, seed or size of the check; measure them alike"
        )
    rows = sorted((row for row, _ in found), key=lambda r: -r.plan.bytes_per_token())
    title = "kvcc recipes: perplexity against bytes per token, and cache bytes against context length"
    output.write_text(
        charts.beside([trade(rows, text), growth(rows, context)], title=title), encoding="utf-8"
    )
    for row in rows:
        click.echo(
            f"{row.recipe:24} {row.plan.bytes_per_token():10,.0f} bytes a token {row.increase:+8.2f} %"
        )


if __name__ == "__main__":
    main()
