"""Retrieval tasks for evaluation: a fact (or a chain of facts) hidden in prose, a question, and candidates.

The kinds follow the long-context test literature (needle in a haystack; key-value; RULER's variable tracking,
Hsieh et al. 2024), with our own texts. Haystacks use the evaluation side of the vocabulary, which no
calibration set uses. The question is separate, so that it can be shown to a compressor or hidden from it.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from kvcc.calibration_data.draw import between, pick, shuffled, stream
from kvcc.calibration_data.prose import plain_paragraphs
from kvcc.calibration_data.vocabulary import FIRST_NAMES, SURNAMES, TOWNS, Side, words

CANDIDATES = 8
_GOLDEN = 0.6180339887498949
_THINGS = words("secrets")
_VARIABLES = words("variables")


@dataclass(frozen=True)
class Task:
    """One question about a long text.

    `context` is the text; `depth` in [0, 1] is where the first fact stands, as a share of its words;
    `answer` occurs exactly once in the context; `candidates` are wrong answers and the right one, in seeded
    order, for models too small to answer freely: compare their likelihoods behind `lead`, which is how an answer
    begins that is a whole sentence.
    """

    kind: str
    context: str
    question: str
    answer: str
    depth: float
    candidates: tuple[str, ...]
    lead: str = ""


def default_depth(seed: int, index: int) -> float:
    """Depths that cover [0, 1] evenly over consecutive indices (golden-ratio sequence)."""
    return (stream("depth", seed).random() + index * _GOLDEN) % 1.0


def haystack(rng: Random, words: int, side: Side = "evaluation") -> list[list[str]]:
    """Paragraphs of sentences, about `words` words in all (at most one sentence more)."""
    source = plain_paragraphs(rng, side)
    text: list[list[str]] = []
    count = 0
    while count < words:
        text.append([])
        for sentence in next(source):
            if count >= words:
                break
            text[-1].append(sentence)
            count += len(sentence.split())
    return text


def _insert(text: list[list[str]], facts: list[tuple[float, str]]) -> str:
    """The text with each fact before the sentence that begins at its depth (a share of the words)."""
    total = sum(len(sentence.split()) for part in text for sentence in part)
    waiting = sorted(facts)
    parts, position = [], 0
    for part in text:
        out: list[str] = []
        for sentence in part:
            length = len(sentence.split())
            while waiting and waiting[0][0] * total <= position + length / 2:
                out.append(waiting.pop(0)[1])
            out.append(sentence)
            position += length
        parts.append(out)
    if waiting:
        parts = parts or [[]]
        parts[-1].extend(fact for _, fact in waiting)
    return "\n\n".join(" ".join(part) for part in parts)


def _numbers(rng: Random, count: int) -> list[str]:
    """Different five-digit numbers; prose writes large numbers with commas, so they occur nowhere else."""
    found: list[str] = []
    while len(found) < count:
        number = str(between(rng, 10000, 99999))
        if number not in found:
            found.append(number)
    return found


def _key(kind: str, seed: int, index: int, side: Side) -> Random:
    return stream("retrieval", side, kind, seed, index)


def needle(
    seed: int, index: int, words: int, *, depth: float | None = None, side: Side = "evaluation"
) -> Task:
    """One access code in `words` words of prose; wrong candidates do not occur in the context."""
    rng = _key("needle", seed, index, side)
    depth = default_depth(seed, index) if depth is None else depth
    thing, numbers = pick(rng, _THINGS), _numbers(rng, CANDIDATES)
    answer, candidates = numbers[0], tuple(shuffled(rng, numbers))
    lead = f"The access code for {thing} is"
    context = _insert(haystack(rng, words, side), [(depth, f"{lead} {answer}.")])
    return Task("needle", context, f"What is the access code for {thing}?", answer, depth, candidates, lead)


def key_value(
    seed: int, index: int, words: int, *, depth: float | None = None, side: Side = "evaluation"
) -> Task:
    """Eight records of one form, spread over the text; one is asked for, the others are wrong candidates."""
    rng = _key("key_value", seed, index, side)
    depth = default_depth(seed, index) if depth is None else depth
    numbers = _numbers(rng, CANDIDATES)
    firsts, lasts, towns = shuffled(rng, FIRST_NAMES), shuffled(rng, SURNAMES), shuffled(rng, TOWNS)
    owners = [f"{firsts[n]} {lasts[n]} of {towns[n]}" for n in range(CANDIDATES)]
    depths = [depth] + [(n + rng.random()) / (CANDIDATES - 1) for n in range(CANDIDATES - 1)]
    leads = [f"The locker of {who} has the number" for who in owners]
    facts = [(at, f"{lead} {number}.") for at, lead, number in zip(depths, leads, numbers)]
    context = _insert(haystack(rng, words, side), facts)
    question = f"What is the number of the locker of {owners[0]}?"
    return Task("key_value", context, question, numbers[0], depth, tuple(shuffled(rng, numbers)), leads[0])


def variable_tracking(
    seed: int, index: int, words: int, *, depth: float | None = None, hops: int = 2, side: Side = "evaluation"
) -> Task:
    """Four chains of `hops` copies each (RULER's VT); the question asks what one chain's last variable is.

    The asked chain begins at `depth`; its copies follow, evenly spaced up to the end of the text. Candidates
    are the four chains' values, so a model that only picks some number scores a quarter.
    """
    rng = _key("variable_tracking", seed, index, side)
    depth = default_depth(seed, index) if depth is None else depth
    chains = 4
    numbers, names = _numbers(rng, chains), shuffled(rng, _VARIABLES)
    facts, last = [], ""
    for chain in range(chains):
        at = depth if chain == 0 else rng.random()
        chain_names = names[chain * (hops + 1) : (chain + 1) * (hops + 1)]
        facts.append((at, f"Let the variable {chain_names[0]} be {numbers[chain]}."))
        for hop in range(1, hops + 1):
            # Sorting is by depth and then by text: the small term keeps copies after their source at depth 1.
            place = at + (1 - at) * hop / (hops + 1) + hop * 1e-9
            facts.append((place, f"Let the variable {chain_names[hop]} equal {chain_names[hop - 1]}."))
        last = last or chain_names[-1]
    context = _insert(haystack(rng, words, side), facts)
    question = f"What is the value of the variable {last}?"
    candidates, lead = tuple(shuffled(rng, numbers)), f"The value of the variable {last} is"
    return Task("variable_tracking", context, question, numbers[0], depth, candidates, lead)


GENERATORS: dict[str, Callable[..., Task]] = {
    "needle": needle,
    "key_value": key_value,
    "variable_tracking": variable_tracking,
}


def contains_answer(generated: str, task: Task) -> bool:
    """Whether the answer occurs in `generated` as a whole word, before any wrong candidate.

    Letter case and thousands separators do not count; listing all candidates does not help.
    """
    text = re.sub(r"(?<=\d),(?=\d{3})", "", generated).casefold()

    def position(candidate: str) -> int | None:
        match = re.search(rf"(?<!\w){re.escape(candidate.casefold())}(?!\w)", text)
        return match.start() if match else None

    right = position(task.answer)
    wrong = [position(other) for other in task.candidates if other != task.answer]
    return right is not None and all(at is None or right < at for at in wrong)
