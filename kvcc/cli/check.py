"""kvcc check: accuracy of an artifact against its model, held to gates."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from kvcc.cli._console import err, json_option, out, print_json, progress
from kvcc.cli._outputs import check_outputs, write_output
from kvcc.errors import DataError

if TYPE_CHECKING:
    from kvcc.kernels.linear import WeightType


@click.command("check")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--against", required=True, metavar="MODEL", help="The model it was compiled from.")
@click.option(
    "--data", multiple=True, default=("prose",), show_default=True, help="prose, code, odd, or a prompt file."
)
@click.option(
    "--gates",
    type=click.Path(path_type=Path),
    help="YAML file of gates. Without it: that the bytes allocated are the plan's.",
)
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
    "--retrieval", default="1024", show_default=True, help="Context lengths, comma-separated; 0 for none."
)
@click.option("--retrieval-tasks", default=4, show_default=True, type=click.IntRange(min=1))
@click.option(
    "--greedy",
    default=64,
    show_default=True,
    type=click.IntRange(min=0),
    help="Tokens to continue; 0 for none.",
)
@click.option(
    "--contexts",
    default="0",
    show_default=True,
    help="Other, shorter prefills to measure behind, comma-separated; 0 for none.",
)
@click.option("--layers", is_flag=True, help="Also measure each layer compressed by itself.")
@click.option("--seed", default=0, show_default=True)
@click.option("--backend", default="auto", show_default=True, type=click.Choice(["auto", "reference", "cpu"]))
@click.option(
    "--weights",
    type=click.Choice(["float32", "bfloat16", "int8"]),
    help="Store linear layers so (CPU): fewer bytes to read a step, at some accuracy.  [default: as they are]",
)
@click.option("--junit", type=click.Path(path_type=Path), help="Write a JUnit XML file.")
@click.option(
    "--markdown", type=click.Path(path_type=Path), help="Append a summary in Markdown to this file."
)
@click.option(
    "--store", is_flag=True, help="Keep the result in the artifact (accuracy.json and report.html)."
)
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    artifact: Path,
    against: str,
    data: tuple[str, ...],
    gates: Path | None,
    texts: int,
    length: int,
    context: int,
    retrieval: str,
    retrieval_tasks: int,
    greedy: int,
    contexts: str,
    layers: bool,
    seed: int,
    backend: str,
    weights: "WeightType | None",
    junit: Path | None,
    markdown: Path | None,
    store: bool,
    as_json: bool,
) -> None:
    """Measure ARTIFACT through its real cache. Exits 0 when all gates hold, 1 when one does not, 2 on bad input."""
    from kvcc import verdict_formats as formats
    from kvcc.checking import CheckSize, check, store_accuracy
    from kvcc.gates import load_gates
    from kvcc.runtime.signature import read_signature

    check_outputs(junit, markdown)
    limits = load_gates(gates) if gates else None
    size = CheckSize(
        texts,
        length,
        context,
        _lengths(retrieval),
        retrieval_tasks,
        greedy_prompts=texts if greedy else 0,
        greedy_tokens=greedy,
        other_contexts=_lengths(contexts, "--contexts"),
        layers=layers,
    )
    with progress(as_json) as advance:
        verdict = check(
            artifact,
            against,
            gates=limits,
            data=kinds_of(data),
            size=size,
            seed=seed,
            backend=backend,
            weights=weights,
            on_progress=advance,
        )
    if as_json:
        print_json(verdict.as_dict())
    else:
        for table in formats.tables(verdict):
            out.print(table)
    if junit:
        write_output(junit, formats.junit(verdict))
    if markdown:
        write_output(markdown, formats.markdown(verdict), append=True)
    if store:
        signed = read_signature(artifact) is not None
        store_accuracy(artifact, verdict)
        if signed:
            err.print(
                f"{artifact}: its signature was of what it was before; sign it again: kvcc sign", markup=False
            )
    ctx.exit(0 if verdict.passed else 1)


def kinds_of(data: tuple[str, ...]) -> tuple[str, ...]:
    """Kinds of text, given apart or with commas."""
    return tuple(kind for each in data for kind in each.split(",") if kind)


def _lengths(text: str, option: str = "--retrieval") -> tuple[int, ...]:
    try:
        lengths = tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise DataError(f"{option} {text!r}: give context lengths such as 1024,2048, or 0") from None
    if any(n < 0 for n in lengths):
        raise DataError(f"{option} {text!r}: lengths are tokens, 0 for none")
    return tuple(n for n in lengths if n)
