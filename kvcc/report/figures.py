"""The figures of a report: what each shows, and the same numbers as a table."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from kvcc import charts
from kvcc.fronts import Front, Point, drawn
from kvcc.measure import Bucket, RetrievalScore, TextAgreement
from kvcc.report.verdict import Measured
from kvcc.runtime.calibrated import Calibrated, KeyEnergy

Facts = dict[str, Any]
Rows = list[tuple[str, ...]]
DEPTHS = 5  # bands of depth in which retrieval is shown


@dataclass(frozen=True)
class Table:
    """Rows of text; the first `text` columns are words, the others numbers."""

    caption: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    text: int = 1


@dataclass(frozen=True)
class Figure:
    """A chart and its table. `name` is that of its file, where it is written to one."""

    name: str
    caption: str
    remark: str
    svg: Markup
    table: Table


def memory_figures(facts: Facts) -> list[Figure]:
    """Cache bytes by context length; bytes by layer and bits by layer and head where layers have pages."""
    figures = [_cache(facts)]
    if any(layer["heads"] for layer in facts["layers"]):
        top = max(max(h.values()) for layer in facts["layers"] for h in layer["heads"])
        figures += [_layers(facts), _bits(facts, "k_bits", top), _bits(facts, "v_bits", top)]
    return figures


def _cache(facts: Facts) -> Figure:
    even = facts["smaller_from_tokens"]
    curves = [
        charts.Line(name, tuple((row["tokens"], row[key]) for row in facts["cache"]), key != "bytes")
        for name, key in (("this artifact", "bytes"), ("fp16", "fp16_bytes"))
    ]
    svg = charts.lines(
        curves,
        log="xy",
        marks=[charts.Mark(even, f"break-even: {even:,} tokens")] if even else [],
        title="Cache bytes against context length, logarithmic axes",
        x_label="context length, tokens",
        y_label="cache of one sequence",
        show_x=charts.token_count,
        show_y=charts.binary_size,
    )
    rows: Rows = []
    for row in facts["cache"]:
        n, ours, fp16 = row["tokens"], row["bytes"], row["fp16_bytes"]
        rows.append((f"{n:,}", f"{ours:,}", f"{fp16:,}", f"{fp16 / ours:.2f}"))
    columns = ("tokens", "bytes", "fp16 bytes", "times smaller")
    return Figure(
        "cache",
        "Cache bytes against context length",
        "one sequence, both axes logarithmic",
        Markup(svg),
        Table("Cache bytes by context length", columns, rows),
    )


def _layers(facts: Facts) -> Figure:
    layers = facts["layers"]
    svg = charts.bars(
        [str(layer["layer"]) for layer in layers],
        [(side, [layer.get(key) for layer in layers]) for side, key in (("K", "k_bytes"), ("V", "v_bytes"))],
        ghost=("fp16", [layer.get("fp16_bytes", 0) for layer in layers]),
        stacked=True,
        title="Bytes per token by layer, K and V, against fp16",
        x_label="layer",
        y_label="bytes per token",
    )
    rows: Rows = []
    for layer in layers:
        name = str(layer["layer"])
        if layer["heads"]:
            k, v, fp16 = (layer[key] for key in ("k_bytes", "v_bytes", "fp16_bytes"))
            rows.append((name, layer["stored"], layer["k_channels"], f"{k:,.1f}", f"{v:,.1f}", f"{fp16:,}"))
        else:
            rows.append((name, layer["stored"], "", "0", "0", ""))
    columns = ("layer", "stored per token and KV head", "K channels", "K bytes", "V bytes", "fp16 bytes")
    table = Table("Layers", columns, rows, 3)
    return Figure("layers", "Bytes per token by layer", "in sealed pages", Markup(svg), table)


def _bits(facts: Facts, side: str, top: float) -> Figure:
    layers, letter = facts["layers"], side[0].upper()
    rows = range(max(len(layer["heads"]) for layer in layers))
    svg = charts.heat_map(
        [str(r) for r in rows],
        [str(layer["layer"]) for layer in layers],
        [[layer["heads"][r][side] if r < len(layer["heads"]) else None for layer in layers] for r in rows],
        title=f"Bits per element of {letter} by layer and KV head",
        x_label="layer",
        y_label="KV head",
        top=top,
        show=lambda value: f"{value:.3g}",
    )
    cells = [
        (str(layer["layer"]), str(i), f"{head[side]:.3f}")
        for layer in layers
        for i, head in enumerate(layer["heads"])
    ]
    return Figure(
        f"{letter.lower()}-bits",
        f"Bits per element of {letter}",
        "by layer and KV head, of the model's channels",
        Markup(svg),
        Table(f"Bits per element of {letter}", ("layer", "KV head", "bits"), cells),
    )


def channel_figures(found: Calibrated | None) -> list[Figure]:
    """K's energy by rank, and the share that pages lose by layer and head; none where pages say nothing of K."""
    keys = found.keys if found else ()
    if not any(keys):
        return []
    return [_energy(keys), _lost(keys)]


def _energy(keys: Sequence[KeyEnergy | None]) -> Figure:
    """Mean over layers of each layer's own shares, so that loud layers do not hide the others."""
    known = [layer.ranks for layer in keys if layer]
    count = max(map(len, known))
    totals = [sum(energy for energy, _ in ranks) or 1.0 for ranks in known]
    kept, dropped = [0.0] * count, [0.0] * count
    for ranks, total in zip(known, totals):
        for i, (energy, share) in enumerate(ranks):
            kept[i] += 100 * energy * share / total / len(known)
            dropped[i] += 100 * energy * (1 - share) / total / len(known)
    names = [str(i + 1) for i in range(count)]
    svg = charts.bars(
        names,
        [("stored", kept), ("left out", dropped)],
        stacked=True,
        title="Energy of K channels by rank, and what pages store of it",
        x_label=f"channels by falling energy, in {count} steps",
        y_label="share of a layer's energy, %",
    )
    rows = [(name, f"{k + d:.2f} %", f"{k:.2f} %") for name, k, d in zip(names, kept, dropped)]
    return Figure(
        "channel-energy",
        "Energy of K channels, and what was kept",
        "mean over layers and KV heads; energy is what a channel adds to the variance of attention logits",
        Markup(svg),
        Table("Energy of K channels by rank", ("rank", "energy", "of this stored"), rows),
    )


def _lost(keys: Sequence[KeyEnergy | None]) -> Figure:
    rows = range(max(len(layer.kept) for layer in keys if layer))
    grid = [
        [100 * (1 - layer.kept[r]) if layer and r < len(layer.kept) else None for layer in keys] for r in rows
    ]
    svg = charts.heat_map(
        [str(r) for r in rows],
        [str(i) for i in range(len(keys))],
        grid,
        title="Share of the logits' variance that channels left out of pages had, by layer and KV head, percent",
        x_label="layer",
        y_label="KV head",
        show=lambda value: f"{value:.2g} %",
    )
    cells = [
        (str(i), str(r), f"{100 * (1 - share):.3f} %")
        for i, layer in enumerate(keys)
        if layer
        for r, share in enumerate(layer.kept)
    ]
    return Figure(
        "lost-variance",
        "Variance of logits that was lost",
        "with the channels that pages leave out, by layer and KV head, before quantisation",
        Markup(svg),
        Table("Lost variance of logits", ("layer", "KV head", "lost"), cells),
    )


def accuracy_figures(measured: Measured) -> list[Figure]:
    """KL by position, behind each prefill that was measured."""
    texts = (*measured.texts, *measured.other_contexts)
    if not texts:
        return []
    several = bool(measured.other_contexts)
    curves = [
        charts.Line(
            f"{text.kind}, {text.buckets[0].first:,} prefilled" if several else text.kind,
            tuple(((b.first + b.last - 1) / 2, b.kl) for b in text.buckets),
        )
        for text in sorted(texts, key=lambda t: t.buckets[0].first)
    ]
    svg = charts.lines(
        curves,
        origin=False,
        title="KL divergence by position, one curve a text and length of prefill",
        x_label="position, tokens",
        y_label="KL, nats per token",
    )
    columns = (
        "text",
        "positions",
        "KL, nats",
        "same top-1",
        "perplexity",
        "uncompressed",
        "change",
        "tokens",
    )
    table = Table("Agreement by position", columns, [row for text in texts for row in _text_rows(text)], 2)
    caption = "KL divergence by position" + (" and length of prefill" if several else "")
    remark = "teacher-forced, lower is better; a dot is the mean of a quarter of the positions"
    return [Figure("kl", caption, remark, Markup(svg), table)]


def _text_rows(text: TextAgreement) -> Rows:
    labelled = [(b, f"{b.first:,} to {b.last - 1:,}") for b in text.buckets]
    return [
        _text_row(text.kind, label, bucket)
        for bucket, label in [*labelled, (text.overall, f"all from {text.overall.first:,}")]
    ]


def _text_row(kind: str, label: str, bucket: Bucket) -> tuple[str, ...]:
    ours, theirs = (f"{math.exp(nll):,.3f}" for nll in (bucket.nll, bucket.nll_reference))
    change, top1 = f"{bucket.perplexity_increase:+.2f} %", f"{100 * bucket.top1:.2f} %"
    return kind, label, f"{bucket.kl:.5f}", top1, ours, theirs, change, f"{bucket.tokens:,}"


def allocated(measured: Measured) -> Table:
    """Allocated cache bytes beside the plan's."""
    rows: Rows = []
    for text in measured.texts:
        error = 100 * (text.cache_bytes / text.formula_bytes - 1)
        sizes = f"{text.cache_bytes:,}", f"{text.formula_bytes:,}", f"{error:+.2f} %"
        rows.append((text.kind, f"{text.cache_tokens:,}", *sizes))
    return Table("Allocated cache against the plan", ("text", "tokens", "bytes", "planned", "apart"), rows)


def layer_figures(measured: Measured) -> list[Figure]:
    """KL with one layer compressed at a time."""
    if not measured.layers:
        return []
    names = [str(each.layer) for each in measured.layers]
    svg = charts.bars(
        names,
        [("KL", [each.kl for each in measured.layers])],
        title="KL divergence with only one layer compressed, by layer",
        x_label="the layer that is compressed",
        y_label="KL, nats per token",
    )
    rows = [(name, f"{each.kl:.6f}") for name, each in zip(names, measured.layers)]
    return [
        Figure(
            "layer-errors",
            "Error by layer",
            "KL when this layer alone is compressed and all others are exact",
            Markup(svg),
            Table("KL by layer", ("layer", "KL, nats"), rows),
        )
    ]


def retrieval_figures(measured: Measured) -> list[Figure]:
    """Answers by depth and length, question hidden and visible, and by task at each length."""
    figures = []
    for visible in (False, True):
        scores = [s for s in measured.retrieval if s.question_visible == visible and s.answers]
        if scores:
            figures.append(_by_depth(scores, visible))
    for tokens in sorted({r.tokens for r in measured.retrieval}):
        figures.append(_by_task([r for r in measured.retrieval if r.tokens == tokens], tokens))
    return figures


def _by_depth(scores: Sequence[RetrievalScore], visible: bool) -> Figure:
    question = "visible" if visible else "hidden"
    lengths = sorted({s.tokens for s in scores})
    bands = [f"{100 * i // DEPTHS}-{100 * (i + 1) // DEPTHS} %" for i in range(DEPTHS)]
    cells = [
        [
            [
                a
                for s in scores
                if s.tokens == n
                for a in s.answers
                if min(DEPTHS - 1, int(a.depth * DEPTHS)) == i
            ]
            for n in lengths
        ]
        for i in range(DEPTHS)
    ]
    ours = [[sum(a.found for a in cell) for cell in row] for row in cells]
    theirs = [[sum(a.found_uncompressed for a in cell) for cell in row] for row in cells]
    svg = charts.heat_map(
        [str(100 * i // DEPTHS) for i in range(DEPTHS)],
        [f"{n:,}" for n in lengths],
        [[100 * o / len(c) if c else None for o, c in zip(*both)] for both in zip(ours, cells)],
        title=f"Answers found by depth and length, question {question} to the compressor, percent",
        x_label="context length, tokens",
        y_label="depth, % from",
        top=100.0,
        show=lambda value: f"{value:.0f} %",
        notes=[
            [f"({o} of {len(c)}; uncompressed {t})" if c else "" for o, t, c in zip(*three)]
            for three in zip(ours, theirs, cells)
        ],
    )
    rows: Rows = []
    for i, band in enumerate(bands):
        for n, o, t, cell in zip(lengths, ours[i], theirs[i], cells[i]):
            if cell:
                shares = f"{100 * o / len(cell):.0f} %", f"{100 * t / len(cell):.0f} %"
                rows.append((band, f"{n:,}", *shares, str(len(cell))))
    columns = ("depth", "tokens", "compressed", "uncompressed", "tasks")
    return Figure(
        f"retrieval-depth-{question}",
        f"Retrieval by depth and length, question {question}",
        "answers found over all kinds of tasks; the question was "
        + ("in the prompt" if visible else "asked after the context had been compressed"),
        Markup(svg),
        Table(f"Answers found by depth, question {question}", columns, rows),
    )


def _by_task(scores: Sequence[RetrievalScore], tokens: int) -> Figure:
    kinds = [r.kind.replace("_", "\n") + ("\nvisible" if r.question_visible else "\nhidden") for r in scores]
    svg = charts.bars(
        kinds,
        [("compressed", [r.score for r in scores])],
        ghost=("uncompressed", [r.reference for r in scores]),
        title=f"Retrieval at {tokens:,} tokens, by task",
        x_label="task, and the question when the context was compressed",
        y_label="answers found, %",
    )
    answered, likeliest = ("compressed", "uncompressed"), ("likeliest, compressed", "uncompressed")
    columns = ("task", "tokens", "question", *answered, *likeliest, "tasks")
    return Figure(
        f"retrieval-{tokens}",
        f"Retrieval at {tokens:,} tokens",
        "by task, higher is better: free answers; the table also has how often the answer was the likeliest candidate",
        Markup(svg),
        Table(f"Answers found at {tokens:,} tokens", columns, [_score_row(r) for r in scores]),
    )


def _score_row(score: RetrievalScore) -> tuple[str, ...]:
    question = "visible" if score.question_visible else "hidden"
    shares = score.score, score.reference, score.preference, score.preference_reference
    cells = ("" if share is None else f"{share:.0f} %" for share in shares)
    return score.kind.replace("_", " "), f"{score.tokens:,}", question, *cells, str(score.tasks)


def front_figures(front: Front | None, mine: Point | None) -> list[Figure]:
    """Bits against KL of what was measured together, with this artifact."""
    if front is None:
        return []
    points = [*front.points, *([mine] if mine and not front.has_mine else [])]
    rows = [
        (
            f"{p.name} (this artifact)" if p.mine else p.name,
            f"{p.bits:.2f}",
            f"{p.kl:.5f}",
            "yes" if p.on_front else "",
        )
        for p in points
    ]
    remark = f"what {front.command} measured; left and low is better, both axes logarithmic"
    if mine and not front.has_mine:
        remark += "; this artifact as kvcc check measured it, on texts of its own"
    return [
        Figure(
            "front",
            "Bits against divergence",
            remark,
            Markup(drawn(front, mine)),
            Table("Bits and KL", ("recipe", "bits", "KL, nats", "on the front"), rows),
        )
    ]
