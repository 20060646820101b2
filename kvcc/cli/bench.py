"""kvcc bench: speed and memory of an artifact on this machine."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich import box
from rich.table import Table

from kvcc.cli._console import err, json_option, out, print_json, progress, size
from kvcc.cli._outputs import check_outputs, write_output
from kvcc.errors import ArtifactError, DataError

if TYPE_CHECKING:
    from kvcc.bench import Bench
    from kvcc.runtime import CompiledModel

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


@click.command("bench")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--contexts", default="1024,4096,8192", show_default=True, help="Tokens cached per sequence.")
@click.option("--batch", default="1,4,16", show_default=True, help="Sequences decoded together.")
@click.option(
    "--steps", default=64, show_default=True, type=click.IntRange(1), help="Decode steps timed at each."
)
@click.option(
    "--memory", default="4GiB", show_default=True, help="Cache size for which the largest batch is given."
)
@click.option("--threads", type=click.IntRange(1), help="CPU threads; default: as torch chooses.")
@click.option(
    "--weights",
    type=click.Choice(["float32", "bfloat16", "int8"]),
    help="How linear layers store their weights; default: as the artifact does.",
)
@click.option("--device", default="cpu", show_default=True)
@click.option(
    "--backend", default="auto", show_default=True, type=click.Choice(["auto", "reference", "cpu", "triton"])
)
@click.option(
    "--plot", type=click.Path(path_type=Path), help="Draw decode time against context to this SVG file."
)
@json_option
def command(
    artifact: Path,
    contexts: str,
    batch: str,
    steps: int,
    memory: str,
    threads: int | None,
    weights: str | None,
    device: str,
    backend: str,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Measure ARTIFACT here: decode and prefill speed, the cache's own cost, bytes, batches, attention kernels.

    Best on an idle machine; the default run takes a few minutes for a model of 135M parameters on two cores.
    """
    import torch

    from kvcc.bench import bench
    from kvcc.runtime import load

    lengths, batches = _numbers("--contexts", contexts), _numbers("--batch", batch)
    budget = _bytes("--memory", memory)
    if plot is not None:
        _check_writable(plot, artifact)
    if threads is not None:
        torch.set_num_threads(threads)
    options: dict[str, Any] = {"weights": weights} if weights else {}
    model = load(artifact, device=device, backend=backend, **options)
    with progress(as_json) as advance:
        result = bench(
            model,
            lengths,
            batches,
            steps=steps,
            budget=budget,
            on_progress=advance,
        )
    if plot is not None:
        write_output(plot, _drawing(model, result))
    if as_json:
        print_json(_facts(model, weights) | {"steps": steps} | result.as_dict())
        return
    _show(model, weights, result)


def _facts(model: "CompiledModel", weights: str | None) -> dict[str, Any]:
    """What was measured, and on what."""
    import torch

    from kvcc.environment import environment

    machine = environment()
    return {
        "model": model.identity.name,
        "recipe": model.recipe,
        "weights": weights or model.identity.dtype,
        "backend": model.backend.name,
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "kvcc": machine["kvcc"],
        "torch": machine["packages"]["torch"],
        "system": machine["system"],
        "cpu_features": machine["cpu"]["features"],
        "gpu": machine["gpu"],
    }


def _show(model: "CompiledModel", weights: str | None, result: "Bench") -> None:
    facts = _facts(model, weights)
    threads = f"{facts['threads']} thread{'s' * (facts['threads'] != 1)}"
    for line in (
        f"{facts['model']}, {facts['recipe']}",
        f"{facts['backend']} kernels on {facts['device']}, {threads}, {facts['weights']} weights",
    ):
        out.print(line, markup=False, highlight=False, soft_wrap=True)
    for table in (_decode_table(result), _slope_table(result), _context_table(result), _attend_table(result)):
        if table.row_count:
            out.print(table)
    out.print(
        f"memory: {result.read_rate:.1f} GB/s read, {result.copy_rate:.1f} GB/s moved by a copy "
        "(read plus written)",
        highlight=False,
    )
    for line in result.skipped:
        err.print(f"skipped: {line}", markup=False, highlight=False, soft_wrap=True)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE, collapse_padding=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _short(ms: float, decimals: int = 2) -> str:
    """At least three digits, and `decimals` after the point for what is below 10."""
    return f"{ms:.{max(0, decimals - (ms >= 10) - (ms >= 100))}f}"


def _decode_table(result: "Bench") -> Table:
    from kvcc.bench import spread

    table = _table(
        "decode, ms per token of each sequence",
        "batch", "context", "median", "quartiles", "tokens/s", "cache", "of fp16", "peak RSS",
    )  # fmt: skip
    for row, after in zip(result.decode, [*result.decode[1:], None]):
        times = spread(row.milliseconds)
        table.add_row(
            str(row.batch),
            f"{row.context:,}",
            f"{times['median_ms']:.2f}",
            f"{_short(times['lower_ms'])}–{_short(times['upper_ms'])}",
            f"{1e3 * row.batch / times['mean_ms']:,.1f}",
            size(row.cache_bytes),
            f"{row.cache_bytes / row.fp16_bytes:.2f}",
            size(row.peak_rss),
            end_section=after is None or after.batch != row.batch,
        )
    return table


def _slope_table(result: "Bench") -> Table:
    table = _table("a step as a line, ms", "batch", "per 1,000 cached tokens", "at an empty cache")
    for batch, line in result.slopes.items():
        table.add_row(str(batch), f"{line.per_thousand:.3f}", f"{line.at_zero:.2f}")
    return table


def _context_table(result: "Bench") -> Table:
    budget = size(result.largest_batch[0].budget) if result.largest_batch else ""
    table = _table(
        "one sequence",
        "\ncontext", "prefill\ntokens/s", "\npeak RSS", "bytes\nper token", "\nfp16", f"batch in\n{budget}", "\nfp16",
    )  # fmt: skip
    allocated = {
        row.context: (row.cache_bytes / row.tokens, row.fp16_bytes / row.tokens) for row in result.decode
    }
    prefill = {row.context: row for row in result.prefill}
    largest = {row.context: row for row in result.largest_batch}
    for context in sorted({*prefill, *largest, *allocated}):
        cells = ["", "", "", "", "", ""]
        if row := prefill.get(context):
            cells[:2] = f"{row.tokens_per_second:,.0f}", size(row.peak_rss)
        if context in allocated:
            cells[2:4] = (f"{n:,.0f}" for n in allocated[context])
        if found := largest.get(context):
            cells[4:] = f"{found.batch:,}", f"{found.fp16_batch:,}"
        table.add_row(f"{context:,}", *cells)
    return table


def _attend_table(result: "Bench") -> Table:
    from kvcc.bench import spread

    table = _table(
        "one layer's attention alone",
        "batch", "context", "median ms", "quartiles", "read", "GB/s", "of copy", "of read",
    )  # fmt: skip
    for row in result.attend:
        times, rate = spread(row.milliseconds), row.gigabytes_per_second
        table.add_row(
            str(row.batch),
            f"{row.context:,}",
            f"{times['median_ms']:.3f}",
            f"{_short(times['lower_ms'], 3)}–{_short(times['upper_ms'], 3)}",
            size(row.nbytes),
            f"{rate:.1f}",
            f"{rate / result.copy_rate:.2f}",
            f"{rate / result.read_rate:.2f}",
        )
    return table


def _drawing(model: "CompiledModel", result: "Bench") -> str:
    """Decode time against context, a curve a batch size, as an SVG file."""
    from statistics import median

    from kvcc.charts import Line, beside, lines, token_count

    curves = [
        Line(
            f"batch {batch}",
            tuple((row.length, median(row.milliseconds)) for row in result.decode if row.batch == batch),
        )
        for batch in sorted({row.batch for row in result.decode})
    ]
    title = f"{model.identity.name}, {model.recipe}: decode time"
    chart = lines(
        curves,
        title=title,
        x_label="tokens cached per sequence",
        y_label="ms per step",
        show_x=lambda n: token_count(round(n)),
    )
    return beside([chart], title=title, columns=1)


def _numbers(option: str, text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise DataError(f"{option} {text!r}: give whole numbers from 1 with commas between, such as 1,4,16")
    return numbers


def _bytes(option: str, text: str) -> int:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]|[kmgt]i)?b?\s*", text, re.IGNORECASE)
    if match is None:
        raise DataError(f"{option} {text!r}: give bytes with a unit, such as 512MiB or 4GiB")
    return int(float(match[1]) * _UNITS[(match[2] or "").lower()])


def _check_writable(plot: Path, artifact: Path) -> None:
    if plot.resolve().is_relative_to(artifact.resolve()):
        raise ArtifactError(f"{plot} is inside the artifact, which would no longer match its digests")
    check_outputs(plot)
