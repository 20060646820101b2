"""Prompt sets by name: the built-in ones, files, and Hugging Face data sets."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from kvcc.calibration_data.arithmetic import arithmetic
from kvcc.calibration_data.code import code
from kvcc.calibration_data.dialogue import dialogue
from kvcc.calibration_data.odd import odd
from kvcc.calibration_data.prose import prose
from kvcc.calibration_data.retrieval import retrieval
from kvcc.calibration_data.sources import Content, Message, chunks, hub_dataset, json_lines, read_text
from kvcc.calibration_data.stdlib_text import Kind, corpus
from kvcc.errors import DataError

Render = Callable[[tuple[Message, ...]], str]

CHARS_PER_TOKEN = 5.5  # more than tokenizers reach on these texts, so that a text gives the tokens asked for

HELD_OUT = ("prose", "code", "odd")

_GENERATED: dict[str, tuple[Callable[[int, int, int], Content], str]] = {
    "prose": (prose, "articles, letters, reports and how-to texts in English"),
    "code": (code, "Python, with some C, JavaScript, SQL, JSON and shell"),
    "dialogue": (dialogue, "chats of several turns, rendered with the model's chat template"),
    "retrieval": (retrieval, "long texts with hidden facts and a question at the end"),
    "arithmetic": (arithmetic, "exercises with worked solutions"),
}
_STDLIB: dict[str, tuple[Kind, str]] = {
    "stdlib-docs": ("prose", "the Python language reference (the half that `kvcc check` does not use)"),
    "stdlib-code": ("code", "Python's own standard library (the half that `kvcc check` does not use)"),
}


@dataclass(frozen=True)
class Prompt:
    """One prompt: `text`, or chat `messages` with their rendering as `text` when a chat function was given.

    `(source, index)` names the prompt within its set and stays the same for the same set and seed.
    """

    text: str | None
    messages: tuple[Message, ...] | None
    source: str
    index: int


def names() -> tuple[str, ...]:
    """The names of the built-in sets."""
    return (*_GENERATED, *_STDLIB, "mixed")


def describe() -> list[tuple[str, str]]:
    """(name, one line) for each built-in set."""
    rows = [(name, line) for name, (_, line) in (*_GENERATED.items(), *_STDLIB.items())]
    return [*rows, ("mixed", f"{', '.join(_GENERATED)} in turn")]


def _characters(length: int) -> int:
    return int(length * CHARS_PER_TOKEN) + 1


def _contents(name: str, samples: int, length: int, seed: int, field: str) -> Sequence[Content]:
    chars = _characters(length)
    if name in _GENERATED:
        generate = _GENERATED[name][0]
        return [generate(seed, index, chars) for index in range(samples)]
    if name in _STDLIB:
        return corpus(_STDLIB[name][0], held_out=False, samples=samples, chars=chars, seed=seed)
    if name.startswith("hf:"):
        return hub_dataset(name.removeprefix("hf:"), field, samples)
    path = Path(name)
    if not path.exists():
        raise DataError(
            f"no data set or file {name!r}; built-in sets: {', '.join(names())}; or give a .txt or "
            ".jsonl file, or hf:NAME[:SPLIT]"
        )
    if path.is_dir() or path.suffix not in (".txt", ".jsonl"):
        raise DataError(f"{path}: expected a .txt or .jsonl file")
    if path.suffix == ".txt":
        return chunks(read_text(path), chars)[:samples]
    return json_lines(path, field, samples)


def _prompt(content: Content, source: str, index: int, render: Render | None) -> Prompt:
    if isinstance(content, str):
        return Prompt(content, None, source, index)
    return Prompt(render(content) if render else None, content, source, index)


def _split(data: str) -> list[str]:
    """The parts of `data`: a file's name may contain commas, `mixed` stands for the generated sets."""
    parts = [data] if Path(data).is_file() else [part.strip() for part in data.split(",") if part.strip()]
    expanded = [name for part in parts for name in (_GENERATED if part == "mixed" else (part,))]
    if not expanded:
        raise DataError(f"no data set named; built-in sets: {', '.join(names())}")
    twice = sorted({name for name in expanded if expanded.count(name) > 1})
    if twice:
        raise DataError(f"{data}: {twice[0]!r} is named twice; its prompts would count twice")
    return expanded


def load_prompts(
    data: str,
    *,
    samples: int,
    length: int,
    seed: int,
    field: str = "text",
    render: Render | None = None,
) -> list[Prompt]:
    """Up to `samples` prompts from `data`, sized to give at least `length` tokens each.

    `data` is a built-in set (`names`), a `.txt` file (contiguous chunks, in order), a `.jsonl` file
    (whole rows; `field` is a string or a list of chat messages), `hf:NAME[@CONFIG][:SPLIT]`, or several of
    these with commas, which take turns. Built-in sets give exactly `samples` prompts; files may have fewer.

    `render` turns messages into text; without it such prompts have `text=None`. What `render` raises passes
    through. Raises DataError (one line) for anything unusable.
    """
    if samples < 1 or length < 1:
        raise DataError(f"samples ({samples}) and length ({length}) must be at least 1")
    parts = _split(data)
    shares = [(samples - n + len(parts) - 1) // len(parts) for n in range(len(parts))]
    columns = [
        [
            _prompt(content, name, index, render)
            for index, content in enumerate(_contents(name, share, length, seed, field))
        ]
        for name, share in zip(parts, shares, strict=True)
        if share
    ]
    return [prompt for row in zip_longest(*columns) for prompt in row if prompt is not None]


def held_out(kind: str, *, samples: int, length: int, seed: int) -> list[Prompt]:
    """Evaluation texts that no built-in calibration set contains, of at least `length` tokens each.

    `kind` is one of HELD_OUT: prose and code of Python's own, or odd: repetition, delimiters and noise. Raises
    DataError if it is unknown or this Python lacks its reference topics or sources.
    """
    if kind not in HELD_OUT:
        raise DataError(f"no held-out texts of kind {kind!r}; use {', '.join(HELD_OUT)}")
    if samples < 1 or length < 1:
        raise DataError(f"samples ({samples}) and length ({length}) must be at least 1")
    chars = _characters(length)
    if kind == "odd":  # tokens of blanks and dashes are long
        texts = [odd(seed, index, 4 * chars) for index in range(samples)]
    else:
        texts = corpus(
            "prose" if kind == "prose" else "code", held_out=True, samples=samples, chars=chars, seed=seed
        )
    return [Prompt(text, None, f"held-out-{kind}", index) for index, text in enumerate(texts)]


def digest(prompts: Sequence[Prompt]) -> str:
    """sha256 (hex) of the prompts in their order: texts, messages, sources and indices."""
    total = hashlib.sha256()
    for prompt in prompts:
        row = [prompt.text, prompt.messages, prompt.source, prompt.index]
        total.update(json.dumps(row, ensure_ascii=True, sort_keys=True).encode() + b"\n")
    return total.hexdigest()
