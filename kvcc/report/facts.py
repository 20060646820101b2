"""Every number of a report as plain data: bytes by context length, bits by layer and head, what was measured."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from kvcc.fronts import Front
from kvcc.kernels.layout import PageLayout, Side
from kvcc.report.figures import Facts
from kvcc.report.verdict import read_verdict
from kvcc.runtime.calibrated import Calibrated
from kvcc.runtime.identity import ModelIdentity
from kvcc.runtime.plan import HeadPlan, LayerPlan, Plan

SHORTEST, LONGEST = 32, 1 << 20  # tokens, of the curve of cache bytes


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
    """Every number of the report as plain data, for JSON and the page.

    `verdict` is `Verdict.as_dict()`, or the same from JSON. Raises ArtifactError when it is not one.
    """
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
