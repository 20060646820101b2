"""Charts as inline SVG: pure functions from numbers to markup, without script, font, id or network.

Every chart is `WIDTH` units wide and scales with its container. Colours are classes, which `STYLE` defines
for light and dark; nothing is told by colour alone: each mark carries its values, which appear below the plot
while the pointer is on it. Text may come from a file that nobody vouches for: it is stripped of control
characters and escaped here. The palette follows Okabe and Ito, "Color Universal Design" (2008), with lighter
variants on dark ground.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from typing import Literal

WIDTH = 420
_LEFT, _PLOT_WIDTH, _PLOT_HEIGHT = 62, 334, 190
_FONT = 12  # units; about 10 px on a phone
_CHARACTER = 6.4  # units, mean advance of a sans-serif of that size
_COLOURS = 6

_READOUT = 16  # units below each plot, for the values of the mark under the pointer

Theme = Literal["auto", "light", "dark"]
Log = Literal["", "y", "xy"]  # which axes are logarithmic
Ticks = Callable[[float, float], list[float]]  # of the least and the largest value
_LIGHT = {
    "ink": "#1b1f24", "soft": "#57606a", "line": "#d0d7de", "on": "#ffffff", "ghost": "#8c959f",
    "ground": "#ffffff", "c0": "#0072b2", "c1": "#d55e00", "c2": "#009e73", "c3": "#b0508c",
    "c4": "#7a6a00", "c5": "#4b5bd6",
}  # fmt: skip
_DARK = {
    "ink": "#e6edf3", "soft": "#9aa4af", "line": "#363e48", "on": "#0d1117", "ghost": "#8b949e",
    "ground": "#0d1117", "c0": "#56b4e9", "c1": "#e69f00", "c2": "#2fc39a", "c3": "#d98cb8",
    "c4": "#f0e442", "c5": "#a0acff",
}  # fmt: skip
_RULES = """
.chart text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif;
  fill: var(--soft); stroke: none; }
.chart .name { fill: var(--ink); } .chart .on { fill: var(--on); }
.chart .grid { stroke: var(--line); stroke-width: 1; } .chart .axis { stroke: var(--soft); stroke-width: 1; }
.chart .ghost { fill: var(--line); stroke: none; }
.chart .level { stroke: var(--ghost); stroke-width: 1.5; }
.chart .mark { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 4 3; }
.chart .path { fill: none; stroke-width: 2; stroke-linejoin: round; } .chart .dash { stroke-dasharray: 6 3; }
.chart .fq { fill: var(--ghost); } .chart .sq { stroke: var(--ghost); }
.chart .empty { fill: none; stroke: var(--ghost); stroke-width: 1; stroke-dasharray: 2 2; }
.chart .ring { fill: none; stroke: var(--ink); stroke-width: 2; }
""" + "".join(
    f".chart .f{i} {{ fill: var(--c{i}); }} .chart .s{i} {{ stroke: var(--c{i}); }}\n"
    for i in range(_COLOURS)
)
_HOVER = """
.chart .m .tip { display: none; fill: var(--ink); } .chart .m { pointer-events: all; }
.chart .m:hover .tip { display: inline; } .chart .m:hover > :first-child { stroke: var(--ink); stroke-width: 2; }
.chart circle { stroke: transparent; stroke-width: 10; }
"""


def _declared(colours: dict[str, str]) -> str:
    return " ".join(f"--{name}: {colour};" for name, colour in colours.items())


STYLE = f"""
.chart {{ {_declared(_LIGHT)} }}
@media screen and (prefers-color-scheme: dark) {{ .chart {{ {_declared(_DARK)} }} }}
{_RULES}{_HOVER}"""

Show = Callable[[float], str]


@dataclass(frozen=True)
class Line:
    """One curve, or with a single point one dot; points (x, y) in order of x. `quiet` ones are grey.

    Where names stand beside points, those that are not `labelled` appear with the pointer only.
    """

    name: str
    points: tuple[tuple[float, float], ...]
    quiet: bool = False
    labelled: bool = True


@dataclass(frozen=True)
class Mark:
    """A vertical line at `x` with a label."""

    x: float
    label: str


def style(theme: Theme) -> str:
    """The style sheet of a file of charts: `auto` follows the reader's choice of light or dark.

    A fixed theme names its colours outright, because many programs that draw SVG know no variables.
    """
    if theme == "auto":
        ground = f".ground {{ fill: {_LIGHT['ground']}; }}"
        dark = f".ground {{ fill: {_DARK['ground']}; }}"
        return f"{STYLE}{ground} @media (prefers-color-scheme: dark) {{ {dark} }}"
    colours = _LIGHT if theme == "light" else _DARK
    rules = f"{_RULES}.ground {{ fill: var(--ground); }}"
    return re.sub(r"var\(--(\w+)\)", lambda found: colours[found[1]], rules)


def plain(value: float) -> str:
    """A number as people write it: 1,250 and 0.25."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def binary_size(nbytes: float) -> str:
    """Bytes for people: 640 B, 1.5 KiB, 25.3 MiB."""
    unit = "B"
    for larger in ("KiB", "MiB", "GiB"):
        if abs(nbytes) < 1024:
            break
        nbytes, unit = nbytes / 1024, larger
    whole = nbytes == round(nbytes) or abs(nbytes) >= 100
    return f"{nbytes:,.0f} {unit}" if whole else f"{nbytes:,.1f} {unit}"


def token_count(count: float) -> str:
    """A context length: 640, 8k (of 1,024)."""
    return f"{count / 1024:g}k" if count >= 1024 and count % 512 == 0 else f"{count:,.0f}"


def clean(text: str) -> str:
    """`text` with a space for each control, bidirectional or otherwise unprintable character."""
    return "".join(c if c.isprintable() else " " for c in text)


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """At most about `count` round steps (1, 2 or 5 times a power of ten) that enclose [low, high]."""
    span = (high - low) or 1.0
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(power * m for m in (1, 2, 5, 10) if m == 10 or power * m * count >= span * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, max(last, first + 1) + 1)]


def power_ticks(low: float, high: float, count: int = 5, base: float = 2.0) -> list[float]:
    """Powers of `base` that enclose [low, high], both positive: about `count` at most, with equal ratios."""
    first, last = _down(math.log(low, base)), _up(math.log(high, base))
    step = max(1, math.ceil((last - first) / count))
    steps = max(1, math.ceil((last - first) / step))
    return [base ** (first + i * step) for i in range(steps + 1)]


def decimal_ticks(low: float, high: float, count: int = 8) -> list[float]:
    """1, 2 and 5 times powers of ten that enclose [low, high], both positive; powers of ten alone where it is wide."""
    powers = range(_down(math.log10(low)), _up(math.log10(high)) + 2)
    steps = [float(f"{m}e{power}") for power in powers for m in (1, 2, 5)]
    first = max(i for i, tick in enumerate(steps) if tick <= low * (1 + 1e-9))
    last = next(i for i, tick in enumerate(steps) if i > first and tick >= high * (1 - 1e-9))
    return steps[first : last + 1] if last - first < count else power_ticks(low, high, count, 10.0)


def _down(power: float) -> int:
    return math.floor(power + 1e-9)


def _up(power: float) -> int:
    return math.ceil(power - 1e-9)


_TICKS: dict[Log, tuple[Ticks, Ticks]] = {
    "": (partial(nice_ticks, count=6), nice_ticks),
    "y": (partial(nice_ticks, count=6), decimal_ticks),
    "xy": (partial(power_ticks, count=8), power_ticks),
}


def bars(
    categories: Sequence[str],
    series: Sequence[tuple[str, Sequence[float | None]]],
    *,
    title: str,
    x_label: str,
    y_label: str,
    ghost: tuple[str, Sequence[float]] | None = None,
    stacked: bool = False,
    show: Show = plain,
) -> str:
    """Upright bars: for each category one bar per series, side by side or stacked.

    `series` and `ghost` are (name, a value per category); None or a value that is not finite is left out. The
    ghost is a shade behind the bars and a line at its level, for what they compare with. A newline in a
    category breaks its label.
    """
    columns = [[_finite(values[i]) for _, values in series] for i in range(len(categories))]
    if not any(v is not None for column in columns for v in column):
        return _nothing(title)
    heights = [sum(v or 0 for v in c) for c in columns] if stacked else [v or 0 for c in columns for v in c]
    reach = [*heights, 0.0, *(ghost[1] if ghost else ())]
    axis = _Axis(nice_ticks(min(reach), max(reach)))
    keys = [(name, f"f{i % _COLOURS}") for i, (name, _) in enumerate(series)]
    legend, top = _legend([*keys, (ghost[0], "ghost")] if ghost else keys)
    box = _Box(_LEFT, top, _PLOT_WIDTH, _PLOT_HEIGHT)
    slot = box.width / len(categories)
    body = []
    for i, (category, column) in enumerate(zip(categories, columns)):
        where = category.replace("\n", " ")
        left, width = box.left + (i + 0.1) * slot, 0.8 * slot
        if ghost:
            hover = f"{_short(where, 24)}, {_short(ghost[0], 20)}: {show(ghost[1][i])}"
            body.append(_rect(_between(box, axis, left, width, (0, ghost[1][i])), 'class="ghost"', hover))
        base = 0.0
        for j, value in enumerate(column):
            if value is None:
                continue
            part = width / (1 if stacked else len(series))
            bar = _between(box, axis, left + (0 if stacked else j * part), part, (base, base + value))
            hover = f"{_short(where, 24)}, {_short(series[j][0], 20)}: {show(value)}"
            body.append(_rect(bar, f'class="f{j % _COLOURS}"', hover))
            base += value if stacked else 0
        if ghost and ghost[1][i]:  # over the bars, for where they are taller
            level = box.bottom - axis.at(ghost[1][i]) * box.height
            body.append(_line(left, level, (left + width, level), "level"))
    labels, below = _category_labels(box, categories)
    parts = [*legend, *_y_axis(box, axis, y_label, show), *body, *labels, _x_title(box, below, x_label)]
    return _svg(title, box.bottom + below + 22, parts)


def lines(
    series: Sequence[Line],
    *,
    title: str,
    x_label: str,
    y_label: str,
    log: Log = "",
    marks: Sequence[Mark] = (),
    named: bool = False,
    origin: bool = True,
    show_x: Show = plain,
    show_y: Show = plain,
) -> str:
    """Curves over linear axes that include 0; every point is a dot. Without `origin` the horizontal one need not.

    `log`: "y" for a logarithmic vertical axis, of decimal steps, "xy" for two, of powers of two.

    A point that is not finite, or on logarithmic axes not positive, is left out and breaks its curve. A mark
    beyond the points is left out. With `named` each curve's name stands at its last point, not in a legend.
    """
    runs = [_runs(line.points, "x" in log, "y" in log) for line in series]
    points = [p for parts in runs for part in parts for p in part]
    if not points:
        return _nothing(title)
    x_values = [p[0] for p in points] + ([0.0] if origin and "x" not in log else [])
    y_values = [p[1] for p in points] + ([] if log else [0.0])
    x_ticks, y_ticks = _TICKS[log]
    x_axis = _Axis(x_ticks(min(x_values), max(x_values)), "x" in log)
    y_axis = _Axis(y_ticks(min(y_values), max(y_values)), "y" in log)
    hues = ["q" if line.quiet else str(i % _COLOURS) for i, line in enumerate(series)]
    keys = [(line.name, f"f{hue}") for line, hue in zip(series, hues)]
    legend, top = ([], 32.0) if named else _legend(keys)
    box = _Box(_LEFT, top, _PLOT_WIDTH, _PLOT_HEIGHT)
    body = [_mark(box, x_axis, m) for m in marks if min(x_values) <= m.x <= max(x_values)]
    names: list[tuple[float, float, str]] = []
    for i, (line, parts) in enumerate(zip(series, runs)):
        for part in parts:
            placed = [box.place(x_axis.at(x), y_axis.at(y)) for x, y in part]
            dashed = not line.quiet and i // _COLOURS % 2 == 1  # colours that come round again
            body += _curve(
                hues[i],
                dashed,
                placed,
                [f"{_short(line.name, 34)}, {show_x(x)}: {show_y(y)}" for x, y in part],
            )
            if named and line.labelled and part is parts[-1]:
                names.append((*placed[-1], line.name))
    frame = [*_y_axis(box, y_axis, y_label, show_y), *_x_ticks(box, x_axis, show_x)]
    return _svg(
        title, box.bottom + 40, [*legend, *frame, *body, *_point_names(names), _x_title(box, 18, x_label)]
    )


def heat_map(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    *,
    title: str,
    x_label: str,
    y_label: str,
    top: float | None = None,
    show: Show = plain,
    notes: Sequence[Sequence[str]] | None = None,
) -> str:
    """values[row][column] as shades between 0 and `top` (or the largest value); None is a dashed, empty cell.

    Values are not negative. Cells with room for it carry their number. `notes`, one a cell, follow the value
    while the pointer is on it.
    """
    known = [v for row in values for v in map(_finite, row) if v is not None]
    if not rows or not columns or not known:
        return _nothing(title)
    peak = (max(known) if top is None else top) or 1.0
    width, height = _PLOT_WIDTH / len(columns), max(7.0, min(24.0, 160 / len(rows)))
    box = _Box(_LEFT, 32, _PLOT_WIDTH, height * len(rows))
    body = _ramp(box, peak, show)
    for r, row in enumerate(values):
        for c, value in enumerate(map(_finite, row)):
            cell = _Box(box.left + c * width, box.top + r * height, width, height)
            hover = f"{x_label} {columns[c]}, {y_label} {rows[r]}: "
            shade = 0.0 if value is None else min(1.0, value / peak)
            note = f" {notes[r][c]}" if notes and notes[r][c] else ""
            body += _cell(cell, None if value is None else show(value), shade, hover, note)
    labels, below = _category_labels(box, columns)
    for r in range(0, len(rows), max(1, math.ceil((_FONT + 2) / height))):
        body.append(_text(box.left - 6, box.top + (r + 0.5) * height + 4, _short(rows[r], 4), "end"))
    parts = [*body, _turned(y_label, box), *labels, _x_title(box, below, x_label)]
    return _svg(title, box.bottom + below + 22, parts)


def beside(
    charts: Sequence[str], *, title: str, columns: int = 2, gap: float = 24, theme: Theme = "auto"
) -> str:
    """A standalone SVG file with charts in a grid, on a ground of its own so that it reads on any page."""
    if theme != "auto":  # for print and for programs without a pointer
        charts = [re.sub(r'<text class="tip".*?</text>', "", chart) for chart in charts]
    heights = [float(chart.partition('viewBox="')[2].partition('"')[0].split()[3]) for chart in charts]
    columns = max(1, min(columns, len(charts)))
    tall = max(heights, default=0.0)
    size = (gap + columns * (WIDTH + gap), gap + math.ceil(len(charts) / columns) * (tall + gap))
    parts = []
    for i, (chart, height) in enumerate(zip(charts, heights)):
        x, y = gap + i % columns * (WIDTH + gap), gap + i // columns * (tall + gap)
        parts.append(f'<svg x="{_n(x)}" y="{_n(y)}" width="{WIDTH}" height="{_n(height)}">{chart}</svg>')
    inside = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_n(size[0])} {_n(size[1])}" '
        f'width="{_n(size[0])}" height="{_n(size[1])}" role="img" '
        f'aria-label="{_safe(title)}">\n<style>{style(theme)}</style>\n'
        f'<rect class="ground" width="100%" height="100%" rx="8"/>\n{inside}\n</svg>\n'
    )


@dataclass(frozen=True)
class _Axis:
    ticks: list[float]
    log: bool = False

    def at(self, value: float) -> float:
        """Where `value` lies between the first tick (0) and the last (1)."""
        low, high = self.ticks[0], self.ticks[-1]
        if self.log:
            return math.log(value / low) / math.log(high / low)
        return (value - low) / (high - low)


@dataclass(frozen=True)
class _Box:
    """A rectangle, such as the plot area, in units from the upper left corner of the chart."""

    left: float
    top: float
    width: float
    height: float

    @property
    def bottom(self) -> float:
        return self.top + self.height

    def place(self, across: float, up: float) -> tuple[float, float]:
        """The point at these fractions of width and height, from the lower left corner."""
        return self.left + across * self.width, self.bottom - up * self.height


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _runs(points: Sequence[tuple[float, float]], *log: bool) -> list[list[tuple[float, float]]]:
    """The points in unbroken runs, without those that cannot be drawn on axes of which `log` are logarithmic."""
    runs: list[list[tuple[float, float]]] = [[]]
    for point in points:
        if all(math.isfinite(v) and (v > 0 or not logarithmic) for v, logarithmic in zip(point, log)):
            runs[-1].append(point)
        else:
            runs.append([])
    return [run for run in runs if run]


def _n(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _safe(text: str) -> str:
    return escape(clean(text), quote=True)


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _text(x: float, y: float, text: str, anchor: str = "start", kind: str = "") -> str:
    named = f' class="{kind}"' if kind else ""
    return f'<text x="{_n(x)}" y="{_n(y)}" text-anchor="{anchor}"{named}>{_safe(text)}</text>'


def _line(x: float, y: float, to: tuple[float, float], kind: str) -> str:
    return f'<line class="{kind}" x1="{_n(x)}" y1="{_n(y)}" x2="{_n(to[0])}" y2="{_n(to[1])}"/>'


def _rect(box: _Box, attributes: str, hover: str = "") -> str:
    """A rectangle, with `hover` a mark that tells its values."""
    size = f'x="{_n(box.left)}" y="{_n(box.top)}" width="{_n(box.width)}" height="{_n(box.height)}"'
    return _told(f"<rect {attributes} {size}/>", hover)


def _told(shape: str, hover: str) -> str:
    """A shape and the line below the plot (100 % of the chart's height) that appears with the pointer on it."""
    if not hover:
        return shape
    line = (
        f'<text class="tip" x="50%" y="100%" dy="-4" text-anchor="middle">{_safe(_short(hover, 68))}</text>'
    )
    return f'<g class="m">{shape}{line}</g>'


def _svg(title: str, height: float, parts: Sequence[str]) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {_n(height + _READOUT)}" width="100%" role="img" '
        f'aria-label="{_safe(title)}">{"".join(parts)}</svg>'
    )


def _nothing(title: str) -> str:
    return _svg(title, 60, [_text(WIDTH / 2, 34, "nothing to show", "middle")])


def _between(box: _Box, axis: _Axis, left: float, width: float, span: tuple[float, float]) -> _Box:
    """The bar that reaches from one value of `span` to the other."""
    low, high = sorted(axis.at(v) * box.height for v in span)
    return _Box(left, box.bottom - high, width, high - low)


def _legend(keys: Sequence[tuple[str, str]]) -> tuple[list[str], float]:
    """Swatches with names, in as many rows as they need, and the height where the plot may begin."""
    parts, x, y = [], float(_LEFT), 12.0
    for name, kind in keys:
        short = _short(name, 30)
        width = 17 + len(short) * _CHARACTER + 14
        if x > _LEFT and x + width > WIDTH:
            x, y = float(_LEFT), y + 18
        parts += [
            _rect(_Box(x, y - 9, 10, 10), f'class="{kind}"'),
            _text(x + 15, y, short, kind="name"),
        ]
        x += width
    return parts, y + 34


def _y_axis(box: _Box, axis: _Axis, label: str, show: Show) -> list[str]:
    parts = [_text(2, box.top - 12, label)]
    for i, tick in enumerate(axis.ticks):
        y = box.bottom - axis.at(tick) * box.height
        kind = "axis" if i == 0 or tick == 0 else "grid"
        parts += [
            _line(box.left, y, (box.left + box.width, y), kind),
            _text(box.left - 6, y + 4, show(tick), "end"),
        ]
    return parts


def _x_ticks(box: _Box, axis: _Axis, show: Show) -> list[str]:
    parts = []
    for tick in axis.ticks:
        x = box.left + axis.at(tick) * box.width
        parts.append(_line(x, box.bottom, (x, box.bottom + 4), "axis"))
        parts.append(_text(x, box.bottom + 17, show(tick), "middle"))
    return parts


def _x_title(box: _Box, below: float, label: str) -> str:
    return _text(box.left + box.width / 2, box.bottom + below + 16, label, "middle")


def _category_labels(box: _Box, categories: Sequence[str]) -> tuple[list[str], float]:
    """Labels under the slots, thinned until they fit, and the height they take."""
    slot = box.width / len(categories)
    split = [[_short(part, 16) for part in category.split("\n")] for category in categories]
    need = max(len(part) for parts in split for part in parts) * _CHARACTER + 4
    every = next(10**k * m for k in range(9) for m in (1, 2, 5) if 10**k * m * slot >= need)
    texts = []
    for i in range(0, len(categories), every):
        for row, part in enumerate(split[i]):
            texts.append(_text(box.left + (i + 0.5) * slot, box.bottom + 15 + 14 * row, part, "middle"))
    return texts, 3 + 14.0 * max(map(len, split))


def _mark(box: _Box, axis: _Axis, mark: Mark) -> str:
    x = box.left + axis.at(mark.x) * box.width
    if x + 6 + len(mark.label) * _CHARACTER > WIDTH:
        label = _text(x - 5, box.top + 12, mark.label, "end", "name")
    else:
        label = _text(x + 5, box.top + 12, mark.label, "start", "name")
    return _line(x, box.top, (x, box.bottom), "mark") + label


def _curve(
    colour: str, dashed: bool, placed: Sequence[tuple[float, float]], hovers: Sequence[str]
) -> list[str]:
    """One run of a curve, `placed` in units."""
    dash = " dash" if dashed else ""
    parts = []
    if len(placed) > 1:
        path = " ".join(f"{_n(x)},{_n(y)}" for x, y in placed)
        parts.append(f'<polyline class="path s{colour}{dash}" points="{path}"/>')
    radius = 5 if len(placed) == 1 else 3
    for (x, y), hover in zip(placed, hovers):
        dot = f'<circle class="f{colour}" cx="{_n(x)}" cy="{_n(y)}" r="{radius}"/>'
        parts.append(_told(dot, hover))
    return parts


def _point_names(names: Sequence[tuple[float, float, str]]) -> list[str]:
    """Names beside points, each moved down until it does not cover one placed before."""
    parts: list[str] = []
    taken: list[tuple[float, float, float]] = []
    for x, y, name in sorted(names, key=lambda n: (n[1], n[0])):
        short = _short(name, 30)
        width = len(short) * _CHARACTER
        left = x + 9 if x + 9 + width <= WIDTH else x - 9 - width
        low = y + 4
        while any(abs(low - b) < _FONT and left < r and a < left + width for a, r, b in taken):
            low += 2
        taken.append((left, left + width, low))
        parts.append(_text(left, low, short, kind="name"))
    return parts


def _ramp(box: _Box, peak: float, show: Show) -> list[str]:
    """The legend of a heat map: five shades from 0 to `peak`."""
    x = box.left + 12
    parts = [_text(box.left, 16, "0")]
    for i in range(5):
        parts.append(_rect(_Box(x + 18 * i, 5, 18, 14), f'class="f0" {_shade(i / 4)}', show(peak * i / 4)))
    return [*parts, _text(x + 96, 16, show(peak))]


def _shade(share: float) -> str:
    return f'fill-opacity="{_n(0.06 + 0.94 * share)}"'


def _cell(box: _Box, label: str | None, share: float, hover: str, note: str = "") -> list[str]:
    """A cell of a heat map, shaded by `share` of the largest value; without a label it has no value."""
    gap = 1.0 if min(box.width, box.height) >= 8 else 0.0
    inner = _Box(box.left + gap / 2, box.top + gap / 2, box.width - gap, box.height - gap)
    if label is None:
        return [_rect(inner, 'class="empty"', f"{hover}none{note}")]
    parts = [_rect(inner, f'class="f0" {_shade(share)}', f"{hover}{label}{note}")]
    if box.height >= 15 and box.width >= len(label) * _CHARACTER + 6:
        x, y = box.place(0.5, 0.5)
        parts.append(_text(x, y + 4, label, "middle", "on" if share > 0.5 else "name"))
    return parts


def _turned(label: str, box: _Box) -> str:
    """The label of the vertical axis, upright when the rows are too few for it."""
    if len(label) * _CHARACTER > box.height + 20:
        return _text(2, 16, label)
    turn = f"translate(16 {_n(box.top + box.height / 2)}) rotate(-90)"
    return f'<text transform="{turn}" text-anchor="middle">{_safe(label)}</text>'
