"""Bits against divergence of several recipes, from what `kvcc compare` or `kvcc plan` wrote."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, PositiveFloat, ValidationError

from kvcc import charts
from kvcc.errors import DataError, RecipeError
from kvcc.recipe import parse_recipe
from kvcc.runtime.strict_json import first_fault

Divergence = Annotated[float, Field(ge=0, allow_inf_nan=False)]
MAX_BYTES = 64 << 20
TITLE = "KL to the uncompressed model against bits per element"
FEW = 8  # points of which all have their names beside them; of more, only those on the front


@dataclass(frozen=True)
class Point:
    """One recipe: bits per element with metadata, and mean KL to the uncompressed model in nats a token."""

    name: str
    bits: float
    kl: float
    on_front: bool = False  # no other is smaller in one of both without being larger in the other
    mine: bool = False  # the artifact that a report is about


@dataclass(frozen=True)
class Front:
    """What one command measured on the same texts. `command`: kvcc compare or kvcc plan."""

    command: str
    points: tuple[Point, ...]

    @property
    def has_mine(self) -> bool:
        return any(p.mine for p in self.points)


class _Compared(BaseModel):
    name: str
    bits_per_element: PositiveFloat
    mean_kl: Divergence


class _Planned(BaseModel):
    recipe: str
    bits: PositiveFloat
    kl: Divergence


class _Comparison(BaseModel):
    artifacts: tuple[_Compared, ...] = Field(min_length=1)


class _Search(BaseModel):
    measured: tuple[_Planned, ...] = Field(min_length=1)


def read_front(path: Path, recipe: Mapping[str, Any], bits: float) -> Front:
    """The points in a file of `kvcc compare -o` or `kvcc plan -o`; those with this recipe and bits are `mine`.

    `recipe` is as in an artifact's manifest. Raises DataError for a file that neither command wrote.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DataError(f"{path}: larger than {MAX_BYTES >> 20} MiB; give what kvcc compare -o wrote")
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON; give what kvcc compare -o or kvcc plan -o wrote") from error
    if not isinstance(data, dict) or not {"artifacts", "measured"} & set(data):
        raise DataError(f"{path}: neither of kvcc compare nor of kvcc plan; give what their -o wrote")
    try:
        return _compared(data, recipe, bits) if "artifacts" in data else _planned(data, recipe, bits)
    except ValidationError as error:
        raise DataError(f"{path}: {first_fault(error)}; measure again") from error


def _compared(data: dict[str, Any], recipe: Mapping[str, Any], bits: float) -> Front:
    found = _Comparison.model_validate(data).artifacts
    points = [
        Point(
            Path(e.name).name,
            e.bits_per_element,
            e.mean_kl,
            mine=_same(e.bits_per_element, bits)
            and Path(e.name).name.removesuffix(".kvcc") == recipe.get("name"),
        )
        for e in found
    ]
    return Front("kvcc compare", marked(points))


def _planned(data: dict[str, Any], recipe: Mapping[str, Any], bits: float) -> Front:
    points = []
    for each in _Search.model_validate(data).measured:
        try:
            passes = parse_recipe(each.recipe, "plan").as_dict()["passes"]
        except RecipeError:  # of a kvcc with other passes: still a point, but not this artifact
            passes = None
        mine = _same(each.bits, bits) and passes == recipe.get("passes")
        points.append(Point(_brief(each.recipe), each.bits, each.kl, mine=mine))
    return Front("kvcc plan", marked(points))


def _same(a: float, b: float) -> bool:
    return abs(a - b) <= 1e-6 * b


def _brief(recipe: str) -> str:
    """The passes of a recipe in one line."""
    passes = recipe.partition("passes:")[2].strip().splitlines()
    return ", ".join(line.strip().removeprefix("- ") for line in passes) or recipe.strip()


def marked(points: list[Point]) -> tuple[Point, ...]:
    """The points with `on_front` set, by bits."""

    def beaten(p: Point) -> bool:
        return any((q.bits, q.kl) != (p.bits, p.kl) and q.bits <= p.bits and q.kl <= p.kl for q in points)

    found = [Point(p.name, p.bits, p.kl, not beaten(p), p.mine) for p in points]
    return tuple(sorted(found, key=lambda p: (p.bits, p.kl)))


def drawn(front: Front, mine: Point | None) -> str:
    """KL against bits: the front as a curve, each recipe a dot, `mine` (when not among them) a dot of its own."""
    edge = tuple((p.bits, p.kl) for p in front.points if p.on_front)
    own = [p for p in front.points if p.mine] or ([mine] if mine else [])
    few = len(front.points) <= FEW
    others = [p for p in front.points if not p.mine]
    dots = [
        charts.Line("front", edge, quiet=True, labelled=False),
        *(charts.Line(p.name, ((p.bits, p.kl),), quiet=True, labelled=few or p.on_front) for p in others),
    ]
    if own:  # first of the coloured ones, and drawn over the others
        dots.append(charts.Line("this artifact", ((own[0].bits, own[0].kl),)))
    return kl_by_bits(dots, f"{TITLE}, as {front.command} measured it")


def kl_by_bits(series: Sequence[charts.Line], title: str = TITLE) -> str:
    """The chart of KL in nats a token against bits per element, each curve's name at its last point."""
    return charts.lines(
        series,
        title=title,
        x_label="bits per element, metadata included",
        y_label="KL, nats per token",
        log="y",
        origin=False,
        named=True,
    )


def front_file(edge: Sequence[tuple[float, float]], dots: Sequence[charts.Line]) -> str:
    """That chart as an SVG file: the front through the points of `edge`, and a dot for each recipe."""
    chart = kl_by_bits([charts.Line("front", tuple(edge), labelled=False), *dots])
    return charts.beside([chart], title=TITLE, columns=1)
