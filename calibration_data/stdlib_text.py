"""Text that every Python carries: its language reference (prose) and its own source files (code).

Each corpus is cut in two by a hash of the topic's or module's name. One half is what `stdlib-docs` and
`stdlib-code` hand out, the other is only ever handed out by `held_out`, so accuracy is never measured on text
that calibration may have seen. The texts differ between Python versions; `prompts.digest` tells.
"""

import hashlib
import re
import sysconfig
from collections import deque
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Literal

from kvcc.calibration_data.draw import shuffled, stream
from kvcc.errors import DataError

Kind = Literal["prose", "code"]

# Vendored packages, tests, tables and generated data are not representative code.
_SKIP = frozenset(
    [
        "test",
        "tests",
        "idlelib",
        "lib2to3",
        "site-packages",
        "dist-packages",
        "__pycache__",
        "turtledemo",
        "ensurepip",
        "pydoc_data",
        "encodings",
        "msilib",
        "__phello__",
        "idle_test",
        "_vendor",
        "lib-dynload",
    ]
)
_SMALLEST = 1500  # characters; smaller files are mostly imports


def is_held_out(kind: Kind, name: str) -> bool:
    """Which half a topic or a top-level module belongs to; depends on the name alone."""
    # 38 makes both halves of both corpora about equally long; another number would measure other texts.
    return hashlib.sha256(f"kvcc/38/{kind}/{name}".encode()).digest()[0] % 2 == 0


@cache
def _topics() -> dict[str, str]:
    """The topics of the language reference, each paragraph in one topic only.

    Topics quote each other at length (`compound` contains `while`), so the longest keeps what it shares.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as problem:
        raise DataError(
            "this Python lacks pydoc_data.topics; install its standard library in full"
        ) from problem
    seen: set[str] = set()
    kept: dict[str, str] = {}
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        parts = []
        for part in re.split(r"\n\s*\n", topics[name].strip("\n")):
            key = " ".join(part.split())
            if key not in seen:
                seen.add(key)
                parts.append(part)
        text = "\n\n".join(parts)
        if len(text) > 400:
            kept[name] = text
    return kept


@cache
def _modules() -> dict[str, tuple[Path, ...]]:
    """Source files of the standard library by top-level module, in sorted order."""
    root = Path(sysconfig.get_path("stdlib"))
    found: dict[str, list[Path]] = {}
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        parts = path.relative_to(root).parts
        if (
            _SKIP.isdisjoint(parts)
            and not parts[0].startswith("config-")
            and path.stat().st_size >= _SMALLEST
        ):
            found.setdefault(parts[0].removesuffix(".py").lstrip("_"), []).append(path)
    if not found:
        raise DataError(f"no Python sources in {root}; `stdlib-code` needs a Python with its .py files")
    return {name: tuple(paths) for name, paths in found.items()}


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _serve(order: Sequence[str], read: Callable[[str], str], samples: int, chars: int) -> list[str]:
    """Texts of at least `chars` characters, cut at blank lines.

    Each text takes topics that no earlier text has touched; when none is left, the rests of the long ones;
    and when the whole corpus was handed out, it begins again.
    """
    queue = deque((name, 0) for name in order)
    texts = []
    for _ in range(samples):
        parts: list[str] = []
        rests: list[tuple[str, int]] = []
        size = 0
        while size < chars:
            if not queue:
                queue.extend(rests or [(name, 0) for name in order])
                rests = []
            name, start = queue.popleft()
            text = read(name)
            end = text.find("\n\n", min(start + chars - size, len(text)))
            end = len(text) if end < 0 else end
            parts.append(text[start:end].strip("\n"))
            size += len(parts[-1]) + 2
            if text[end:].strip():
                rests.append((name, end))
        queue.extend(rests)
        texts.append("\n\n".join(parts) + "\n")
    return texts


def corpus(kind: Kind, *, held_out: bool, samples: int, chars: int, seed: int) -> list[str]:
    """`samples` texts of at least `chars` characters from one half of a corpus; the seed orders the topics.

    Raises DataError when this Python was installed without its reference topics or its sources.
    """
    if kind == "prose":
        topics = _topics()
        chosen = [name for name in sorted(topics) if is_held_out("prose", name) == held_out]
        return _serve(shuffled(stream("stdlib", kind, seed), chosen), topics.__getitem__, samples, chars)
    modules = _modules()
    paths = {
        path.as_posix(): path
        for name, group in sorted(modules.items())
        if is_held_out("code", name) == held_out
        for path in group
    }
    order = shuffled(stream("stdlib", kind, seed), list(paths))
    return _serve(order, lambda name: _read(paths[name]), samples, chars)
