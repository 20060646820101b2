"""From records to figures: medians and quartiles over all rounds, slopes, ratios."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, median, quantiles

from benchmarks.peers.records import Cell, Record
from kvcc.bench import slope


@dataclass(frozen=True)
class Spread:
    """Of all timed steps of all rounds."""

    median: float
    lower: float  # quartiles
    upper: float
    mean: float
    rounds: tuple[float, ...]  # medians


@dataclass(frozen=True)
class Figures:
    """All that was measured of one contender; what is missing has its reason in `missing`."""

    name: str
    decode: dict[Cell, Spread]  # milliseconds of a step
    slopes: dict[
        int, float
    ]  # by batch: extra milliseconds of a step per 1,000 tokens cached in every sequence
    bytes_per_token: float | None  # allocated, at the longest context of the smallest batch
    prefill: dict[int, Spread]  # tokens per second, by length
    peak_rss: int | None  # bytes in memory, weights included, at the longest context of the smallest batch
    largest_batch: dict[int, int]  # by context
    missing: dict[Cell, str]


def figures(name: str, records: Sequence[Record]) -> Figures:
    """What `records` say of the contender `name`."""
    mine = [r for r in records if r.contender == name]
    good = [r for r in mine if not r.error]
    steps = {cell: [r.answer["ms"] for r in runs] for cell, runs in by_cell(good, "decode").items()}
    rates = {
        c: [[r.answer["tokens_per_second"]] for r in runs] for c, runs in by_cell(good, "prefill").items()
    }
    lengths = {c: fmean(r.answer["length"] for r in runs) for c, runs in by_cell(good, "decode").items()}
    decode = {cell: spread(rounds) for cell, rounds in steps.items()}
    slopes = {}
    for batch in sorted({cell.batch for cell in decode}):
        points = [(lengths[cell], decode[cell].median) for cell in decode if cell.batch == batch]
        line = slope(points)
        if line is not None:
            slopes[batch] = line.per_thousand
    shown = max((c for c in decode), key=lambda c: (-c.batch, c.context), default=None)
    runs = by_cell(good, "decode")[shown] if shown else []
    return Figures(
        name,
        decode,
        slopes,
        median(r.answer["bytes_per_token"] for r in runs) if runs else None,
        {cell.context: spread(rounds) for cell, rounds in rates.items()},
        max((r.answer["peak_rss"] for r in runs), default=None),
        {c.context: runs[0].answer["batch"] for c, runs in by_cell(good, "largest_batch").items()},
        {r.cell: r.error for r in mine if r.error},
    )


def by_cell(records: Sequence[Record], do: str) -> dict[Cell, list[Record]]:
    found: dict[Cell, list[Record]] = {}
    for record in records:
        if record.cell.do == do:
            found.setdefault(record.cell, []).append(record)
    return found


def spread(rounds: Sequence[Sequence[float]]) -> Spread:
    """Over the values of all rounds together; rounds are not empty."""
    values = [value for part in rounds for value in part]
    if len(values) > 1:
        lower, middle, upper = quantiles(values, method="inclusive")
    else:
        lower = middle = upper = values[0]
    return Spread(middle, lower, upper, fmean(values), tuple(median(part) for part in rounds))


@dataclass(frozen=True)
class Goal:
    """A ratio of two figures and the bound it should keep: at most (or at least) `bound`."""

    what: str
    ratio: float | None  # None where a figure is missing
    bound: float
    at_most: bool
    of: str  # the two figures

    @property
    def kept(self) -> bool | None:
        if self.ratio is None:
            return None
        return self.ratio <= self.bound if self.at_most else self.ratio >= self.bound


Value = tuple[float, str] | None  # a figure, and whose


def goals(everyone: Sequence[Figures]) -> list[Goal]:
    """The ratios that decide whether a compressed cache is worth using, from whatever contenders took part."""

    def step(word: str, batch: int, context: int) -> Value:
        return best(everyone, word, lambda f: median_of(f.decode.get(Cell("decode", context, batch))))

    def slope_of(word: str, batch: int) -> Value:
        """Of those that ran at every length: a line through the shortest two says little."""
        whole = [f for f in everyone if not any(c.do == "decode" and c.batch == batch for c in f.missing)]
        return best(whole, word, lambda f: f.slopes.get(batch))

    kivi, two = "kvcc kivi-4", ("kvcc kivi-2", "kvcc think-40-kivi-2")
    fp32, bf16 = "transformers DynamicCache fp32", "transformers DynamicCache bf16"
    found = []

    def goal(what: str, ours: Value, theirs: Value, bound: float, at_most: bool = True) -> None:
        """at_most: ours over theirs, else theirs over ours."""
        if ours is None or theirs is None:
            found.append(Goal(what, None, bound, at_most, "not measured"))
            return
        above, below = (ours, theirs) if at_most else (theirs, ours)
        ratio = above[0] / below[0] if below[0] else None
        found.append(Goal(what, ratio, bound, at_most, f"{show(above)} / {show(below)}"))

    for batch in (1, 4):
        mine = slope_of(f"{kivi}, int8", batch)  # as the 2-bit recipes, whose weights are int8
        goal(f"slope of kivi-4 to transformers bf16, batch {batch}", mine, slope_of(bf16, batch), 0.25)
        goal(f"slope of kivi-4 to OpenVINO's best, batch {batch}", mine, slope_of("OpenVINO", batch), 0.5)
        goal(f"slope of kivi-4 to llama.cpp's best, batch {batch}", mine, slope_of("llama.cpp", batch), 1.0)
        for recipe in two:
            goal(f"slope of {recipe[5:]} to kivi-4, batch {batch}", slope_of(recipe, batch), mine, 1.0)
    many = step(kivi, 16, 4096)
    goal("batch 16 at 4k, transformers bf16 to kivi-4", many, step(bf16, 16, 4096), 2.2, at_most=False)
    goal("batch 16 at 4k, transformers fp32 to kivi-4", many, step(fp32, 16, 4096), 6.0, at_most=False)
    one = step(kivi, 1, 1024)
    goal("batch 1 at 1k, kivi-4 to transformers' best", one, step("DynamicCache", 1, 1024), 1.0)
    goal("batch 1 at 1k, kivi-4 to OpenVINO's best", one, step("OpenVINO", 1, 1024), 1.5)
    quantised = step("QuantizedCache", 1, 4096)
    goal(
        "batch 1 at 4k, QuantizedCache's best to kivi-4", step(kivi, 1, 4096), quantised, 10.0, at_most=False
    )

    def rate(word: str) -> Value:
        return best(everyone, word, lambda f: median_of(f.prefill.get(4096)), highest=True)

    def fitting(word: str) -> Value:
        return best(everyone, word, lambda f: f.largest_batch.get(8192), highest=True)

    goal("prefill tokens/s at 4k, kivi-4 to transformers bf16", rate(bf16), rate(kivi), 0.9, at_most=False)
    for recipe in two:
        what = f"largest batch at 8k, {recipe[5:]} to 16-bit DynamicCache"
        goal(what, fitting(bf16), fitting(recipe), 5.0, at_most=False)
    return found


def best(
    everyone: Sequence[Figures], word: str, get: Callable[[Figures], float | None], highest: bool = False
) -> Value:
    """The lowest (or highest) figure of the contenders whose name holds `word` and that have it."""
    values = [(value, f.name) for f in everyone if word in f.name and (value := get(f)) is not None]
    return (max if highest else min)(values, default=None)


def median_of(value: Spread | None) -> float | None:
    return None if value is None else value.median


def show(value: tuple[float, str]) -> str:
    return f"{number(value[0])} ({value[1]})"


def number(value: float) -> str:
    """Three figures or so."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
