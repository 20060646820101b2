"""JSON from a file nobody vouches for: bounded, without duplicate keys, control characters or odd numbers."""

import json
import math
import re
from typing import Any

from pydantic import ValidationError

from kvcc.errors import ArtifactError

MAX_DEPTH = 32  # nested lists and objects
MAX_VALUES = 4_000_000  # of one document; a Python object takes up to a hundred times its text
_INT64 = 1 << 63
# A terminal would obey these; tab, line feed, form feed and carriage return are ordinary text.
_CONTROL = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


def parse_json(data: bytes, what: str, error: type[ArtifactError], limit: int) -> Any:
    """Decode `data`, of at most `limit` bytes. Raises `error`, naming `what`, beyond plain JSON."""
    if len(data) > limit:
        raise error(f"{what}: {len(data):,} bytes of JSON; at most {limit:,} are read")
    if sum(map(data.count, (b",", b"[", b"{"))) > MAX_VALUES:  # those within texts counted, too
        raise error(f"{what}: more than {MAX_VALUES:,} values of JSON")
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_object,
            parse_constant=_constant,
            parse_float=_float,
            parse_int=_int,
        )
        _check(value)
    except RecursionError as cause:
        raise error(f"{what}: JSON nested more than {MAX_DEPTH} levels deep") from cause
    except ValueError as cause:  # JSONDecodeError, UnicodeDecodeError and those raised below
        raise error(f"{what}: not the JSON that kvcc writes: {cause}") from cause
    return value


def first_fault(error: ValidationError) -> str:
    """ "field.inner: what is wrong there", in one line: names of fields can be anything that a file says."""
    first = error.errors()[0]
    where = ".".join("".join(c if c.isprintable() else "�" for c in str(part)[:100]) for part in first["loc"])
    return f"{where}: {first['msg'].removeprefix('Value error, ')}"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):  # which one counts would depend on the reader
        raise ValueError("an object has the same key twice")
    return found


def _constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:20]} is out of range")
    return value


def _int(text: str) -> int:
    value = int(text) if len(text) <= 20 else _INT64
    if not -_INT64 <= value < _INT64:
        raise ValueError(f"the integer {text[:24]} is out of range")
    return value


def _check(root: Any) -> None:
    level, depth = [root], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"nested more than {MAX_DEPTH} levels deep")
        inner: list[Any] = []
        for value in level:
            if isinstance(value, str):
                _check_text(value)
            elif isinstance(value, list):
                inner.extend(value)
            elif isinstance(value, dict):
                inner.extend(value.keys())
                inner.extend(value.values())
        level = inner


def _check_text(text: str) -> None:
    if found := _CONTROL.search(text):
        raise ValueError(f"a text holds the control character U+{ord(found.group()):04X}")
