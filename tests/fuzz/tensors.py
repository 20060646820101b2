"""Mutations of tensor files."""

import json
import struct
from pathlib import Path
from random import Random
from typing import Any

from kvcc.runtime.tensor_file import DTYPES as TENSOR_DTYPES
from tests.fuzz.material import NUMBERS, replace


def tensors(path: Path, rng: Random) -> None:
    """Another header, another shape of the same bytes, or extreme numbers, in a tensor file."""
    file = path / rng.choice(["weights.safetensors", "weights.safetensors", "tables.safetensors"])
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])
    rng.choice([_header, _header, _values, _values, _reshape])(header, body, rng)
    text = json.dumps(header).encode()
    text += b" " * rng.choice([-len(text) % 8, -len(text) % 8, -len(text) % 64, 0])
    replace(file, len(text).to_bytes(8, "little") + text + bytes(body))


def _header(header: dict[str, Any], body: bytearray, rng: Random) -> None:
    name = rng.choice(list(header))
    entry, what = header[name], rng.randrange(8)
    if what == 0:
        entry["dtype"] = rng.choice([*TENSOR_DTYPES, "F8_E4M3", "C64", "I3"])
    elif what == 1:
        entry["shape"][rng.randrange(len(entry["shape"]))] = rng.choice(NUMBERS)
    elif what == 2:
        entry["data_offsets"][rng.randrange(2)] += rng.choice([1, -1, 4, 64, 1 << 40, -(1 << 62)])
    elif what == 3:
        header[rng.choice(["x", "a.b", "x" * 600, "model.norm.weight"])] = header.pop(name)
    elif what == 4:
        other = header[rng.choice(list(header))]
        header[name] = other
    elif what == 5:
        header["__metadata__"] = rng.choice([{"format": "pt"}, {"x": 1}, [], {"x": "y" * 9000}])
    elif what == 6:
        header[rng.choice(["x", name + "2"])] = {
            "dtype": "F32",
            "shape": [0] + [rng.choice([0, 1, 1 << 40, 1 << 62])] * rng.randrange(20),
            "data_offsets": entry["data_offsets"][1:] * 2,
        }
    else:
        del body[rng.randrange(len(body) + 1) :]


def _reshape(header: dict[str, Any], body: bytearray, rng: Random) -> None:
    """Another shape or type of as many bytes."""
    entry = header[rng.choice(list(header))]
    size = TENSOR_DTYPES[entry["dtype"]].itemsize
    if rng.random() < 0.5:
        entry["dtype"] = rng.choice([n for n, dtype in TENSOR_DTYPES.items() if dtype.itemsize == size])
        return
    shape = entry["shape"]
    elements = (entry["data_offsets"][1] - entry["data_offsets"][0]) // size
    entry["shape"] = rng.choice(
        [shape[::-1], [*shape, 1], [1, *shape], rng.sample(shape, len(shape)), [elements], [elements, 1]]
    )


def _values(header: dict[str, Any], body: bytearray, rng: Random) -> None:
    """Extreme numbers in a tensor."""
    first, last = header[rng.choice(list(header))]["data_offsets"]
    patterns = [struct.pack("<f", x) for x in (float("nan"), float("inf"), 1e38, -1e38, 1e-40, 0.0, 1e6)]
    piece = rng.choice([*patterns, b"\xff" * 4, bytes([0, 0, 0, 128]), rng.randbytes(4)])
    count = rng.choice([1, 2, max(1, (last - first) // 4)])
    at = first + 4 * rng.randrange(max(1, (last - first) // 4 - count + 1))
    body[at : at + 4 * count] = piece * count
