"""kvcc export: compile a model with a recipe and pack the artifact."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.markup import escape
from rich.table import Table

from kvcc.cli._console import err, json_option, out, print_json, progress, size
from kvcc.cli.plan import ratio_of, show

if TYPE_CHECKING:
    from kvcc.frontend import LoadedModel
    from kvcc.profile import Profile
    from kvcc.recipe import Recipe


@click.command("export")
@click.argument("model")
@click.option("--recipe", "-r", help="A shipped recipe (see `kvcc recipes`) or a YAML file.")
@click.option(
    "--budget",
    metavar="RATIO",
    help="Instead of a recipe: the one that `kvcc plan` finds for pages this many times smaller than fp16, such as 5x. "
    "Without a profile it calibrates first.",
)
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
@click.option(
    "--format",
    "layout",
    default="kvcc",
    show_default=True,
    type=click.Choice(["kvcc", "compressed-tensors"]),
    help="compressed-tensors: a Hugging Face folder with kv_cache_scheme and scales, for fp8 and int8.",
)
@click.option("--check", "run_check", is_flag=True, help="Measure accuracy and store it in the artifact.")
@json_option
def command(
    model: str,
    recipe: str | None,
    budget: str | None,
    profile: Path | None,
    output: Path,
    dtype: str,
    force: bool,
    explain: bool,
    gpus: tuple[str, ...],
    layout: str,
    run_check: bool,
    as_json: bool,
) -> None:
    """Compile MODEL (a folder, a hub id, a .gguf file or pypi:PACKAGE) into an artifact."""
    if (recipe is None) == (budget is None):
        raise click.UsageError("give one of --recipe and --budget")
    ratio = ratio_of(budget) if budget is not None else None
    from kvcc.recipe import load_recipe

    chosen = load_recipe(recipe) if recipe is not None else None  # before any model is loaded
    from kvcc.artifact import add_kernels, check_gpu_targets, check_target
    from kvcc.compile import compile_model
    from kvcc.frontend import load_model
    from kvcc.pipeline import PassReport
    from kvcc.profile import Profile

    if layout != "kvcc" and (gpus or run_check):
        raise click.UsageError(f"--gpu and --check are for artifacts, not for --format {layout}")
    check_target(output, overwrite=force)
    check_gpu_targets(gpus)
    statistics = Profile.load(profile) if profile else None
    loaded = load_model(model, dtype)

    if chosen is None:
        assert ratio is not None
        chosen, statistics = _planned(loaded, statistics, ratio, as_json)

    def told(report: PassReport) -> None:
        if as_json:
            return
        fired = sum(n.fired for n in report.notes)
        out.print(
            f"[bold]{report.name}[/] {report.seconds:.1f} s, {fired} layers, "
            f"{report.bytes_before:,.0f} -> {report.bytes_after:,.0f} bytes per token"
        )
        for note in report.notes if explain else ():
            out.print(f"  layer {note.layer}: {'' if note.fired else 'not applied: '}{escape(note.text)}")

    if layout == "compressed-tensors":
        _exchange(loaded, statistics, chosen, output, force, as_json)
        return
    compiled = compile_model(loaded, statistics, chosen, output, overwrite=force, on_pass=told)
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


def _exchange(
    loaded: "LoadedModel",
    profile: "Profile | None",
    recipe: "Recipe",
    output: Path,
    force: bool,
    as_json: bool,
) -> None:
    from kvcc.exchange.compressed_tensors import write_compressed_tensors
    from kvcc.frontend import capture
    from kvcc.pipeline import run_passes

    compiled = run_passes(capture(loaded), profile, recipe)
    scales = write_compressed_tensors(loaded, profile, recipe, compiled, output, overwrite=force)
    if as_json:
        print_json({"folder": str(output), "scales": scales})
    else:
        out.print(f"{output}: the model with {len(scales)} scales of its cache, for vLLM and llm-compressor")


def _planned(
    loaded: "LoadedModel", profile: "Profile | None", ratio: float, quiet: bool
) -> "tuple[Recipe, Profile]":
    """The recipe that `kvcc plan` finds for a budget, and the profile it was found with, made here if need be."""
    from kvcc.planner import Goal, calibrated, search
    from kvcc.recipe import parse_recipe

    with progress(quiet) as bar:
        tasks: dict[str, Any] = {}

        def advance(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done)

        profile = profile or calibrated(loaded, on_progress=advance)
        found = search(loaded, profile, Goal(bits=16 / ratio), on_progress=advance)
    if not quiet:
        show(found, loaded.identity.name)
    return parse_recipe(f"name: budget-{ratio:g}x\n{found.winner.recipe}", "plan"), profile
