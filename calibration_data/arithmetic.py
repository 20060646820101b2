"""Calibration texts of worked arithmetic; every printed result is computed, never drawn."""

from collections.abc import Callable
from fractions import Fraction
from random import Random

from kvcc.calibration_data.draw import Deck, between, pick, shuffled, stream
from kvcc.calibration_data.vocabulary import FIRST_NAMES, MONTHS, TOWNS, words

_GOODS = words("goods")


def _sum(rng: Random) -> str:
    terms = [between(rng, 12, 9999) for _ in range(between(rng, 2, 5))]
    lines = [f"Add the numbers {', '.join(map(str, terms[:-1]))} and {terms[-1]}."]
    total = terms[0]
    for term in terms[1:]:
        lines.append(f"{total} + {term} = {total + term}")
        total += term
    return "\n".join([*lines, f"The sum is {total}."])


def _product(rng: Random) -> str:
    a, b = between(rng, 13, 987), between(rng, 12, 98)
    tens, ones = b - b % 10, b % 10
    steps = [f"{a} * {tens} = {a * tens}", f"{a} * {ones} = {a * ones}", f"{a * tens} + {a * ones} = {a * b}"]
    return f"What is {a} times {b}? Split {b} into {tens} and {ones}.\n" + "\n".join(steps)


def _division(rng: Random) -> str:
    divisor, quotient = between(rng, 3, 49), between(rng, 21, 890)
    rest = between(rng, 0, divisor - 1)
    number = divisor * quotient + rest
    tail = f"a remainder of {rest}" if rest else "no remainder"
    return (
        f"Divide {number} by {divisor}.\n{divisor} * {quotient} = {divisor * quotient}\n"
        f"{number} - {divisor * quotient} = {rest}\nThe quotient is {quotient}, with {tail}."
    )


def _shopping(rng: Random) -> str:
    name, goods = pick(rng, FIRST_NAMES), shuffled(rng, _GOODS)[:2]
    n, m, price, price2 = between(rng, 2, 18), between(rng, 2, 18), between(rng, 3, 45), between(rng, 3, 45)
    cost, cost2 = n * price, m * price2
    paid = -(-(cost + cost2) // 50) * 50
    return (
        f"{name} buys {n} {goods[0]} at {price} pence each and {m} {goods[1]} at {price2} pence each, and "
        f"pays with {paid} pence. How much change does {name} get?\n"
        f"The {goods[0]} cost {n} * {price} = {cost} pence.\n"
        f"The {goods[1]} cost {m} * {price2} = {cost2} pence.\n"
        f"Together that is {cost} + {cost2} = {cost + cost2} pence.\n"
        f"The change is {paid} - {cost + cost2} = {paid - cost - cost2} pence."
    )


def _travel(rng: Random) -> str:
    start, goal = shuffled(rng, TOWNS)[:2]
    speed, hours = between(rng, 12, 110), between(rng, 2, 9)
    return (
        f"A train leaves {start} at {between(rng, 5, 11)} o'clock and travels to {goal} at {speed} "
        f"kilometres an hour. The journey takes {hours} hours. How far apart are the two towns?\n"
        f"Distance is speed times time: {speed} * {hours} = {speed * hours} kilometres."
    )


def _percentage(rng: Random) -> str:
    percent, base = between(rng, 1, 19) * 5, between(rng, 2, 95) * 20
    part = base * percent // 100
    return (
        f"In {pick(rng, MONTHS)} a shop in {pick(rng, TOWNS)} lowered a price of {base} "
        f"by {percent} percent.\n"
        f"{percent} percent of {base} is {base} * {percent} / 100 = {part}.\n"
        f"The new price is {base} - {part} = {base - part}."
    )


def _equation(rng: Random) -> str:
    a, x, b = between(rng, 2, 19), between(rng, 2, 75), between(rng, 3, 240)
    c = a * x + b
    return (
        f"Solve {a}x + {b} = {c}.\nSubtract {b} from both sides: {c} - {b} = {c - b}, so {a}x = {c - b}.\n"
        f"Divide by {a}: x = {x}.\nCheck: {a} * {x} = {a * x}, and {a * x} + {b} = {c}."
    )


def _fraction(rng: Random) -> str:
    p = Fraction(between(rng, 1, 8), between(rng, 9, 16))
    q = Fraction(between(rng, 1, 7), between(rng, 8, 15))
    low = p.denominator * q.denominator
    left, right = p.numerator * q.denominator, q.numerator * p.denominator
    return (
        f"Add {p} and {q}. A common denominator is {p.denominator} * {q.denominator} = {low}.\n"
        f"The numerators become {left} and {right}, and {left} + {right} = {left + right}.\n"
        f"In lowest terms, {left + right}/{low} equals {p + q}."
    )


def _table(rng: Random) -> str:
    town, rows = pick(rng, TOWNS), []
    months = MONTHS[: between(rng, 4, 12)]
    amounts = [between(rng, 20, 980) for _ in months]
    running = 0
    for month, amount in zip(months, amounts, strict=True):
        running += amount
        rows.append(f"| {month} | {amount} | {running} |")
    best = months[amounts.index(max(amounts))]
    head = f"Rainfall in {town}, in tenths of a millimetre.\n\n| Month | Amount | Total so far |"
    foot = f"The total is {running}. The wettest month was {best}, with {max(amounts)}."
    return "\n".join([head, "| --- | --- | --- |", *rows, "", foot])


def _sequence(rng: Random) -> str:
    first, step, count = between(rng, 1, 60), between(rng, 3, 37), between(rng, 6, 12)
    terms = [first + step * n for n in range(count)]
    last = terms[-1]
    return (
        f"The sequence {', '.join(map(str, terms))} grows by {step} each time.\nThe next term is "
        f"{last} + {step} = {last + step}. The sum of the first {count} terms is "
        f"{count} * ({first} + {last}) / 2 = {sum(terms)}."
    )


_KINDS: tuple[Callable[[Random], str], ...] = (
    _sum,
    _product,
    _division,
    _shopping,
    _travel,
    _percentage,
    _equation,
    _fraction,
    _table,
    _sequence,
)


def exercise(rng: Random) -> str:
    """One exercise with its solution; the question ends with the first line."""
    return pick(rng, _KINDS)(rng)


def arithmetic(seed: int, index: int, chars: int) -> str:
    """At least `chars` characters of numbered exercises with their solutions."""
    rng = stream("arithmetic", seed, index)
    kinds = Deck(rng, _KINDS)
    parts: list[str] = []
    size = 0
    while size < chars:
        parts.append(f"Exercise {len(parts) + 1}. {kinds.deal()(rng)}")
        size += len(parts[-1]) + 2
    return "\n\n".join(parts) + "\n"
