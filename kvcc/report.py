"""The report: what an artifact stores and how accurate it is, as one HTML page that loads nothing.

`report_facts` gathers the numbers, `report_sections` says what is shown of them and `report_html` draws it; all are
pure. What comes from an artifact is untrusted text: the template escapes it, and unprintable characters are dropped.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import yaml
from markupsafe import Markup, escape

from kvcc import charts
from kvcc.fronts import Front, Point, read_front
from kvcc.kernels.layout import PageLayout, Side
from kvcc.report_figures import Facts, Figure
from kvcc.report_sections import Section, report_sections
from kvcc.report_verdict import Measured, read_verdict
from kvcc.runtime.calibrated import Calibrated
from kvcc.runtime.identity import ModelIdentity
from kvcc.runtime.plan import HeadPlan, LayerPlan, Plan

if TYPE_CHECKING:
    from kvcc.checking import Verdict
    from kvcc.runtime.artifact import Artifact

__all__ = ["Extras", "render_report", "report_facts", "report_figures", "report_html", "stored_facts"]

SHORTEST, LONGEST = 32, 1 << 20  # tokens, of the curve of cache bytes
EXAMPLE = 8192  # tokens, of the figure at the top, where the model's context is that long


@dataclass(frozen=True)
class Extras:
    """What a report can show beside what an artifact holds.

    `profile` is a profile's folder, in place of what the artifact recorded of its own; `front` a file of
    `kvcc compare -o` or `kvcc plan -o`.
    """

    profile: Path | None = None
    front: Path | None = None


def render_report(artifact: Path, verdict: "Verdict | None", extras: Extras | None = None) -> str:
    """The report of an artifact folder, as HTML.

    Without `verdict` it shows the accuracy stored in the artifact, if any. Raises ArtifactError, and for `extras`
    ProfileError and DataError.
    """
    found = _read(artifact)
    measured = verdict.as_dict() if verdict is not None else found.accuracy
    calibration, front = _extras(found, extras or Extras())
    manifest = found.manifest
    return report_html(
        found.plan,
        manifest.model,
        manifest.recipe,
        _provenance(found),
        measured,
        calibration=calibration,
        front=front,
    )


def stored_facts(artifact: Path, extras: Extras | None = None) -> Facts:
    """`report_facts` of an artifact folder, with the accuracy stored in it. Raises what `render_report` does."""
    found = _read(artifact)
    manifest = found.manifest
    calibration, front = _extras(found, extras or Extras())
    return report_facts(
        found.plan,
        manifest.model,
        manifest.recipe,
        _provenance(found),
        found.accuracy,
        calibration=calibration,
        front=front,
    )


def report_figures(artifact: Path, extras: Extras | None = None) -> list[Figure]:
    """The figures of an artifact's report, in its order. Raises what `render_report` does."""
    facts = stored_facts(artifact, extras)
    return [figure for section in _sections(facts) for figure in section.figures]


def report_html(
    plan: Plan,
    identity: ModelIdentity,
    recipe: Mapping[str, Any],
    provenance: Mapping[str, Any],
    verdict: Mapping[str, Any] | None,
    *,
    calibration: Calibrated | None = None,
    front: Front | None = None,
) -> str:
    """One self-contained HTML page; the same input gives the same text.

    `provenance` maps labels to values, and under "files" file names to digests. `verdict` is
    `Verdict.as_dict()`, or the same from JSON. Raises ArtifactError when the verdict is not one.
    """
    facts = report_facts(plan, identity, recipe, provenance, verdict, calibration=calibration, front=front)
    measured = None if verdict is None else read_verdict(verdict)
    return _template().render(
        facts=facts,
        model=facts["model"],
        summary=_summary(facts, measured),
        sections=_sections(facts),
        recipe_name=str(recipe.get("name") or "(unnamed)"),
        recipe_summary=str(recipe.get("summary") or ""),
        files=provenance.get("files", {}),
        recipe_yaml=escape(yaml.safe_dump(_plain(recipe), sort_keys=False, allow_unicode=True)),
        calibration=calibration,
        measured=measured,
        style=Markup(charts.STYLE),
    )


def report_facts(
    plan: Plan,
    identity: ModelIdentity,
    recipe: Mapping[str, Any],
    provenance: Mapping[str, Any],
    verdict: Mapping[str, Any] | None,
    *,
    calibration: Calibrated | None = None,
    front: Front | None = None,
) -> Facts:
    """Every number of the report as plain data, for JSON. Raises ArtifactError when `verdict` is not one."""
    if verdict is not None:
        read_verdict(verdict)
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
        "calibration": None if calibration is None else calibration.model_dump(),
        "accuracy": None if verdict is None else dict(verdict),
        "front": None if front is None else asdict(front),
    }


def _sections(facts: Facts) -> list[Section]:
    """The report's sections, from nothing but its facts."""
    accuracy, calibration, front = facts["accuracy"], facts["calibration"], facts["front"]
    measured = None if accuracy is None else read_verdict(accuracy)
    return report_sections(
        facts,
        measured,
        None if calibration is None else Calibrated.model_validate(calibration),
        None if front is None else Front(front["command"], tuple(Point(**p) for p in front["points"])),
    )


def _extras(artifact: "Artifact", extras: Extras) -> tuple[Calibrated | None, Front | None]:
    """What is known of the calibration, and a front with this artifact in it."""
    manifest, plan = artifact.manifest, artifact.plan
    calibration, front = manifest.calibration, None
    if extras.profile is not None:
        from kvcc.key_energy import calibrated
        from kvcc.profile import Profile

        profile = Profile.load(extras.profile)
        profile.require_model(manifest.model)
        calibration = calibrated(profile, plan, artifact.tables)
    if extras.front is not None:
        front = read_front(extras.front, manifest.recipe, plan.bits_per_element())
    return calibration, front


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
    stored = _sides(plan.heads)
    if plan.salient:
        stored = f"{plan.salient} of {plan.page} tokens: {_sides(plan.salient_heads)}; others: {stored}"
    return {
        **facts,
        "stored": stored,
        "k_bytes": sum(p[0] for p in parts) / plan.page,
        "v_bytes": sum(p[1] for p in parts) / plan.page,
        "fp16_bytes": 2 * plan.model_elements,
        "heads": [
            {"k_bits": 8 * a / (plan.page * plan.k_dim), "v_bits": 8 * b / (plan.page * plan.v_dim)}
            for a, b in parts
        ],
    }


def _sides(heads: tuple[HeadPlan, ...]) -> str:
    k, v = (sorted({_stored(getattr(h, side)) for h in heads}) for side in ("k", "v"))
    return f"K {' / '.join(k)}; V {' / '.join(v)}"


def _stored(side: Side) -> str:
    parts = [f"{p.channels} × {p.bits} bit" for p in side.planes]
    if side.page_means:
        parts.append(f"{side.page_means} page means")
    return " + ".join(parts) or "nothing"


def _head_bytes(layout: PageLayout) -> list[tuple[int, int]]:
    """Bytes of K and of V of each KV head in a page; together they are the whole page."""
    order = sorted(place for part in layout.parts for place in _places(part))
    ends = [start for start, _, _ in order[1:]] + [layout.nbytes]
    sums = [[0, 0] for _ in range(layout.kv_heads)]
    for (start, head, side), end in zip(order, ends):
        sums[head][side] += end - start
    return [(k, v) for k, v in sums]


def _places(part: PageLayout) -> Iterator[tuple[int, int, int]]:
    """Where planes, token scales and page means begin: byte, KV head, and 0 for K or 1 for V."""
    for head, (start, means) in enumerate(part.k_means):
        sides = (part.k[head], part.k_token_scales[head]), (part.v[head], part.v_token_scales[head])
        for side, (sections, scales) in enumerate(sides):
            yield from ((section.codes, head, side) for section in sections)
            if scales is not None:
                yield scales, head, side
        if means:
            yield start, head, 0


def _summary(facts: Facts, measured: Measured | None) -> list[tuple[str, str, str]]:
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
