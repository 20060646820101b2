"""The words that prose is composed of: domains of life with their people, things, events and sayings.

The vocabulary is split in two: `calibration` domains make the calibration sets, `evaluation` domains make the
haystacks of `retrieval_tasks`, so that a check never asks about texts that calibration has seen.
"""

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Literal

Side = Literal["calibration", "evaluation"]


@cache
def words(name: str) -> tuple[str, ...]:
    """One of the plain word lists in `words/words.txt`."""
    text = (files(__package__) / "words" / "words.txt").read_text(encoding="utf-8")
    rows = dict(line.split(": ", 1) for line in text.splitlines())
    return tuple(rows[name].split(" | "))


FIRST_NAMES = words("first_names")
SURNAMES = words("surnames")
TOWNS = words("towns")
MONTHS = words("months")
WEEKDAYS = words("weekdays")


@dataclass(frozen=True)
class Domain:
    """One field of life; every entry is a list of interchangeable phrases.

    `things` are (singular, plural); `verbs` are (infinitive, gerund, past), each with its object; `measures`
    are (subject, unit, low, high); the rest are phrases as the sentence frames of `prose` need them.
    """

    field: str
    place: tuple[str, ...]
    people: tuple[str, ...]
    expert: tuple[str, ...]
    things: tuple[tuple[str, str], ...]
    stuff: tuple[str, ...]
    verbs: tuple[tuple[str, str, str], ...]
    cause: tuple[str, ...]
    event: tuple[str, ...]
    truth: tuple[str, ...]
    measures: tuple[tuple[str, str, int, int], ...]
    why: tuple[str, ...]
    advice: tuple[str, ...]


def _pair(entry: str) -> tuple[str, str]:
    singular, plural = entry.split("/")
    return singular, plural


def _verb(entry: str) -> tuple[str, str, str]:
    """`keep/keeping/kept the bees` gives the three forms, each with `the bees`."""
    infinitive, gerund, last = entry.split("/")
    past, _, rest = last.partition(" ")
    return f"{infinitive} {rest}", f"{gerund} {rest}", f"{past} {rest}"


def _measure(entry: str) -> tuple[str, str, int, int]:
    subject, unit, low, high = (part.strip() for part in entry.split(";"))
    return subject, unit, int(low), int(high)


def _domain(block: str) -> Domain:
    title, *lines = block.strip().splitlines()
    rows = {}
    for line in lines:
        key, _, rest = line.partition(":")
        rows[key] = tuple(entry.strip() for entry in rest.split(" | "))
    return Domain(
        field=title.strip(),
        things=tuple(_pair(entry) for entry in rows.pop("thing")),
        verbs=tuple(_verb(entry) for entry in rows.pop("verb")),
        measures=tuple(_measure(entry) for entry in rows.pop("measure")),
        **rows,
    )


@cache
def domains(side: Side) -> tuple[Domain, ...]:
    """All domains of one side, in file order."""
    text = (files(__package__) / "words" / f"{side}.txt").read_text(encoding="utf-8")
    return tuple(_domain(block) for block in ("\n" + text).split("\n# ")[1:])


@cache
def passages() -> tuple[str, ...]:
    """Paragraphs written by hand (about 20 kB), in file order; parts of the calibration side only."""
    folder = files(__package__) / "passages"
    names = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".txt"))
    texts = ((folder / name).read_text(encoding="utf-8") for name in names)
    return tuple(part.strip() for text in texts for part in text.split("\n\n") if part.strip())
