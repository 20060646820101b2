"""Text that no calibration prepares for: repetition, delimiters, digits, many scripts. For measuring robustness."""

from collections.abc import Callable
from random import Random

from kvcc.calibration_data.draw import between, pick, stream

_WORDS = ("again ", "the ", "0 ", "token, ", "été ")
_LINES = ("2026-01-01 00:00:00 INFO ok\n", "All work and no play makes a dull log.\n", "<td></td>")
_DELIMITERS = ("\n", "\n\n", "\t", "    ", ",", ";", "|", "---", "{}", "()", "...", '"', "*****")
_SCRIPTS = (
    (0x21, 0x7E),
    (0x3B1, 0x3C9),
    (0x430, 0x44F),
    (0x5D0, 0x5EA),
    (0x3041, 0x3096),
    (0x1F600, 0x1F64F),
)


def odd(seed: int, index: int, chars: int) -> str:
    """Text `index` of `seed`, at least `chars` characters: one word, one line, delimiters, digits, scripts in turn.

    Words and lines take turns, too, so that no text comes twice before all of them came.
    """
    rng, turn = stream("odd", seed, index), seed + index // 5
    piece = (_repeated(_WORDS, turn), _repeated(_LINES, turn), _delimiter, _digits, _letter)[index % 5]
    text: list[str] = []
    size = 0
    while size < chars:
        text.append(piece(rng))
        size += len(text[-1])
    return "".join(text)


def _repeated(options: tuple[str, ...], turn: int) -> Callable[[Random], str]:
    chosen = options[turn % len(options)]
    return lambda _: chosen


def _delimiter(rng: Random) -> str:
    return pick(rng, _DELIMITERS)


def _digits(rng: Random) -> str:
    return f"{between(rng, 0, 16**8 - 1):08x}{pick(rng, (' ', '-', ''))}"


def _letter(rng: Random) -> str:
    return chr(between(rng, *pick(rng, _SCRIPTS)))
