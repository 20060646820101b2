"""What mutations are made of: odd numbers and values, and ways to read and replace an artifact's files."""

from pathlib import Path
from typing import Any

NUMBERS = [0, 1, -1, 2, 3, 5, 7, 8, 16, 17, 32, 64, 127, 128, 255, 4093, -2]
NUMBERS += [1 << 15, 1 << 20, 1 << 24, 1 << 31, 1 << 40, 1 << 62, (1 << 63) - 1, -(1 << 63)]
ODD: list[Any] = [None, True, False, 0.5, -0.0, 1e300, -1e-300, [], [0], [[0]], [None], {}]
ODD += ["", "x", "tokens", "../x", "layers.0.k_mean", "float16", "basis", "\u202e", "[/]", "é" * 300]
ODD += [{"ref": "tokens"}, {"ref": "cache"}, {"dtype": "float64"}, {"dtype": "bool"}]
ODD += [{"device": "runtime"}, {"float": "nan"}]


def replace(file: Path, data: bytes) -> None:
    """New content; the original may be a hard link, so never write into it."""
    file.unlink(missing_ok=True)
    file.write_bytes(data)


def files(path: Path) -> list[Path]:
    """The regular files of an artifact."""
    return sorted(file for file in path.rglob("*") if file.is_file() and not file.is_symlink())
