"""Calibration code: modules, tests, queries, scripts and configuration, composed from a seed.

Each piece is one of the templates in `snippets/` with its own names, fields and numbers; Python comes
twice as often as all other languages together.
"""

import re
from functools import cache
from importlib.resources import files
from random import Random

from kvcc.calibration_data.draw import Deck, between, pick, shuffled, stream
from kvcc.calibration_data.vocabulary import words

_MARK = re.compile(r"@(\w+)@")
_ENTITIES = words("entities")
_NUMERIC = words("numeric_fields")
_TEXTUAL = words("text_fields")
_SYSTEMS = words("systems")
_VERBS = words("verbs")
_ADJECTIVES = words("adjectives")
_WORDS = words("labels")
_IMPORTS = (
    "import heapq\nimport logging",
    "import logging\nfrom collections import deque",
    "import argparse\nimport sys",
    "import asyncio",
    "import json\nimport logging",
)


@cache
def _templates(name: str) -> tuple[tuple[str, str], ...]:
    """(kind, template) pairs of one snippet file."""
    text = (files(__package__) / "snippets" / f"{name}.txt").read_text(encoding="utf-8")
    blocks = ("\n" + text).split("\n%% ")[1:]
    return tuple((block.partition("\n")[0], block.partition("\n")[2].rstrip("\n")) for block in blocks)


def _names(rng: Random) -> dict[str, str]:
    entity, plural = pick(rng, _ENTITIES).split("/")
    f1, f2 = shuffled(rng, _NUMERIC)[:2]
    f3, (w1, w2) = pick(rng, _TEXTUAL), shuffled(rng, _WORDS)[:2]
    system, verb = pick(rng, _SYSTEMS), pick(rng, _VERBS)
    fields = [f"    {f1}: int", f"    {f2}: int", f'    {f3}: str = "{w1}"']
    names = {
        "entity": entity,
        "Entity": entity.capitalize(),
        "plural": plural,
        "Plural": plural.capitalize(),
        "f1": f1,
        "f2": f2,
        "f3": f3,
        "F1U": f1.upper(),
        "w1": w1,
        "w2": w2,
        "system": system,
        "verb": verb,
        "Verb": verb.capitalize(),
        "adj": pick(rng, _ADJECTIVES),
        "cmp": pick(rng, ("<", ">", "<=", ">=")),
        "sep": pick(rng, (";", ",", "|", ":")),
        "small": str(between(rng, 2, 9)),
        "pyfields": "\n".join(fields),
        "imports": f"{pick(rng, _IMPORTS)}\nfrom {system}.{plural} import {entity.capitalize()}, {verb}",
    }
    bounds = {"n1": (20, 99), "n2": (10, 89), "n3": (100, 980), "n4": (5, 60), "n5": (1000, 90000)}
    return names | {key: str(between(rng, low, high)) for key, (low, high) in bounds.items()}


def snippet(rng: Random, template: str) -> str:
    """The template with every `@name@` replaced; all marks of one snippet share one set of names."""
    names = _names(rng)
    return _MARK.sub(lambda match: names[match.group(1)], template)


def python_snippet(rng: Random) -> str:
    """One Python piece, as dialogues quote it."""
    return snippet(rng, pick(rng, _templates("python"))[1])


def code(seed: int, index: int, chars: int) -> str:
    """At least `chars` characters of code; pieces of one language in a row look like one file."""
    rng = stream("code", seed, index)
    python = Deck(rng, [template for _, template in _templates("python")])
    other = Deck(rng, [template for _, template in _templates("other")])
    parts: list[str] = []
    size = 0
    while size < chars:
        parts.append(snippet(rng, (python if rng.random() < 0.67 else other).deal()))
        size += len(parts[-1]) + 3
    return "\n\n\n".join(parts) + "\n"
