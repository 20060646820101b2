"""Several artifacts of one model, measured on the same texts in one run."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from torch import Tensor

from kvcc.bench import decode_times
from kvcc.charts import Line
from kvcc.checking import CheckSize, Verdict, check, require_model
from kvcc.frontend import load_model
from kvcc.fronts import front_file
from kvcc.kernels.linear import WeightType
from kvcc.progress import OnProgress
from kvcc.runtime import load
from kvcc.runtime.artifact import read_manifest
from kvcc.uncompressed import uncompressed


@dataclass(frozen=True)
class Entry:
    """One artifact's line."""

    name: str  # its recipe, or its path where recipes have the same name
    bits_per_element: float  # metadata included, windows not
    bytes_per_token: float
    kl: dict[str, float]  # nats, by kind of text
    top1: dict[str, float]  # share of equal predictions
    perplexity_increase: dict[str, float]  # percent
    retrieval_drop: float | None  # points lost, the mean over all tasks; None where none were asked
    cache_bytes: int  # allocated at the end of a text
    decode_ms: float  # median step of one sequence at the context
    on_front: bool  # no other artifact has a smaller mean KL at as few bits

    @property
    def mean_kl(self) -> float:
        return sum(self.kl.values()) / len(self.kl)


def compare(
    artifacts: Sequence[Path],
    against: str,
    *,
    data: Sequence[str] = ("prose",),
    size: CheckSize | None = None,
    seed: int = 0,
    steps: int = 16,
    weights: WeightType | None = None,
    on_progress: OnProgress | None = None,
) -> list[Entry]:
    """Measure artifacts of the model `against`, by rising bits; the model and its logits are made once.

    `steps` decode steps are timed. Raises what `check` does.
    """
    size = size or CheckSize(greedy_prompts=0)
    models = [read_manifest(path).model for path in artifacts]  # all of them before hours of work
    first = load(artifacts[0], verify="sizes")
    loaded = load_model(against, first.identity.dtype)
    for path, model in zip(artifacts, models):
        require_model(path, model, loaded.identity)
    reference = uncompressed(loaded, first.tokenizer)
    expected: dict[str, list[Tensor]] = {}
    found = []
    for path in artifacts:
        verdict = check(
            path,
            loaded,
            data=data,
            size=size,
            seed=seed,
            weights=weights,
            reference=reference,
            expected=expected,
            on_progress=_named(path, on_progress),
        )
        ms = median(decode_times(load(path, weights=weights), size.context, 1, steps).milliseconds)
        found.append((path, verdict, ms))
    names = [verdict.recipe for _, verdict, _ in found]
    entries = [
        _entry(verdict.recipe if names.count(verdict.recipe) == 1 else str(path), verdict, ms)
        for path, verdict, ms in found
    ]
    return marked(sorted(entries, key=lambda e: (e.bits_per_element, e.mean_kl)))


def marked(entries: Sequence[Entry]) -> list[Entry]:
    """The entries with `on_front` set."""
    points = [(e.bits_per_element, e.mean_kl) for e in entries]
    return [
        Entry(**(asdict(e) | {"on_front": not any(_beats(other, point) for other in points)}))
        for e, point in zip(entries, points)
    ]


def _beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
    return a != b and a[0] <= b[0] and a[1] <= b[1]


def _entry(name: str, verdict: Verdict, ms: float) -> Entry:
    overall = {text.kind: text.overall for text in verdict.texts}
    drops = [score.drop for score in verdict.retrieval]
    return Entry(
        name,
        verdict.bits_per_element,
        verdict.bytes_per_token,
        {kind: bucket.kl for kind, bucket in overall.items()},
        {kind: bucket.top1 for kind, bucket in overall.items()},
        {kind: bucket.perplexity_increase for kind, bucket in overall.items()},
        sum(drops) / len(drops) if drops else None,
        max(text.cache_bytes for text in verdict.texts),
        ms,
        False,
    )


def _named(path: Path, report: OnProgress | None) -> OnProgress | None:
    return report and (lambda what, done, total: report(f"{path.name}: {what}", done, total))


def drawn(entries: Sequence[Entry]) -> str:
    """An SVG file of mean KL against bits per element, one dot an artifact, and the front."""
    points = [(e.bits_per_element, e.mean_kl) for e in entries]
    dots = [Line(e.name, (point,), quiet=not e.on_front) for e, point in zip(entries, points)]
    return front_file([point for e, point in zip(entries, points) if e.on_front], dots)


def as_dict(entries: Sequence[Entry]) -> dict[str, Any]:
    """Plain data, for JSON."""
    return {"artifacts": [asdict(e) | {"mean_kl": e.mean_kl} for e in entries]}
