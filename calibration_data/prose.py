"""Calibration prose: articles, letters, reports, how-to lists, diaries and questions, composed from a seed.

A document is a run of pieces; each piece has one domain, one town and two people, which its sentences share.
Sentences are frames (`frames`) filled from the domain (`vocabulary`); within a document no sentence occurs
twice. The hand-written passages are dealt out over the samples of a set, each once, so long as they last.
"""

import re
from collections.abc import Callable, Iterator
from random import Random

from kvcc.calibration_data import frames
from kvcc.calibration_data.draw import Deck, between, pick, shuffled, stream
from kvcc.calibration_data.vocabulary import (
    FIRST_NAMES,
    MONTHS,
    SURNAMES,
    TOWNS,
    WEEKDAYS,
    Domain,
    Side,
    domains,
    passages,
    words,
)

_SLOT = re.compile(r"\{(\w+)\}")
_NUMBERS = words("numbers")
_FEMININE = frozenset(words("feminine_names"))


def capital(text: str) -> str:
    """`text` with its first letter in upper case and the rest untouched."""
    return text[:1].upper() + text[1:]


def with_article(noun: str) -> str:
    """`noun` after `a` or `an`."""
    return ("an " if noun[0].lower() in "aeiou" else "a ") + noun


class Scene:
    """The people, the place and the phrases that the sentences of one piece share."""

    def __init__(self, rng: Random, domain: Domain, seen: set[str]) -> None:
        self.rng, self.domain, self._seen = rng, domain, seen
        first = pick(rng, FIRST_NAMES)
        feminine = first in _FEMININE
        # Speakers share one pronoun in a piece, so that `she` and `he` never contradict a name.
        other = pick(rng, [name for name in FIRST_NAMES if (name in _FEMININE) == feminine and name != first])
        surnames = shuffled(rng, SURNAMES)[:2]
        self.fixed = {
            "name": f"{first} {surnames[0]}",
            "surname": surnames[0],
            "other": f"{other} {surnames[1]}",
            "reader": pick(rng, FIRST_NAMES),
            "writer": pick(rng, FIRST_NAMES),
            "town": pick(rng, TOWNS),
            "field": domain.field,
            "er": "er" if feminine else "is",
            "im": "er" if feminine else "im",
            "shehe": "she" if feminine else "he",
        }
        self.decks = {
            key: Deck(rng, getattr(domain, key))
            for key in ("place", "people", "expert", "stuff", "cause", "event", "truth", "why", "advice")
        }
        self.decks |= {"month": Deck(rng, MONTHS), "weekday": Deck(rng, WEEKDAYS)}
        self.frames: dict[int, Deck[str]] = {}

    def _figures(self) -> dict[str, str]:
        subject, unit, low, high = pick(self.rng, self.domain.measures)
        small = between(self.rng, low, (low + high) // 2)
        large = between(self.rng, (low + high) // 2 + 1, high)
        return {"subject": subject, "figure": f"{small:,} {unit}", "figure2": f"{large:,} {unit}"}

    def _slot(self, key: str) -> str:
        rng, low = self.rng, key.lower()
        if low in self.fixed:
            return self.fixed[low]
        if low in self.decks:
            return self.decks[low].deal()
        if low in ("folk", "tip"):
            text = self.decks["people" if low == "folk" else "advice"].deal().removeprefix("the ")
            return text if low == "folk" else text[0].lower() + text[1:]
        if low in ("act", "doing", "did", "done"):
            infinitive, gerund, past = pick(rng, self.domain.verbs)
            return {"act": infinitive, "doing": gerund, "did": past}.get(low, f"continued {gerund}")
        if low in ("thing", "things"):
            return pick(rng, self.domain.things)[low == "things"]
        simple: dict[str, Callable[[], str]] = {
            "year": lambda: str(between(rng, 1871, 2019)),
            "month2": lambda: pick(rng, MONTHS),
            "n_years": lambda: pick(rng, _NUMBERS),
            "number": lambda: pick(rng, (*_NUMBERS, str(between(rng, 13, 98)))),
            "season": lambda: pick(rng, ("spring", "summer", "autumn", "winter")),
            "seen": lambda: pick(rng, ("looked at", "dealt with", "lost", "counted", "written off")),
            "duration": lambda: f"{pick(rng, _NUMBERS)} {pick(rng, ('days', 'weeks', 'months', 'hours'))}",
            "a_expert": lambda: with_article(self.decks["expert"].deal()),
        }
        return simple[low]()

    def fill(self, frame: str) -> str:
        """The frame with every slot filled; `{Slot}` gets a capital."""
        figures = self._figures()

        def value(match: re.Match[str]) -> str:
            key = match.group(1)
            text = figures.get(key.lower()) or self._slot(key)
            return capital(text) if key[0].isupper() else text

        return _SLOT.sub(value, frame)

    def say(self, group: tuple[str, ...]) -> str:
        """A sentence of one kind that the document does not have yet; kinds deal their frames in turn.

        The search for a new one is bounded: a document of many thousand sentences may repeat one.
        """
        deck = self.frames.setdefault(id(group), Deck(self.rng, group))
        sentence = self.fill(deck.deal())
        for _ in range(64):
            if sentence not in self._seen:
                break
            sentence = self.fill(deck.deal())
        self._seen.add(sentence)
        return sentence


_PLANS = (
    (frames.GENERAL, frames.EVENT, frames.VOICE, frames.CONTRAST),
    (frames.EVENT, frames.EVENT, frames.GENERAL, frames.VOICE),
    (frames.GENERAL, frames.FIGURE, frames.CONTRAST, frames.EVENT, frames.VOICE),
    (frames.VOICE, frames.GENERAL, frames.EVENT),
    (frames.FIGURE, frames.EVENT, frames.CONTRAST, frames.GENERAL),
    (frames.EVENT, frames.CONTRAST, frames.VOICE, frames.GENERAL, frames.FIGURE, frames.EVENT),
)


def _sentences(scene: Scene, *lead: tuple[str, ...]) -> list[str]:
    return [scene.say(group) for group in (*lead, *pick(scene.rng, _PLANS))]


def _paragraph(scene: Scene, *lead: tuple[str, ...]) -> str:
    return " ".join(_sentences(scene, *lead))


def _article(scene: Scene) -> Iterator[str]:
    if scene.rng.random() < 0.6:
        yield "# " + capital(scene.say(frames.HEADINGS))
    yield _paragraph(scene, frames.OPENING)
    for part in range(between(scene.rng, 1, 4)):
        if part and scene.rng.random() < 0.3:
            yield "## " + capital(scene.say(frames.HEADINGS))
        yield _paragraph(scene)
    yield _paragraph(scene) + " " + scene.say(frames.CLOSING)


def _letter(scene: Scene) -> Iterator[str]:
    yield scene.say(frames.LETTER_OPENINGS)
    for _ in range(between(scene.rng, 2, 3)):
        parts = [scene.say(frames.LETTER_BODIES), scene.say(frames.LETTER_BODIES), scene.say(frames.EVENT)]
        yield " ".join([*parts, scene.say(frames.CONTRAST), scene.say(frames.GENERAL)])
    yield scene.say(frames.LETTER_ENDINGS)


def _report(scene: Scene) -> Iterator[str]:
    town, year = scene.fixed["town"], between(scene.rng, 1961, 2019)
    yield f"Report on {scene.domain.field} in {town}, {year}"
    yield _paragraph(scene, frames.FIGURE)
    findings = [
        scene.say(frames.GENERAL if n % 2 else frames.FIGURE) for n in range(between(scene.rng, 3, 5))
    ]
    yield "The main findings are these:\n\n" + "\n".join(f"{n}. {text}" for n, text in enumerate(findings, 1))
    yield _paragraph(scene) + " " + scene.say(frames.CLOSING)


def _how_to(scene: Scene) -> Iterator[str]:
    yield "How to " + scene._slot("act")
    yield scene.say(frames.GENERAL) + " " + scene.fill("Before you begin, ask yourself {why}.")
    steps = [scene.fill("{Advice}.") for _ in range(between(scene.rng, 3, 5))]
    yield "\n".join(f"- {step} {scene.say(frames.GENERAL)}" for step in steps)
    yield scene.say(frames.VOICE) + " " + scene.say(frames.EVENT) + " " + scene.say(frames.CLOSING)


def _diary(scene: Scene) -> Iterator[str]:
    month, day = pick(scene.rng, MONTHS), between(scene.rng, 1, 12)
    for _ in range(between(scene.rng, 3, 6)):
        yield f"{day} {month}. " + " ".join(scene.say(frames.DIARY) for _ in range(between(scene.rng, 2, 3)))
        day += between(scene.rng, 1, 3)


def _interview(scene: Scene) -> Iterator[str]:
    yield scene.fill("Questions about {field}, answered by {name} of {town}")
    for _ in range(between(scene.rng, 3, 5)):
        yield f"Q: {scene.say(frames.QUESTIONS)}\nA: {scene.say(frames.ANSWERS)} {scene.say(frames.EVENT)}"


_PIECES = (_article, _article, _article, _letter, _report, _how_to, _diary, _interview)


def _scenes(rng: Random, side: Side) -> Iterator[Scene]:
    """Scenes without end, which share the set of sentences already said."""
    seen: set[str] = set()
    while True:
        for domain in shuffled(rng, domains(side)):
            yield Scene(rng, domain, seen)


def paragraphs(rng: Random, side: Side) -> Iterator[str]:
    """Paragraphs, headings and lists without end, piece after piece."""
    for scene in _scenes(rng, side):
        yield from pick(rng, _PIECES)(scene)


def plain_paragraphs(rng: Random, side: Side) -> Iterator[list[str]]:
    """Paragraphs of running text without end, each as the list of its sentences; no heading, no list."""
    for scene in _scenes(rng, side):
        yield _sentences(scene, frames.OPENING)
        for _ in range(between(rng, 1, 3)):
            yield _sentences(scene)


def prose(seed: int, index: int, chars: int) -> str:
    """At least `chars` characters of prose, ending with a whole paragraph; depends on its arguments alone."""
    rng = stream("prose", seed, index)
    written = shuffled(stream("passages", seed), passages())
    share = max(1, min(8, chars // 4000))  # hand-written paragraphs per sample, while they last
    inserted = written[index * share : (index + 1) * share]
    parts, size = [], 0
    for text in paragraphs(rng, "calibration"):
        if inserted and rng.random() < 0.3:
            text = f"{inserted.pop()}\n\n{text}"
        parts.append(text)
        size += len(text) + 2
        if size >= chars:
            break
    return "\n\n".join(parts) + "\n"
