"""kvcc export: compile a model with a recipe and pack the artifact."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import click
from rich.markup import escape
from rich.table import Table

from kvcc.cli._console import err, json_option, out, print_json, progress, size
from kvcc.cli._outputs import trust_own
from kvcc.cli.plan import ratio_of, show

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from kvcc.frontend import LoadedModel
    from kvcc.graph import Graph
    from kvcc.pipeline import Compiled, PassReport
    from kvcc.profile import Profile
    from kvcc.recipe import Recipe
    from kvcc.runtime.plan import Plan


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
    type=click.Choice(["kvcc", "compressed-tensors", "onnx"]),
    help="compressed-tensors: a Hugging Face folder with kv_cache_scheme and scales, for fp8 and int8. "
    "onnx: graphs for ONNX Runtime; MODEL may then be an artifact, without a recipe.",
)
@click.option(
    "--onnx-attention",
    "attention",
    default="standard",
    show_default=True,
    type=click.Choice(["standard", "gqa"]),
    help="gqa: ONNX Runtime's own INT8 cache of all tokens, for int8; it has no exact window.",
)
@click.option(
    "--sign",
    type=click.Path(path_type=Path),
    help="Sign the artifact with this Ed25519 private key (PEM), as `kvcc sign` does.",
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
    attention: Literal["standard", "gqa"],
    sign: Path | None,
    run_check: bool,
    as_json: bool,
) -> None:
    """Compile MODEL (a folder, a hub id, a .gguf file or pypi:PACKAGE) into an artifact."""
    if layout != "kvcc" and (gpus or run_check or sign):
        raise click.UsageError(f"--gpu, --check and --sign are for artifacts, not for --format {layout}")
    if layout != "onnx" and attention != "standard":
        raise click.UsageError("--onnx-attention is for --format onnx")
    if layout == "onnx" and recipe is None and budget is None and (Path(model) / "manifest.json").is_file():
        if profile or explain:
            raise click.UsageError(f"{model} is compiled already: --profile and --explain are for models")
        _onnx(Path(model), output, attention, force, as_json)
        return
    if (recipe is None) == (budget is None):
        raise click.UsageError("give one of --recipe and --budget")
    if layout == "compressed-tensors" and budget is not None:
        raise click.UsageError("--format compressed-tensors is for --recipe fp8 or int8, not for --budget")
    if explain and as_json:
        raise click.UsageError("--explain is for people; with --json leave it out")
    ratio = ratio_of(budget) if budget is not None else None
    trust_own()
    from kvcc.recipe import load_recipe

    chosen = load_recipe(recipe) if recipe is not None else None  # before any model is loaded
    from kvcc.artifact import check_gpu_targets
    from kvcc.compile import compile_model
    from kvcc.frontend import capture, load_model
    from kvcc.profile import Profile
    from kvcc.signing import private_key

    key = private_key(sign) if sign else None
    _check_target(layout, output, force)
    check_gpu_targets(gpus)
    statistics = Profile.load(profile) if profile else None
    loaded = load_model(model, dtype)
    graph = capture(loaded)
    if chosen is None:
        assert ratio is not None
        chosen, statistics = _planned(loaded, graph, statistics, ratio, as_json)
    told = None if as_json else partial(_told, explain)
    if layout == "compressed-tensors":
        _exchange(loaded, graph, statistics, chosen, output, force, as_json, told)
    elif layout == "onnx":
        with TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as folder:
            compile_model(loaded, statistics, chosen, Path(folder) / "model.kvcc", graph=graph, on_pass=told)
            _onnx(Path(folder) / "model.kvcc", output, attention, force, as_json)
    else:
        compiled = compile_model(
            loaded, statistics, chosen, output, graph=graph, overwrite=force, on_pass=told
        )
        added = _added(output, loaded, gpus, run_check, key, as_json)
        summary = _summary(output, chosen, compiled) | added
        if as_json:
            print_json(summary)
        else:
            _show(summary, compiled.plan, loaded.identity.name)


def _check_target(layout: str, output: Path, force: bool) -> None:
    """Refuse before a model is loaded what could not be written."""
    from kvcc.artifact import check_export, check_target

    if layout == "onnx":
        from kvcc.exchange.onnx import DESCRIPTION, check_onnx

        check_onnx()
        check_export(output, DESCRIPTION, overwrite=force)
    elif layout == "compressed-tensors":
        from kvcc.exchange.compressed_tensors import BITS

        check_export(output, BITS, overwrite=force)
    else:
        check_target(output, overwrite=force)


def _told(explain: bool, report: "PassReport") -> None:
    """Print what a pass did."""
    fired = sum(n.fired for n in report.notes)
    out.print(
        f"[bold]{report.name}[/] {report.seconds:.1f} s, {fired} layers, "
        f"{report.bytes_before:,.0f} -> {report.bytes_after:,.0f} bytes per token"
    )
    for note in report.notes if explain else ():
        out.print(f"  layer {note.layer}: {'' if note.fired else 'not applied: '}{escape(note.text)}")


def _added(
    artifact: Path,
    loaded: "LoadedModel",
    gpus: tuple[str, ...],
    run_check: bool,
    key: "Ed25519PrivateKey | None",
    quiet: bool,
) -> dict[str, Any]:
    """Put into an artifact what else was asked for: GPU kernels, its accuracy, and a signature, which covers these."""
    kernels: dict[str, int] = {}
    if gpus:
        from kvcc.artifact import add_kernels

        with err.status("compiling GPU kernels", spinner="line"):
            kernels = add_kernels(artifact, gpus)
    accuracy: dict[str, Any] | None = None
    if run_check:
        from kvcc.checking import CheckSize, check, store_accuracy

        fitting = CheckSize().within(loaded.identity.context_length)
        with progress(quiet) as advance:
            verdict = check(artifact, loaded, size=fitting, on_progress=advance)
        store_accuracy(artifact, verdict)
        accuracy = verdict.as_dict()
    signer = None
    if key:
        from kvcc.signing import sign_artifact

        signer = sign_artifact(artifact, key)
    return {"gpu_kernels": kernels, "signed_by": signer, "accuracy": accuracy}


def _summary(output: Path, recipe: "Recipe", compiled: "Compiled") -> dict[str, Any]:
    """What was compiled, for machines."""
    plan = compiled.plan
    return {
        "artifact": str(output),
        "recipe": recipe.name,
        "bits_per_element": plan.bits_per_element(),
        "bytes_per_token": plan.bytes_per_token(),
        "fp16_bytes_per_token": plan.uncompressed_bytes_per_token(),
        "layer_bytes_per_token": [plan.layer_bytes_per_token(i) for i in range(len(plan.layers))],
        "smaller_from_tokens": plan.break_even(),
        "passes": [{"name": r.name, "seconds": r.seconds} for r in compiled.reports],
    }


def _show(summary: dict[str, Any], plan: "Plan", model: str) -> None:
    """Print what was exported, for people."""
    table = Table(title=f"{model}, recipe {summary['recipe']}: bytes per token")
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
    out.print(_saved(plan))
    if summary["accuracy"] is not None:
        overall = summary["accuracy"]["texts"][0]["overall"]
        out.print(
            f"held-out text: KL {overall['kl']:.4f}, perplexity {overall['ppl_increase_percent']:+.2f} %"
        )
    for target, count in summary["gpu_kernels"].items():
        out.print(f"carries {count} kernels compiled for {target}")
    signer = summary["signed_by"]
    out.print(f"wrote {summary['artifact']}" + (f", signed by key {signer[:16]}…" if signer else ""))


def _saved(plan: "Plan") -> str:
    """What the plan saves, in two lines."""
    total, fp16 = plan.bytes_per_token(), plan.uncompressed_bytes_per_token()
    if not total:
        return "all layers have sliding windows, which stay exact: the cache does not grow"
    tokens = plan.break_even()
    when = (
        f"smaller than an fp16 cache from {tokens:,} tokens on (the exact windows cost {size(plan.cache_bytes(0))})"
        if tokens is not None
        else "this recipe saves no memory: its cache is never smaller than an fp16 one"
    )
    return (
        f"{total:,.0f} bytes per token against {fp16:,} in fp16 ({fp16 / total:.2f}x smaller, "
        f"{plan.bits_per_element():.2f} bits per element with scales and zeros)\n{when}"
    )


def _runs(stored: list[float], plan: "Plan") -> list[tuple[int, int, float, int]]:
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
    graph: "Graph",
    profile: "Profile | None",
    recipe: "Recipe",
    output: Path,
    force: bool,
    as_json: bool,
    told: "Callable[[PassReport], None] | None",
) -> None:
    from kvcc.exchange.compressed_tensors import write_compressed_tensors
    from kvcc.pipeline import run_passes

    compiled = run_passes(graph, profile, recipe, on_pass=told)
    scales = write_compressed_tensors(loaded, profile, recipe, compiled, output, overwrite=force)
    if as_json:
        print_json({"folder": str(output), "scales": scales})
    else:
        out.print(f"{output}: the model with {len(scales)} scales of its cache, for vLLM and llm-compressor")


def _onnx(
    artifact: Path, output: Path, attention: Literal["standard", "gqa"], force: bool, as_json: bool
) -> None:
    """Lower an artifact to ONNX."""
    from kvcc.exchange.onnx import write_onnx
    from kvcc.runtime.artifact import read_artifact

    description = write_onnx(read_artifact(artifact), output, overwrite=force, attention=attention)
    if as_json:
        print_json({"folder": str(output)} | {k: v for k, v in description.items() if k != "states"})
        return
    out.print(
        f"{output}: ONNX graphs of {description['model']['name']}, recipe "
        f"{description['recipe']}; {description['bytes_per_token']:,.0f} bytes per token"
    )


def _planned(
    loaded: "LoadedModel", graph: "Graph", profile: "Profile | None", ratio: float, quiet: bool
) -> "tuple[Recipe, Profile]":
    """The recipe that `kvcc plan` finds for a budget, and the profile it was found with, made here if need be."""
    from kvcc.frontend import runtime_tokenizer
    from kvcc.planner import Goal, calibrated, search
    from kvcc.recipe import parse_recipe
    from kvcc.uncompressed import uncompressed

    tokenizer = runtime_tokenizer(loaded)

    with progress(quiet) as advance:
        profile = profile or calibrated(graph, tokenizer, on_progress=advance)
        reference = uncompressed(loaded, tokenizer, graph)
        found = search(graph, reference, profile, Goal(bits=16 / ratio), on_progress=advance)
    if not quiet:
        show(found, loaded.identity.name)
    return parse_recipe(f"name: budget-{ratio:g}x\n{found.winner.recipe}", "plan"), profile
