"""The figures as a page's block and as plots."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.figures import Figures, Goal, Spread, number
from benchmarks.peers.records import Cell
from kvcc import charts

BEGIN, END = "<!-- peers: begin -->", "<!-- peers: end -->"
FP16_BYTES = 23_040
PLOTTED = 6  # lines or bars that stay readable


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its first column left, the others right."""
    lines = [headings, ["---"] + ["---:"] * (len(headings) - 1), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def block(
    everyone: Sequence[Figures],
    found: Sequence[Goal],
    contexts: Sequence[int],
    batches: Sequence[int],
    about: dict[str, Any],
) -> str:
    """What stands between the page's marks. `about`: machine, versions, rounds, steps, seconds, threads, budget."""
    parts = [heading(about)]
    for batch in batches:
        if any(cell.batch == batch for f in everyone for cell in f.decode):
            parts += [
                f"**Decode, batch {batch}**: ms per step, median (quartiles).",
                decode_table(everyone, contexts, batch),
            ]
    parts += [
        "**Slope** is the extra ms per 1,000 tokens cached in every sequence: the cache's own cost, free of the "
        "weights'.\n\n![ms per step over the context](peers-decode.svg)\n\n![slopes](peers-slope.svg)",
        "**Prefill and memory**: of one sequence; bytes allocated for the cache, and the most bytes in memory, at the "
        "longest context; sequences that fit "
        f"{charts.binary_size(about['budget'])} of cache at {max(contexts):,} tokens.",
        memory_table(everyone),
        "**Ratios.**",
        goal_table(found),
    ]
    reasons = missing(everyone)
    if reasons:
        parts.append("Not measured:\n\n" + "\n".join(f"- {reason}" for reason in reasons))
    return "\n\n".join(parts)


def heading(about: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in sorted(about["versions"].items()))
    return (
        f"{about['machine']}, {about['threads']} threads, {about['date']}. SmolLM2-135M-Instruct; {versions}.\n\n"
        f"Contenders took turns on each cell, {about['rounds']} rounds; a run timed up to {about['steps']} steps in "
        f"{about['seconds']:g} s, at least three (kvcc {about['kvcc_steps']} at batch 1, so that a page is sealed in "
        f"each). A cell of which a run took more than {about['once']:g} s was run once. transformers, kvpress and kvcc "
        "decode from a cache of random keys and values, the other engines from a real prompt's. OpenVINO and llama.cpp "
        "compute with the GGUF file's 4-bit weights, transformers, kvpress and vLLM with those widened to their type. "
        "QuantizedCache quantises everything again each 128 tokens, which these steps do not meet. It and kvpress "
        "decode at 4k alone; of OpenVINO at most 16,384 tokens in all were asked (f32 8,192), of vLLM 4,096, of others "
        "65,536: those cells are empty."
    )


def decode_table(everyone: Sequence[Figures], contexts: Sequence[int], batch: int) -> str:
    headings = ["", *(charts.token_count(context) for context in contexts), "slope"]
    rows = []
    for f in everyone:
        cells = [Cell("decode", context, batch) for context in contexts]
        values = [timing(f.decode.get(cell), f.missing.get(cell)) for cell in cells]
        rows.append([f.name, *values, number(f.slopes[batch]) if batch in f.slopes else ""])
    return table(headings, rows)


def timing(value: Spread | None, why: str | None) -> str:
    if value is None:
        return "n/a" if why else ""
    return f"{number(value.median)} ({number(value.lower)}–{number(value.upper)})"


def memory_table(everyone: Sequence[Figures]) -> str:
    lengths = sorted({length for f in everyone for length in f.prefill})
    headings = ["", *(f"prefill {charts.token_count(n)}, tokens/s" for n in lengths)]
    headings += ["bytes/token", "of fp16", "peak RSS", "largest batch"]
    rows = []
    for f in everyone:
        per_token = f.bytes_per_token
        rows.append(
            [
                f.name,
                *(rate(f.prefill.get(n), f.missing.get(Cell("prefill", n))) for n in lengths),
                "" if per_token is None else f"{per_token:,.0f}",
                "" if per_token is None else f"{per_token / FP16_BYTES:.2f}",
                charts.binary_size(f.peak_rss) if f.peak_rss else "",
                ", ".join(f"{batch:,}" for batch in f.largest_batch.values())
                or ("n/a" if any(cell.do == "largest_batch" for cell in f.missing) else ""),
            ]
        )
    return table(headings, rows)


def rate(value: Spread | None, why: str | None) -> str:
    if value is None:
        return "n/a" if why else ""
    return f"{value.median:,.0f} ({min(value.rounds):,.0f}–{max(value.rounds):,.0f})"


def goal_table(found: Sequence[Goal]) -> str:
    rows = []
    for goal in found:
        bound = f"{'at most' if goal.at_most else 'at least'} {goal.bound:g}"
        kept = {True: "yes", False: "no", None: "not measured"}[goal.kept]
        rows.append([goal.what, "" if goal.ratio is None else f"{goal.ratio:.2f}", bound, kept, goal.of])
    return table(["ratio", "measured", "wanted", "kept", "of"], rows)


def missing(everyone: Sequence[Figures]) -> list[str]:
    """A line for each contender and reason, with the cells that share it."""
    lines = []
    for f in everyone:
        shared: dict[str, list[str]] = {}
        for cell, why in f.missing.items():
            shared.setdefault(plain(why), []).append(str(cell))
        lines += [f"{f.name}: {'; '.join(cells)}: {why}" for why, cells in shared.items()]
    return lines


def plain(reason: str, most: int = 160) -> str:
    """A reason as a page may carry it: no path of this machine, no markup, not too long."""
    text = re.sub(r"(?<![\w.])/[\w.+-]+(/[\w.+-]+)+", "(path)", charts.clean(reason))
    text = text.replace("<", "‹").replace(">", "›").replace("`", "'")
    return text if len(text) <= most else text[: most - 1] + "…"


def notable(everyone: Sequence[Figures]) -> list[Figures]:
    """At most PLOTTED contenders: of each family the one with the lowest slope in the smallest batch it has."""
    families: dict[str, list[Figures]] = {}
    for f in everyone:
        if f.slopes:
            family = f.name if "DynamicCache" in f.name or "kivi-4, f" in f.name else f.name.split()[0]
            families.setdefault(family, []).append(f)
    chosen = [min(family, key=lambda f: f.slopes[min(f.slopes)]) for family in families.values()]
    order = {f.name: i for i, f in enumerate(everyone)}
    chosen.sort(key=lambda f: f.slopes[min(f.slopes)])
    return sorted(chosen[:PLOTTED], key=lambda f: order[f.name])


def decode_plot(everyone: Sequence[Figures], batches: Sequence[int]) -> str:
    """A standalone SVG: milliseconds of a step over the context, a chart for each batch size."""
    drawn = notable(everyone)
    made = []
    for batch in batches:
        lines = []
        for f in drawn:
            points = sorted((c.context, value.median) for c, value in f.decode.items() if c.batch == batch)
            if points:
                lines.append(charts.Line(f.name, tuple(points)))
        if lines:
            made.append(
                charts.lines(
                    lines,
                    title=f"ms per decode step, batch {batch}",
                    x_label=f"tokens cached per sequence, batch {batch}",
                    y_label="ms per step",
                    log="xy",
                    show_x=charts.token_count,
                )
            )
    return charts.beside(made, title="Decode against peers")


def slope_plot(everyone: Sequence[Figures], batches: Sequence[int]) -> str:
    """A standalone SVG: slopes as bars, per sequence so that batches compare."""
    drawn = notable(everyone)
    series = [(f.name, [f.slopes[b] / b if b in f.slopes else None for b in batches]) for f in drawn]
    chart = charts.bars(
        [f"batch {batch}" for batch in batches],
        series,
        title="Slope against peers",
        x_label="sequences in the batch",
        y_label="ms per 1,000 cached tokens of one sequence",
    )
    return charts.beside([chart], title="Slope against peers")


def write(page: Path, text: str, plots: dict[str, str]) -> None:
    """Put `text` between the marks of `page`, and the plots beside it. Raises ValueError when it has no marks."""
    whole = page.read_text(encoding="utf-8")
    before, begin, rest = whole.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page} has no block between {BEGIN} and {END}")
    page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")
    for name, svg in plots.items():
        (page.parent / name).write_text(svg, encoding="utf-8")
