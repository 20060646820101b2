"""A verdict for people and for machines: rich tables, JUnit XML, Markdown."""

from xml.etree import ElementTree

from rich.table import Table

from kvcc.checking import Verdict
from kvcc.gates import GateResult


def _text_rows(verdict: Verdict) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for text in verdict.texts:
        for bucket, label in [
            *((b, f"{b.first} to {b.last - 1}") for b in text.buckets),
            (text.overall, "all"),
        ]:
            rows.append(
                (
                    text.kind,
                    label,
                    f"{bucket.kl:.5f}",
                    f"{bucket.top1:.4f}",
                    f"{bucket.perplexity_increase:+.2f} %",
                    f"{bucket.tokens:,}",
                )
            )
    return rows


def _memory_rows(verdict: Verdict) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [
        ("bits per element", f"{verdict.bits_per_element:.3f}"),
        ("bytes per sealed token", f"{verdict.bytes_per_token:,.0f}"),
        ("the same in fp16", f"{verdict.uncompressed_bytes_per_token:,}"),
    ]
    for text in verdict.texts:
        error = 100 * (text.cache_bytes / text.formula_bytes - 1)
        rows.append(
            (
                f"cache of {text.cache_tokens:,} tokens, allocated",
                f"{text.cache_bytes:,} bytes ({error:+.2f} % of the plan's)",
            )
        )
        break
    return rows


def _other_rows(verdict: Verdict) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for r in verdict.retrieval:
        name = f"{r.kind}, {r.tokens} tokens, question {'visible' if r.question_visible else 'hidden'}"
        rows.append((f"{name}, answered", f"{r.score:.0f} %", f"{r.reference:.0f} %", f"{r.tasks}"))
        if r.preference is not None and r.preference_reference is not None:
            both = f"{r.preference:.0f} %", f"{r.preference_reference:.0f} %"
            rows.append((f"{name}, likeliest candidate", *both, f"{r.tasks}"))
    if verdict.greedy:
        g = verdict.greedy
        rows.append(
            (f"greedy text, {g.tokens} tokens, same token", f"{100 * g.same:.0f} %", "100 %", f"{g.prompts}")
        )
    return rows


_TEXT = ("text", "context", "KL", "top-1", "perplexity", "tokens")
_OTHER = ("task", "compressed", "uncompressed", "tasks")
_GATE = ("gate", "limit", "measured", "verdict")


def _gate_row(gate: GateResult) -> tuple[str, ...]:
    measured = "not measured" if gate.measured is None else f"{gate.measured:.5g}"
    return gate.name, f"{gate.sign} {gate.limit:g}", measured, "pass" if gate.holds else "FAIL"


def tables(verdict: Verdict) -> list[Table]:
    """Tables for a terminal."""
    title = f"{verdict.artifact} ({verdict.recipe}) against {verdict.against}"
    found = [_table(title, _TEXT, _text_rows(verdict)), _table("memory", ("", ""), _memory_rows(verdict))]
    if others := _other_rows(verdict):
        found.append(_table("tasks", _OTHER, others))
    if verdict.gates:
        found.append(_table("gates", _GATE, [_gate_row(g) for g in verdict.gates]))
    return found


def _table(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> Table:
    table = Table(title=title, title_justify="left", show_header=any(columns))
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    return table


def markdown(verdict: Verdict) -> str:
    """A summary for a CI job page."""
    status = "all gates hold" if verdict.passed else "a gate failed"
    parts = [
        f"## kvcc check: {verdict.recipe} against {verdict.against}: {status if verdict.gates else 'no gates'}\n"
    ]
    if verdict.gates:
        parts.append(_markdown_table(_GATE, [_gate_row(g) for g in verdict.gates]))
    parts.append(_markdown_table(_TEXT, _text_rows(verdict)))
    parts.append(_markdown_table(("memory", ""), _memory_rows(verdict)))
    if others := _other_rows(verdict):
        parts.append(_markdown_table(_OTHER, others))
    return "\n".join(parts) + "\n"


def _markdown_table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [columns, tuple("---" for _ in columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def junit(verdict: Verdict) -> str:
    """JUnit XML: one test case a gate."""
    suite = ElementTree.Element(
        "testsuite",
        name=f"kvcc check {verdict.recipe}",
        tests=str(len(verdict.gates)),
        failures=str(sum(not g.holds for g in verdict.gates)),
    )
    for gate in verdict.gates:
        case = ElementTree.SubElement(suite, "testcase", classname="kvcc.check", name=gate.name)
        if not gate.holds:
            name, limit, measured, _ = _gate_row(gate)
            ElementTree.SubElement(case, "failure", message=f"{name} is {measured}, the gate is {limit}")
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"
