"""kvcc inspect: what is in an artifact."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import torch
from rich.markup import escape
from rich.table import Table

from kvcc.cli._console import json_option, out, print_json, size
from kvcc.engines import engines
from kvcc.errors import ArtifactError


@click.command("inspect")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--verify", is_flag=True, help="Check the digest of every file.")
@click.option(
    "--key",
    type=click.Path(path_type=Path),
    help="Also check that one of the Ed25519 public keys in this PEM file signed it.",
)
@json_option
def command(artifact: Path, verify: bool, key: Path | None, as_json: bool) -> None:
    """Print model, recipe, layer table, bytes, accuracy, and which backends and engines can run ARTIFACT."""
    from kvcc.runtime.artifact import read_artifact, verify_digests
    from kvcc.runtime.signature import read_signature

    if verify and (problems := verify_digests(artifact)):
        raise ArtifactError(f"{artifact}: {'; '.join(problems)}")
    found = read_artifact(artifact, verify="sizes", device=torch.device("cpu"), key=key)
    signature = read_signature(artifact)
    plan, manifest = found.plan, found.manifest
    facts: dict[str, Any] = {
        "artifact": str(artifact),
        "model": manifest.model.model_dump(),
        "recipe": manifest.recipe,
        "kvcc_version": manifest.kvcc_version,
        "digests": "verified" if verify or found.signer else "not checked",
        "signature": None if signature is None else {"key": signature.key, "verified": bool(found.signer)},
        "bytes_per_token": plan.bytes_per_token(),
        "fp16_bytes_per_token": plan.uncompressed_bytes_per_token(),
        "bits_per_element": plan.bits_per_element(),
        "smaller_from_tokens": plan.break_even(),
        "cache_bytes": {n: [plan.cache_bytes(n), plan.uncompressed_bytes(n)] for n in (4096, 8192)},
        "layers": [_layer(plan, i) for i in range(len(plan.layers))],
        "gpu_kernels": {target: _carried(index) for target, index in found.kernels.items()},
        "backends": _backends(plan),
        "engines": engines(manifest.recipe.get("passes", []), manifest.folded, plan, found.graph),
        "accuracy": found.accuracy,
    }
    if as_json:
        print_json(facts)
        return
    _show(facts)


def _carried(index: Any) -> dict[str, Any]:
    """What an artifact carries for one GPU target, and whether this machine's Triton and kvcc would take it."""
    return {
        "kernels": len(index.kernels),
        "triton": index.triton,
        "sources": index.sources,
        "usable_here": _mismatch(index) is None,
        "why_not": _mismatch(index),
    }


def _mismatch(index: Any) -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed here"
    import triton

    from kvcc.kernels.precompiled import sources_digest

    if index.triton != triton.__version__:
        return f"for triton {index.triton}, this is {triton.__version__}"
    return None if index.sources == sources_digest() else "from other kernel sources than this kvcc's"


def _layer(plan: Any, index: int) -> dict[str, Any]:
    layer = plan.layers[index]
    if layer.window:
        stored = f"sliding window of {layer.window} tokens, exact"
    else:
        k, v = (sorted({_side(getattr(h, side)) for h in layer.heads}) for side in ("k", "v"))
        stored = f"K {' / '.join(k)}; V {' / '.join(v)}"
    return {
        "layer": index,
        "kv_heads": layer.kv_heads,
        "stored": stored,
        "channels": layer.select,
        "sinks": layer.sinks,
        "recent": layer.recent,
        "page": layer.page,
        "bytes_per_token": plan.layer_bytes_per_token(index),
    }


def _side(side: Any) -> str:
    parts = [f"{p.channels} ch x {p.bits} bit" for p in side.planes]
    if side.page_means:
        parts.append(f"{side.page_means} page means")
    return " + ".join(parts)


def _backends(plan: Any) -> dict[str, str | None]:
    """Why each backend cannot run this plan here; None where it can."""
    from kvcc.kernels import backend, usable

    reasons = dict(usable())
    for name, reason in reasons.items():
        if reason is None:
            device = torch.device("cuda" if name == "triton" else "cpu")
            kernels = backend(name, device)
            layouts = [layout for layout in plan.layouts() if layout is not None]
            reasons[name] = next((r for x in layouts if (r := kernels.supports(x, plan.exact, device))), None)
    return reasons


def _show(facts: dict[str, Any]) -> None:
    head = Table(show_header=False)
    model, recipe = facts["model"], facts["recipe"]
    about = f"{model['name']} ({model['model_type']}, {model['layers']} layers, {model['dtype']})"
    head.add_row("model", escape(about))
    head.add_row("recipe", escape(f"{recipe.get('name', '(unnamed)')}: {recipe.get('summary', '')}"))
    head.add_row("digests", facts["digests"])
    head.add_row("signature", _signature(facts["signature"]))
    ratio = facts["fp16_bytes_per_token"] / facts["bytes_per_token"] if facts["bytes_per_token"] else 1.0
    head.add_row(
        "a sealed token",
        f"{facts['bytes_per_token']:,.0f} bytes, fp16 {facts['fp16_bytes_per_token']:,} ({ratio:.2f}x)",
    )
    for tokens, (ours, fp16) in facts["cache_bytes"].items():
        head.add_row(f"{tokens:,} tokens", f"{size(ours)}, fp16 {size(fp16)} ({fp16 / ours:.2f}x)")
    even = facts["smaller_from_tokens"]
    head.add_row("smaller than fp16", f"from {even:,} tokens on" if even is not None else "never")
    for name, reason in facts["backends"].items():
        head.add_row(f"{name} kernels", "can run it here" if reason is None else reason)
    for name, reason in facts["engines"].items():
        head.add_row(f"in {name}", "yes" if reason is None else f"no: {reason}")
    for target, carried in facts["gpu_kernels"].items():
        why = carried["why_not"]
        head.add_row(
            f"carried for {target}",
            escape(f"{carried['kernels']} kernels, triton {carried['triton']}")
            + (f"; not usable here: {escape(why)}" if why else "; used on request (--precompiled)"),
        )
    out.print(head)
    table = Table(
        "layers", "stored in sealed pages", "K channels", "sinks", "recent", "page", "bytes per token"
    )
    for first, last, layer in _runs(facts["layers"]):
        span = f"{first}" if first == last else f"{first} to {last}"
        table.add_row(
            span,
            layer["stored"],
            layer["channels"],
            str(layer["sinks"]),
            str(layer["recent"]),
            str(layer["page"]),
            f"{layer['bytes_per_token']:,.1f}",
        )
    out.print(table)
    if facts["accuracy"] is None:
        out.print("accuracy: not measured; run `kvcc check --store`")
        return
    for line in _accuracy(facts["accuracy"]):
        out.print(line, markup=False)


def _signature(found: dict[str, Any] | None) -> str:
    if found is None:
        return "none"
    return f"by key {found['key'][:16]}…, {'verified' if found['verified'] else 'not checked (--key)'}"


def _accuracy(measured: dict[str, Any]) -> list[str]:
    """One line a text. Raises ArtifactError for an accuracy.json that `kvcc check` did not write."""
    try:
        return [
            f"accuracy on held-out {text['kind']}: KL {text['overall']['kl']:.5f}, "
            f"top-1 {text['overall']['top1']:.4f}, perplexity {text['overall']['ppl_increase_percent']:+.2f} %"
            for text in measured["texts"]
        ]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ArtifactError("accuracy.json: not what was measured here; run `kvcc check --store`") from error


def _runs(layers: list[dict[str, Any]]) -> list[tuple[int, int, dict[str, Any]]]:
    """Neighbouring layers that are alike: first, last, what they are."""
    runs: list[tuple[int, int, dict[str, Any]]] = []
    for layer in layers:
        alike = runs and {**runs[-1][2], "layer": 0} == {**layer, "layer": 0}
        if alike:
            runs[-1] = (runs[-1][0], layer["layer"], runs[-1][2])
        else:
            runs.append((layer["layer"], layer["layer"], layer))
    return runs
