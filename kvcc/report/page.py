"""A report as one HTML page that loads nothing; the same facts give the same text.

What comes from an artifact is untrusted text: the template escapes it, and unprintable characters are dropped.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

import jinja2
import yaml
from markupsafe import Markup, escape

from kvcc import charts
from kvcc.fronts import Front, Point
from kvcc.report.figures import Facts
from kvcc.report.sections import Section, report_sections
from kvcc.report.verdict import Measured, read_verdict
from kvcc.runtime.calibrated import Calibrated

EXAMPLE = 8192  # tokens, of the figure at the top, where the model's context is that long


def report_html(facts: Facts) -> str:
    """One self-contained HTML page of what `report_facts` gathered; the same facts give the same text.

    Their provenance maps labels to values, and under "files" file names to digests.
    """
    recipe, measured = facts["recipe"], _measured(facts)
    return _template().render(
        facts=facts,
        model=facts["model"],
        summary=_summary(facts, measured),
        sections=sections_of(facts),
        recipe_name=str(recipe.get("name") or "(unnamed)"),
        recipe_summary=str(recipe.get("summary") or ""),
        files=facts["provenance"].get("files", {}),
        recipe_yaml=escape(yaml.safe_dump(_plain(recipe), sort_keys=False, allow_unicode=True)),
        calibration=_calibration(facts),
        measured=measured,
        style=Markup(charts.STYLE),
    )


def sections_of(facts: Facts) -> list[Section]:
    """The report's sections, from nothing but its facts."""
    front = facts["front"]
    return report_sections(
        facts,
        _measured(facts),
        _calibration(facts),
        None if front is None else Front(front["command"], tuple(Point(**p) for p in front["points"])),
    )


def _measured(facts: Facts) -> Measured | None:
    return None if facts["accuracy"] is None else read_verdict(facts["accuracy"])


def _calibration(facts: Facts) -> Calibrated | None:
    return None if facts["calibration"] is None else Calibrated.model_validate(facts["calibration"])


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
        loader=jinja2.PackageLoader("kvcc.report", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("report.html.j2")
