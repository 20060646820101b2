"""kvcc export: compile a model with a recipe and pack the artifact."""

from pathlib import Path
from typing import Any

import click
from rich.markup import escape
from rich.table import Table

from kvcc.cli._console import err, json_option, out, print_json, size


@click.command("export")
@click.argument("model")
@click.option("--recipe", "-r", required=True, help="A shipped recipe (see `kvcc recipes`) or a YAML file.")
@click.option(
    "--profile", "-p", type=click.Path(path_type=Path), help="Calibration profile (kvcc calibrate)."
)
@click.option(
    "--output", "-o", required=True, type=click.Path(path_type=Path), help="Artifact folder to write."
)
@click.option(
    "--dtype", default="float32", type=click.Choice(["float32", "bfloat16", "float16"]), show_default=True
)
@click.option("--force", is_flag=True, help="Replace an existing artifact.")
@click.option("--explain", is_flag=True, help="Say for each layer what each pass did, or why it did nothing.")
@click.option(
    "--gpu",
    "gpus",
    multiple=True,
    metavar="TARGET",
    help="Put kernels compiled for this GPU target (sm_90, gfx942, …) into the artifact; may be given several times.",
)
@click.option("--check", "run_check", is_flag=True, help="Measure accuracy and store it in the artifact.")
@json_option
def command(
    model: str,
    recipe: str,
    profile: Path | None,
    output: Path,
    dtype: str,
    force: bool,
    explain: bool,
    gpus: tuple[str, ...],
    run_check: bool,
    as_json: bool,
) -> None:
    """Compile MODEL (a folder, a hub id, a .gguf file or pypi:PACKAGE) into an artifact."""
    from kvcc.recipe import load_recipe

    chosen = load_recipe(recipe)  # before any model is loaded
    from kvcc.artifact import add_kernels, check_gpu_targets, check_target
    from kvcc.compile import compile_model
    from kvcc.frontend import load_model
    from kvcc.pipeline import PassReport
    from kvcc.profile import Profile

    check_target(output, overwrite=force)
    check_gpu_targets(gpus)
    statistics = Profile.load(profile) if profile else None
    loaded = load_model(model, dtype)

    def show(report: PassReport) -> None:
        if as_json:
            return
        fired = sum(n.fired for n in report.notes)
        out.print(
            f"[bold]{report.name}[/] {report.seconds:.1f} s, {fired} layers, "
            f"{report.bytes_before:,.0f} -> {report.bytes_after:,.0f} bytes per token"
        )
        for note in report.notes if explain else ():
            out.print(f"  layer {note.layer}: {'' if note.fired else 'not applied: '}{escape(note.text)}")

    compiled = compile_model(loaded, statistics, chosen, output, overwrite=force, on_pass=show)
    kernels: dict[str, int] = {}
    if gpus:
        with err.status("compiling GPU kernels", spinner="line"):
            kernels = add_kernels(output, gpus)
    verdict: dict[str, Any] | None = None
    if run_check:
        from kvcc.checking import check, store_accuracy

        with err.status("checking", spinner="line"):
            measured = check(output, loaded)
        store_accuracy(output, measured)
        verdict = measured.as_dict()
    plan = compiled.plan
    summary = {
        "artifact": str(output),
        "recipe": chosen.name,
        "bits_per_element": plan.bits_per_element(),
        "bytes_per_token": plan.bytes_per_token(),
        "fp16_bytes_per_token": plan.uncompressed_bytes_per_token(),
        "layer_bytes_per_token": [plan.layer_bytes_per_token(i) for i in range(len(plan.layers))],
        "smaller_from_tokens": plan.break_even(),
        "passes": [{"name": r.name, "seconds": r.seconds} for r in compiled.reports],
        "gpu_kernels": kernels,
        "accuracy": verdict,
    }
    if as_json:
        print_json(summary)
        return
    table = Table(title=f"{loaded.identity.name}, recipe {chosen.name}: bytes per token")
    for column in ("layers", "stored", "fp16", "ratio"):
        table.add_column(column, justify="right")
    for first, last, stored, plain in _runs(summary["layer_bytes_per_token"], plan):
        span = f"{first}" if first == last else f"{first} to {last}"
        table.add_row(
            span,
            f"{stored:,.0f}" if stored else "window",
            f"{plain:,}",
            f"{plain / stored:.2f}x" if stored else "-",
        )
    out.print(table)
    total, fp16 = plan.bytes_per_token(), plan.uncompressed_bytes_per_token()
    out.print(
        f"{total:,.0f} bytes per token against {fp16:,} in fp16 ({fp16 / total:.2f}x smaller, "
        f"{plan.bits_per_element():.2f} bits per element with scales and zeros)"
    )
    tokens = plan.break_even()
    out.print(
        f"smaller than an fp16 cache from {tokens:,} tokens on (the exact windows cost {size(plan.cache_bytes(0))})"
        if tokens is not None
        else "this recipe saves no memory: its cache is never smaller than an fp16 one"
    )
    if verdict is not None:
        overall = verdict["texts"][0]["overall"]
        out.print(
            f"held-out text: KL {overall['kl']:.4f}, perplexity {overall['ppl_increase_percent']:+.2f} %"
        )
    for target, count in kernels.items():
        out.print(f"carries {count} kernels compiled for {target}")
    out.print(f"wrote {output}")


def _runs(stored: Any, plan: Any) -> list[tuple[int, int, float, int]]:
    """Neighbouring layers that store the same: (first, last, stored bytes, fp16 bytes) per token."""
    runs: list[tuple[int, int, float, int]] = []
    for index, nbytes in enumerate(stored):
        plain = 2 * plan.layers[index].model_elements
        if runs and runs[-1][2:] == (nbytes, plain):
            runs[-1] = (runs[-1][0], index, nbytes, plain)
        else:
            runs.append((index, index, nbytes, plain))
    return runs
