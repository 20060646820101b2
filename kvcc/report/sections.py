"""The sections of a report: what it tells, and for what it cannot tell, the command that would find it out."""

from dataclasses import dataclass, field

from kvcc.fronts import Front, Point
from kvcc.report.figures import (
    Facts,
    Figure,
    Table,
    accuracy_figures,
    allocated,
    channel_figures,
    front_figures,
    layer_figures,
    memory_figures,
    retrieval_figures,
)
from kvcc.report.verdict import Measured
from kvcc.runtime.calibrated import Calibrated


@dataclass(frozen=True)
class Missing:
    """What is not there, and the commands that bring it."""

    what: str
    commands: tuple[str, ...]


@dataclass(frozen=True)
class Section:
    """A heading, paragraphs, figures, tables that belong to none, and what is missing."""

    id: str
    heading: str
    text: tuple[str, ...] = ()
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()
    missing: tuple[Missing, ...] = field(default=())


def report_sections(
    facts: Facts, measured: Measured | None, calibration: Calibrated | None, front: Front | None
) -> list[Section]:
    """All sections with plots, in order. Gates and provenance are the template's own."""
    return [
        _memory(facts),
        _channels(calibration),
        _accuracy(measured),
        _layers(measured),
        _retrieval(measured),
        _front(facts, measured, front),
    ]


def _memory(facts: Facts) -> Section:
    windows = [layer for layer in facts["layers"] if layer["window"]]
    even, context = facts["smaller_from_tokens"], facts["model"]["context_length"]
    text = [
        "Bytes follow from the plan and include scales, zeros and alignment. The first and the most recent tokens of "
        "a sequence are kept exactly, which is why a short context can take more than fp16."
    ]
    if even is None:
        text.append("This cache is never smaller than an fp16 one.")
    elif even > context:
        text.append(f"It is smaller than fp16 from {even:,} tokens on, beyond this model's context.")
    if windows:
        text.append(
            f"Layers that attend through a sliding window: {len(windows)} of {len(facts['layers'])}. They hold their "
            "last tokens exactly, do not grow with the context, and have no sealed pages."
        )
    return Section("memory", "Memory", tuple(text), tuple(memory_figures(facts)))


def _channels(calibration: Calibrated | None) -> Section:
    figures = tuple(channel_figures(calibration))
    text: tuple[str, ...] = ()
    missing: tuple[Missing, ...] = ()
    if calibration is None:
        what = "The artifact was compiled without a profile, so the energy of its channels is not known."
        missing = (Missing(what, ("kvcc report model.kvcc --profile model.profile -o report.html",)),)
    elif not figures:
        text = (
            "Which K channels are stored is not fixed by the artifact's tables: they are chosen for each request, left "
            "the model's weights, or do not exist in its layers.",
        )
    else:
        text = (
            "What attention loses by storing fewer K channels, by the statistics of the calibration text. "
            "Quantisation of what is stored comes on top; what pages hold as means of channels that they leave out "
            "is counted as lost. V's channels are folded into weights or stored whole.",
        )
    return Section("channels", "Channel energy", text, figures, missing=missing)


CHECK = "kvcc check model.kvcc --against MODEL"


def _accuracy(measured: Measured | None) -> Section:
    if measured is None:
        what = "Accuracy was not measured. Measure it against the uncompressed model and keep it in the artifact:"
        return Section("accuracy", "Accuracy", missing=(Missing(what, (f"{CHECK} --store",)),))
    size = ", ".join(_said(key.replace("_", " "), value) for key, value in measured.size.items() if value)
    text = [
        f"Measured through the compressed cache itself against {measured.against}, uncompressed. The built-in prose "
        f"and code are held out from every calibration set. Seed {measured.seed}{', ' if size else ''}{size}."
    ]
    if g := measured.greedy:
        text.append(
            f"Greedy continuations of {g.prompts} prompts by {g.tokens} tokens: {100 * g.same:.1f} % the same token; "
            f"{g.first_difference:.1f} tokens on average before the first difference."
        )
    missing = []
    if measured.texts and not measured.other_contexts:
        command = f"{CHECK} --contexts 256,512 --store"
        missing.append(Missing("Divergence was measured behind one length of prefill only.", (command,)))
    tables = (allocated(measured),) if measured.texts else ()
    figures = tuple(accuracy_figures(measured))
    return Section("accuracy", "Accuracy", tuple(text), figures, tables, tuple(missing))


def _said(name: str, value: object) -> str:
    """One setting of a check in words."""
    if value is True:
        return name
    return f"{name} {' '.join(map(str, value)) if isinstance(value, list | tuple) else value}"


def _layers(measured: Measured | None) -> Section:
    figures = tuple(layer_figures(measured)) if measured else ()
    missing = () if figures else (Missing("Not measured.", (f"{CHECK} --layers --store",)),)
    return Section("by-layer", "Error by layer", figures=figures, missing=missing)


def _retrieval(measured: Measured | None) -> Section:
    figures = tuple(retrieval_figures(measured)) if measured else ()
    command = f"{CHECK} --retrieval 512,1024 --retrieval-tasks 10 --store"
    missing: tuple[Missing, ...] = ()
    if not figures:
        missing = (Missing("Not measured.", (command,)),)
    elif measured and not all(score.answers for score in measured.retrieval):
        missing = (
            Missing(
                "An older kvcc measured this, and did not keep at which depth answers stood.", (command,)
            ),
        )
    return Section("retrieval", "Retrieval", figures=figures, missing=missing)


def _front(facts: Facts, measured: Measured | None, front: Front | None) -> Section:
    bits, kl = facts["bits_per_element"], measured.mean_kl if measured else None
    mine = Point("this artifact", bits, kl, mine=True) if bits and kl else None
    missing: list[Missing] = []
    if front is None:
        commands = (
            "kvcc compare model.kvcc other.kvcc --against MODEL -o compare.json",
            "kvcc report model.kvcc --front compare.json -o report.html",
        )
        what = "How it stands beside other recipes takes a comparison, or a file of kvcc plan:"
        missing = [Missing(what, commands)]
    elif not front.has_mine and mine is None:
        what = (
            "This artifact is not among the recipes that were measured, and its own divergence is not known."
        )
        missing = [Missing(what, (f"{CHECK} --store",))]
    figures = tuple(front_figures(front, mine))
    return Section("front", "Bits against divergence", figures=figures, missing=tuple(missing))
