"""Seeded drawing that gives the same texts on every Python version.

Only `random.Random.random()` is promised to stay the same between releases, so every choice is made of it.
"""

from collections.abc import Sequence
from random import Random
from typing import Generic, TypeVar

T = TypeVar("T")


def stream(*key: object) -> Random:
    """A generator that depends on `key` alone (and on nothing drawn elsewhere)."""
    return Random("/".join(str(part) for part in key))


def pick(rng: Random, options: Sequence[T]) -> T:
    """One of `options`, each equally likely."""
    return options[int(rng.random() * len(options))]


def between(rng: Random, low: int, high: int) -> int:
    """An integer in [low, high], both ends included."""
    return low + int(rng.random() * (high - low + 1))


def shuffled(rng: Random, items: Sequence[T]) -> list[T]:
    """A new list with the items in random order (Fisher-Yates)."""
    order = list(items)
    for last in range(len(order) - 1, 0, -1):
        other = int(rng.random() * (last + 1))
        order[last], order[other] = order[other], order[last]
    return order


class Deck(Generic[T]):
    """Deals items in random order; shuffles anew when all were dealt, so that repeats lie far apart."""

    def __init__(self, rng: Random, items: Sequence[T]) -> None:
        self._rng, self._items = rng, tuple(items)
        self._left: list[T] = []

    def deal(self) -> T:
        if not self._left:
            self._left = shuffled(self._rng, self._items)
        return self._left.pop()
