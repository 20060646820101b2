"""Calibration dialogues: chat messages about everyday subjects, code and sums, composed from a seed."""

import re
from collections.abc import Callable
from random import Random

from kvcc.calibration_data import frames
from kvcc.calibration_data.arithmetic import exercise
from kvcc.calibration_data.code import python_snippet
from kvcc.calibration_data.draw import Deck, between, pick, stream
from kvcc.calibration_data.prose import Scene
from kvcc.calibration_data.vocabulary import domains

Message = dict[str, str]
_SYSTEM = (
    "You are a helpful assistant. Answer clearly and keep to the question.",
    "You are a patient tutor. Explain each step before you go on to the next.",
    "You are the assistant of a small newspaper. Answer in full sentences.",
    "Answer as a careful expert would, and say so when something is uncertain.",
)
_ASK_FACT = (
    "Can you explain {why}? I have heard that {truth}, but nobody could tell me the reason.",
    "I am new to {field}. What should I know about {stuff} before I start?",
    "We had {cause} this year, and {event}. What would you advise?",
    "My neighbour says that {truth}. Is that so?",
    "Please write a short paragraph about {field} in a town called {town}.",
    "What are the most common mistakes that {people} make?",
    "I want to {act} for the first time. How do I begin?",
)
_REPLY_OPENING = (
    "That is a good question, and the short answer is that {truth}.",
    "Yes, broadly speaking: {truth}.",
    "It depends on what you mean by {stuff}, but in general {truth}.",
    "I would start from one simple fact: {truth}.",
    "There are two things to consider here, namely {cause} and the state of the {things}.",
)
_THANKS = (
    "Thanks, that helps. And what about {stuff}?",
    "I see. Does the same hold after {cause}?",
    "Could you give me an example?",
    "That makes sense. What would {people} do differently?",
    "Can you say that more briefly?",
    "All right, but somebody told me that {truth}.",
)


def _advice_turn(scene: Scene) -> str:
    tips = [f"{n}. {scene.fill('{Advice}.')}" for n in range(1, between(scene.rng, 3, 5))]
    opening = scene.say(_REPLY_OPENING)
    return f"{opening} A few suggestions:\n\n" + "\n".join(tips) + "\n\n" + scene.say(frames.GENERAL)


def _plain_turn(scene: Scene) -> str:
    parts = [scene.say(_REPLY_OPENING), scene.say(frames.GENERAL), scene.say(frames.EVENT)]
    return " ".join([*parts, scene.say(frames.CONTRAST), scene.say(frames.GENERAL)])


def _subject(rng: Random, seen: set[str]) -> list[Message]:
    scene = Scene(rng, pick(rng, domains("calibration")), seen)
    turns: list[Message] = []
    for n in range(between(rng, 1, 3)):
        turns.append({"role": "user", "content": scene.say(_THANKS if n else _ASK_FACT)})
        reply = _advice_turn if rng.random() < 0.4 else _plain_turn
        turns.append({"role": "assistant", "content": reply(scene)})
    return turns


def _sum(rng: Random, seen: set[str]) -> list[Message]:
    question, _, solution = exercise(rng).partition("\n")
    ask = pick(
        rng, ("Please work this out step by step.", "Can you check this for me?", "How would you solve this?")
    )
    answer = solution.strip() or question
    return [{"role": "user", "content": f"{ask} {question}"}, {"role": "assistant", "content": answer}]


def _code(rng: Random, seen: set[str]) -> list[Message]:
    snippet = python_snippet(rng)
    name = re.findall(r"(?:def|class) (\w+)", snippet)[0]
    ask = pick(rng, ("Please write it in Python.", "Type hints would be nice.", "Keep it short, please."))
    return [
        {"role": "user", "content": f"I need a piece of code around `{name}`. {ask}"},
        {"role": "assistant", "content": f"Here is one way to do it:\n\n```python\n{snippet}\n```"},
    ]


_KINDS: tuple[Callable[[Random, set[str]], list[Message]], ...] = (_subject, _subject, _subject, _sum, _code)


def dialogue(seed: int, index: int, chars: int) -> tuple[Message, ...]:
    """Messages with at least `chars` characters of content: sometimes a system message, then user and
    assistant in turn, ending with the assistant."""
    rng = stream("dialogue", seed, index)
    kinds, seen = Deck(rng, _KINDS), set[str]()
    messages: list[Message] = []
    if rng.random() < 0.5:
        messages.append({"role": "system", "content": pick(rng, _SYSTEM)})
    size = 0
    while size < chars:
        turns = kinds.deal()(rng, seen)
        messages += turns
        size += sum(len(turn["content"]) for turn in turns)
    return tuple(messages)
