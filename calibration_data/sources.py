"""Prompts from the user's own data: text files, JSON lines, Hugging Face data sets."""

import json
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from kvcc.errors import DataError

Message = dict[str, str]
Content = str | tuple[Message, ...]


def read_text(path: Path) -> str:
    """The text of a UTF-8 file. Raises DataError if it is unreadable, not UTF-8, binary or blank."""
    try:
        raw = path.read_bytes()
    except OSError as problem:
        raise DataError(f"{path}: cannot read: {problem.strerror}") from problem
    if b"\0" in raw:
        raise DataError(f"{path}: contains NUL bytes, so it is not text; give a UTF-8 .txt or .jsonl file")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise DataError(f"{path}: not UTF-8 at byte {problem.start}; convert the file to UTF-8") from problem
    if not text.strip():
        raise DataError(f"{path}: no text in it; calibration needs prompts")
    return text


def chunks(text: str, size: int) -> list[str]:
    """Cut `text` into contiguous chunks of at least `size` characters; joined, they give `text` back.

    Cuts fall after blank lines where one follows within another `size` characters, else after a line end,
    else after a blank, else (text without blanks) at twice the size. Only the last chunk may be shorter, and
    no chunk is blank if the text is not.
    """
    found: list[str] = []
    start = 0
    while len(text) - start > size:
        end = _cut(text, start + size, min(start + 2 * size, len(text)))
        found.append(text[start:end])
        start = end
    found.append(text[start:])
    return _without_blanks(found)


def _cut(text: str, low: int, high: int) -> int:
    for mark in ("\n\n", "\n", " "):
        # One character back, so that a mark which ends exactly at `low` counts.
        at = text.find(mark, max(0, low - len(mark)), high)
        if at >= 0:
            return at + len(mark)
    return high


def _without_blanks(parts: list[str]) -> list[str]:
    """Join blank chunks to a neighbour."""
    merged: list[str] = []
    for part in parts:
        if merged and (not part.strip() or not merged[-1].strip()):
            merged[-1] += part
        elif part:
            merged.append(part)
    return merged


def _messages(value: list[Any], where: str) -> tuple[Message, ...]:
    for message in value:
        good = isinstance(message, dict) and all(
            isinstance(message.get(key), str) for key in ("role", "content")
        )
        if not good:
            raise DataError(f"{where}: every message must be an object with string `role` and `content`")
    return tuple({"role": message["role"], "content": message["content"]} for message in value)


def row_content(row: Any, field: str, where: str) -> Content | None:
    """What one row says, or None if it is blank. `field` is a string or a list of chat messages; where a row
    has no `text`, its `messages` are taken.

    Raises DataError, naming the fields found, if the row has no such field or it holds something else.
    """
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object, found {type(row).__name__}")
    key = "messages" if field == "text" and "text" not in row and "messages" in row else field
    if key not in row:
        fields = ", ".join(map(str, row)) or "none"
        raise DataError(f"{where}: no field `{field}`; fields found: {fields}; choose one with --field")
    value = row[key]
    if isinstance(value, list):
        return _messages(value, where) or None
    if isinstance(value, str):
        return value if value.strip() else None
    raise DataError(
        f"{where}: field `{key}` is {type(value).__name__}, expected a string or a list of messages"
    )


def json_lines(path: Path, field: str, samples: int) -> list[Content]:
    """The first `samples` rows that say something. Raises DataError with the line number for a bad row."""
    found: list[Content] = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as problem:
            reason = problem.msg if isinstance(problem, json.JSONDecodeError) else "nested too deeply"
            raise DataError(f"{where}: invalid JSON: {reason}") from problem
        content = row_content(row, field, where)
        if content is not None:
            found.append(content)
        if len(found) == samples:
            break
    if not found:
        raise DataError(f"{path}: field `{field}` has no text in any line; choose another with --field")
    return found


def _hub_rows(name: str, config: str | None, split: str) -> Iterable[Any]:
    try:
        from datasets import load_dataset
    except ImportError as problem:
        raise DataError(f"hf:{name}: needs the `datasets` package: pip install 'kvcc[hub]'") from problem
    return load_dataset(name, config, split=split, streaming=True)


def hub_dataset(spec: str, field: str, samples: int) -> list[Content]:
    """The first `samples` rows of `NAME[@CONFIG][:SPLIT]` that say something, streamed; the split is `train`
    if not given. Raises DataError if `datasets` is missing or cannot load it, or if no row has text."""
    name, _, split = spec.partition(":")
    name, _, config = name.partition("@")
    if not name:
        raise DataError("hf: names no data set; write hf:NAME[@CONFIG][:SPLIT]")
    found: list[Content] = []
    try:
        for number, row in enumerate(
            islice(_hub_rows(name, config or None, split or "train"), 100 * samples)
        ):
            content = row_content(row, field, f"hf:{name}: row {number}")
            if content is not None:
                found.append(content)
            if len(found) == samples:
                break
    except DataError:
        raise
    except Exception as problem:  # `datasets` raises its own, http and file errors
        reason = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
        raise DataError(f"hf:{spec}: cannot load: {reason}") from problem
    if not found:
        raise DataError(f"hf:{spec}: field `{field}` has no text in the first {100 * samples} rows")
    return found
