"""The report: what an artifact stores and how accurate it is, as one HTML page that loads nothing.

`report_facts` gathers the numbers and `report_html` draws them; both are pure. What comes from an artifact is
untrusted text: the template escapes it, and unprintable characters are dropped.
"""

import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import yaml
from markupsafe import Markup, escape
from pydantic import BaseModel, NonNegativeInt, ValidationError, model_validator

from kvcc import charts
from kvcc.errors import ArtifactError
from kvcc.gates import GateResult
from kvcc.kernels.layout import PageLayout, Side
from kvcc.measure import Bucket, GreedyAgreement, RetrievalScore, TextAgreement
from kvcc.runtime.identity import ModelIdentity
from kvcc.runtime.plan import LayerPlan, Plan

if TYPE_CHECKING:
    from kvcc.checking import Verdict
    from kvcc.runtime.artifact import Artifact

__all__ = ["render_report", "report_facts", "report_html", "stored_facts"]

SHORTEST, LONGEST = 32, 1 << 20  # tokens, of the curve of cache bytes
EXAMPLE = 8192  # tokens, of the figure at the top, where the model's context is that long
LARGEST_LOSS = 500.0  # nats per token; beyond it a perplexity overflows

Facts = dict[str, Any]


def render_report(artifact: Path, verdict: "Verdict | None") -> str:
    """The report of an artifact folder, as HTML.

    Without `verdict` it shows the accuracy stored in the artifact, if any. Raises ArtifactError.
    """
    found = _read(artifact)
    measured = verdict.as_dict() if verdict is not None else found.accuracy
    manifest = found.manifest
    return report_html(found.plan, manifest.model, manifest.recipe, _provenance(found), measured)


def stored_facts(artifact: Path) -> Facts:
    """`report_facts` of an artifact folder, with the accuracy stored in it. Raises ArtifactError."""
    found = _read(artifact)
    manifest = found.manifest
    return report_facts(found.plan, manifest.model, manifest.recipe, _provenance(found), found.accuracy)


def report_html(
    plan: Plan,
    identity: ModelIdentity,
    recipe: Mapping[str, Any],
    provenance: Mapping[str, Any],
    verdict: Mapping[str, Any] | None,
) -> str:
    """One self-contained HTML page; the same input gives the same text.

    `provenance` maps labels to values, and under "files" file names to digests. `verdict` is
    `Verdict.as_dict()`, or the same from JSON. Raises ArtifactError when the verdict is not one.
    """
    facts = report_facts(plan, identity, recipe, provenance, verdict)
    measured = None if verdict is None else _read_verdict(verdict)
    return _template().render(
        facts=facts,
        model=facts["model"],
        summary=_summary(facts, measured),
        recipe_name=str(recipe.get("name") or "(unnamed)"),
        recipe_summary=str(recipe.get("summary") or ""),
        files=provenance.get("files", {}),
        recipe_yaml=escape(yaml.safe_dump(_plain(recipe), sort_keys=False, allow_unicode=True)),
        windows=[layer for layer in facts["layers"] if layer["window"]],
        charts=_memory_charts(facts),
        rows=_memory_rows(facts),
        measured=measured,
        accuracy=None if measured is None else _accuracy(measured),
        style=Markup(charts.STYLE),
    )


def report_facts(
    plan: Plan,
    identity: ModelIdentity,
    recipe: Mapping[str, Any],
    provenance: Mapping[str, Any],
    verdict: Mapping[str, Any] | None,
) -> Facts:
    """Every number of the report as plain data, for JSON. Raises ArtifactError when `verdict` is not one."""
    if verdict is not None:
        _read_verdict(verdict)
    layouts = plan.layouts()
    paged = [p for p in plan.layers if p.page]
    even = plan.break_even()
    return {
        "model": identity.model_dump(),
        "recipe": dict(recipe),
        "provenance": dict(provenance),
        "bytes_per_token": plan.bytes_per_token(),
        "fp16_bytes_per_token": sum(2 * p.model_elements for p in paged),  # of the same layers
        "bits_per_element": plan.bits_per_element() if paged else None,
        "smaller_from_tokens": even,
        "layers": [_layer(i, p, layout) for i, (p, layout) in enumerate(zip(plan.layers, layouts))],
        "cache": [
            {"tokens": n, "bytes": plan.cache_bytes(n), "fp16_bytes": plan.uncompressed_bytes(n)}
            for n in _lengths(identity.context_length, even)
        ],
        "accuracy": None if verdict is None else dict(verdict),
    }


def _read(artifact: Path) -> "Artifact":
    import torch

    from kvcc.runtime.artifact import read_artifact

    return read_artifact(artifact, verify="sizes", device=torch.device("cpu"))


def _provenance(artifact: "Artifact") -> dict[str, Any]:
    """Where the artifact comes from. Its report is not among the files: no page can state its own digest."""
    manifest = artifact.manifest
    files = {name: entry.sha256 for name, entry in sorted(manifest.files.items()) if name != "report.html"}
    licence = {"licence": manifest.licence} if manifest.licence else {}
    return {"kvcc": manifest.kvcc_version, "torch": manifest.torch_version, **licence, "files": files}


def _lengths(context: int, even: int | None) -> list[int]:
    """Context lengths of the curve: powers of two, the middles between, the break-even point, the longest."""
    longest = min(context, LONGEST)
    steps = [n for k in range(longest.bit_length()) for n in (1 << k, 3 << k >> 1) if SHORTEST <= n < longest]
    return sorted({*steps, longest, *([even] if even and even <= longest else [])})


def _layer(index: int, plan: LayerPlan, layout: PageLayout | None) -> Facts:
    """One layer: bytes of a sealed token, and bits per element of each KV head; no numbers without pages."""
    facts: Facts = {"layer": index, "window": plan.window, "k_channels": plan.select}
    if layout is None:
        return {**facts, "stored": f"window of {plan.window:,} tokens, exact", "heads": []}
    parts = _head_bytes(layout)
    k, v = (sorted({_stored(getattr(h, side)) for h in plan.heads}) for side in ("k", "v"))
    return {
        **facts,
        "stored": f"K {' / '.join(k)}; V {' / '.join(v)}",
        "k_bytes": sum(p[0] for p in parts) / plan.page,
        "v_bytes": sum(p[1] for p in parts) / plan.page,
        "fp16_bytes": 2 * plan.model_elements,
        "heads": [
            {"k_bits": 8 * a / (plan.page * plan.k_dim), "v_bits": 8 * b / (plan.page * plan.v_dim)}
            for a, b in parts
        ],
    }


def _stored(side: Side) -> str:
    return " + ".join(f"{p.channels} × {p.bits} bit" for p in side.planes) or "nothing"


def _head_bytes(layout: PageLayout) -> list[tuple[int, int]]:
    """Bytes of K and of V of each KV head in a page; together they are the whole page."""
    order = [
        (h, s, x)
        for h in range(layout.kv_heads)
        for s, side in enumerate((layout.k, layout.v))
        for x in side[h]
    ]
    ends = [section.codes for _, _, section in order[1:]] + [layout.nbytes]
    sums = [[0, 0] for _ in range(layout.kv_heads)]
    for (head, side, section), end in zip(order, ends):
        sums[head][side] += end - section.codes
    return [(k, v) for k, v in sums]


class _Measured(BaseModel):
    """A verdict read back from plain data; `overall`, `holds` and `passed` are computed anew."""

    against: str
    recipe: str
    seed: int
    size: dict[str, Any]
    texts: tuple[TextAgreement, ...]
    retrieval: tuple[RetrievalScore, ...]
    greedy: GreedyAgreement | None
    bits_per_element: float
    uncompressed_bytes_per_token: NonNegativeInt
    gates: tuple[GateResult, ...]

    @model_validator(mode="after")
    def _has_numbers(self) -> "_Measured":
        for text in self.texts:
            if not text.buckets or min(b.tokens for b in text.buckets) < 1 or text.formula_bytes < 1:
                raise ValueError(f"text {text.kind!r} measures no tokens or no bytes")
            if any(max(abs(b.nll), abs(b.nll_reference)) > LARGEST_LOSS for b in text.buckets):
                raise ValueError(f"text {text.kind!r} has a loss beyond {LARGEST_LOSS:g} nats per token")
        return self

    @property
    def passed(self) -> bool:
        return all(g.holds for g in self.gates)


def _read_verdict(verdict: Mapping[str, Any]) -> _Measured:
    try:
        return _Measured.model_validate(dict(verdict))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        reason = first["msg"].removeprefix("Value error, ")
        raise ArtifactError(f"accuracy.json: {where}: {reason}; measure again: kvcc check --store") from error


def _summary(facts: Facts, measured: _Measured | None) -> list[tuple[str, str, str]]:
    """The figures at the top: value, what it is, remark."""
    longest = min(EXAMPLE, facts["model"]["context_length"])
    at = min(facts["cache"], key=lambda row: abs(row["tokens"] - longest))
    even = facts["smaller_from_tokens"]
    size = f"{charts.binary_size(at['bytes'])}, fp16 {charts.binary_size(at['fp16_bytes'])}"
    rows = [(f"{at['fp16_bytes'] / at['bytes']:.2f}×", f"smaller cache at {at['tokens']:,} tokens", size)]
    bits, fp16 = facts["bits_per_element"], facts["fp16_bytes_per_token"]
    if bits is not None:
        if measured and not any(layer["window"] for layer in facts["layers"]):
            # against the original model, whose K and V folds may have narrowed
            bits, fp16 = measured.bits_per_element, measured.uncompressed_bytes_per_token
        remark = f"{facts['bytes_per_token']:,.0f} bytes a token, fp16 {fp16:,}"
        rows.append((f"{bits:.2f}", "bits per element, metadata included", remark))
    if even is None:
        rows.append(("never", "smaller than an fp16 cache", ""))
    else:
        rows.append((f"{even:,}", "tokens to break even", "smaller than an fp16 cache from there on"))
    for text in measured.texts if measured else ():
        overall = text.overall
        remark = f"KL {overall.kl:.4f} nats, top-1 {100 * overall.top1:.1f} %"
        rows.append((f"{overall.perplexity_increase:+.2f} %", f"perplexity on {text.kind}", remark))
    if measured and measured.gates:
        held = sum(g.holds for g in measured.gates)
        rows.append(
            (f"{held} of {len(measured.gates)}", "gates hold", "✓ pass" if measured.passed else "✗ fail")
        )
    return rows


def _memory_charts(facts: Facts) -> dict[str, Markup]:
    layers = facts["layers"]
    found = {"cache": _cache_chart(facts)}
    if not any(layer["heads"] for layer in layers):
        return {name: Markup(svg) for name, svg in found.items()}
    names = [str(layer["layer"]) for layer in layers]
    found["layers"] = charts.bars(
        names,
        [(side, [layer.get(key) for layer in layers]) for side, key in (("K", "k_bytes"), ("V", "v_bytes"))],
        ghost=("fp16", [layer.get("fp16_bytes", 0) for layer in layers]),
        stacked=True,
        title="Bytes per token by layer, K and V, against fp16",
        x_label="layer",
        y_label="bytes per token",
    )
    rows = range(max(len(layer["heads"]) for layer in layers))
    bits = {
        side: [
            [layer["heads"][r][side] if r < len(layer["heads"]) else None for layer in layers] for r in rows
        ]
        for side in ("k_bits", "v_bits")
    }
    top = max(value for side in bits.values() for row in side for value in row if value is not None)
    for side, grid in bits.items():
        found[side] = charts.heat_map(
            [str(r) for r in rows],
            names,
            grid,
            title=f"Bits per element of {side[0].upper()} by layer and KV head",
            x_label="layer",
            y_label="KV head",
            top=top,
            show=lambda value: f"{value:.3g}",
        )
    return {name: Markup(svg) for name, svg in found.items()}


def _memory_rows(facts: Facts) -> dict[str, list[tuple[str, ...]]]:
    """The tables that stand in for the charts."""
    cache: list[tuple[str, ...]] = []
    layers: list[tuple[str, ...]] = []
    for row in facts["cache"]:
        n, ours, fp16 = row["tokens"], row["bytes"], row["fp16_bytes"]
        cache.append((f"{n:,}", f"{ours:,}", f"{fp16:,}", f"{fp16 / ours:.2f}"))
    heads: dict[str, list[tuple[str, ...]]] = {"k_bits": [], "v_bits": []}
    for layer in facts["layers"]:
        name = str(layer["layer"])
        if not layer["heads"]:
            layers.append((name, layer["stored"], "", "0", "0", ""))
            continue
        k, v, fp16 = (layer[key] for key in ("k_bytes", "v_bytes", "fp16_bytes"))
        layers.append((name, layer["stored"], layer["k_channels"], f"{k:,.1f}", f"{v:,.1f}", f"{fp16:,}"))
        for side, rows in heads.items():
            rows += [(name, str(i), f"{head[side]:.3f}") for i, head in enumerate(layer["heads"])]
    return {"cache": cache, "layers": layers, **heads}


def _cache_chart(facts: Facts) -> str:
    even = facts["smaller_from_tokens"]
    curves = [
        charts.Line(name, tuple((row["tokens"], row[key]) for row in facts["cache"]), key != "bytes")
        for name, key in (("this artifact", "bytes"), ("fp16", "fp16_bytes"))
    ]
    return charts.lines(
        curves,
        log=True,
        marks=[charts.Mark(even, f"break-even: {even:,} tokens")] if even else [],
        title="Cache bytes against context length, logarithmic axes",
        x_label="context length, tokens",
        y_label="cache of one sequence",
        show_x=charts.token_count,
        show_y=charts.binary_size,
    )


def _accuracy(measured: _Measured) -> Facts:
    """Charts and table rows of a verdict."""
    edges = sorted({(b.first, b.last) for text in measured.texts for b in text.buckets})
    kl = [
        (text.kind, [next((b.kl for b in text.buckets if (b.first, b.last) == edge), None) for edge in edges])
        for text in measured.texts
    ]
    lengths = sorted({r.tokens for r in measured.retrieval})
    return {
        "kl": Markup(
            charts.bars(
                [f"{first:,}\nto {last - 1:,}" for first, last in edges],
                kl,
                title="KL divergence by context length",
                x_label="context length, tokens",
                y_label="KL, nats per token",
            )
        ),
        "texts": [row for text in measured.texts for row in _text_rows(text)],
        "memory": [_memory_row(text) for text in measured.texts],
        "scores": [_score_row(r) for r in measured.retrieval],
        "retrieval": [(n, Markup(_retrieval_chart(measured, n))) for n in lengths],
    }


def _text_rows(text: TextAgreement) -> list[tuple[str, ...]]:
    labelled = [(b, f"{b.first:,} to {b.last - 1:,}") for b in text.buckets]
    return [_text_row(text.kind, label, bucket) for bucket, label in [*labelled, (text.overall, "all")]]


def _text_row(kind: str, label: str, bucket: Bucket) -> tuple[str, ...]:
    ours, theirs = (f"{math.exp(nll):,.3f}" for nll in (bucket.nll, bucket.nll_reference))
    change, top1 = f"{bucket.perplexity_increase:+.2f} %", f"{100 * bucket.top1:.2f} %"
    return kind, label, f"{bucket.kl:.5f}", top1, ours, theirs, change, f"{bucket.tokens:,}"


def _memory_row(text: TextAgreement) -> tuple[str, ...]:
    error = 100 * (text.cache_bytes / text.formula_bytes - 1)
    return (
        text.kind,
        f"{text.cache_tokens:,}",
        f"{text.cache_bytes:,}",
        f"{text.formula_bytes:,}",
        f"{error:+.2f} %",
    )


def _score_row(score: RetrievalScore) -> tuple[str, ...]:
    question = "visible" if score.question_visible else "hidden"
    shares = f"{score.score:.0f} %", f"{score.reference:.0f} %"
    return score.kind.replace("_", " "), f"{score.tokens:,}", question, *shares, str(score.tasks)


def _retrieval_chart(measured: _Measured, tokens: int) -> str:
    scores = [r for r in measured.retrieval if r.tokens == tokens]
    kinds = [r.kind.replace("_", "\n") + ("\nvisible" if r.question_visible else "\nhidden") for r in scores]
    return charts.bars(
        kinds,
        [("compressed", [r.score for r in scores])],
        ghost=("uncompressed", [r.reference for r in scores]),
        title=f"Retrieval at {tokens:,} tokens",
        x_label="task, and the question when the context was compressed",
        y_label="answers found, %",
    )


def _plain(value: Any) -> Any:
    """`value` as lists, dicts and scalars that YAML can write, its text cleaned."""
    if isinstance(value, Mapping):
        return {charts.clean(str(k)): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value if value is None or isinstance(value, bool | int | float) else charts.clean(str(value))


def _printable(value: Any) -> Any:
    """What the template writes for an expression: text from data is cleaned, markup is ours and stays."""
    return value if isinstance(value, Markup) or not isinstance(value, str) else charts.clean(value)


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("kvcc", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("report.html.j2")
