"""safetensors files nobody vouches for: a header checked by our own rules, then tensors mapped."""

import os
from math import prod
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors import safe_open
from torch import Tensor

from kvcc.errors import ArtifactMissing, ArtifactTensor, CapacityError, KernelUnavailable
from kvcc.runtime.strict_json import parse_json

MAX_HEADER_BYTES = 64 << 20
MAX_NAME = 512  # characters
MAX_DIMENSIONS = 16
MAX_ELEMENTS = (
    1 << 59
)  # sizes of 0 counted as 1: torch multiplies the others for strides, in 64 bits of bytes
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

Header = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def read_header(path: Path) -> Header:
    """Dtype and shape of every tensor. Raises ArtifactTensor unless they cover the data without holes."""
    name = path.name
    try:
        with path.open("rb") as file:
            total = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if total < 8 or length > min(total - 8, MAX_HEADER_BYTES):
                raise ArtifactTensor(f"{name}: a header of {length:,} bytes in a file of {total:,}")
            data = parse_json(file.read(length), f"{name}: header", ArtifactTensor, MAX_HEADER_BYTES)
    except OSError as error:
        raise ArtifactMissing(f"{path}: {error.strerror or error}") from error
    if not isinstance(data, dict):
        raise ArtifactTensor(f"{name}: the header is not an object")
    data.pop("__metadata__", None)
    header, spans = {}, []
    for key, entry in data.items():
        header[key], span = _entry(name, key, entry)
        spans.append((*span, key))
    at = 0
    for first, last, key in sorted(spans):
        if first != at:  # bytes that belong to no tensor, or to two, could be another file's
            raise ArtifactTensor(f"{name}: tensors leave a hole, or overlap, at byte {at:,} of the data")
        if (8 + length + first) % header[key][0].itemsize:  # torch and the kernels read whole elements
            raise ArtifactTensor(f"{name}: tensor {key} does not begin at a multiple of its elements' size")
        at = last
    if at != total - 8 - length:
        raise ArtifactTensor(f"{name}: {total - 8 - length:,} bytes of data; its tensors have {at:,}")
    return header


def _entry(file: str, name: str, entry: Any) -> tuple[tuple[torch.dtype, tuple[int, ...]], tuple[int, int]]:
    if len(name) > MAX_NAME:
        raise ArtifactTensor(
            f"{file}: a tensor's name has {len(name)} characters; at most {MAX_NAME} are read"
        )
    where = f"{file}: tensor {name}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ArtifactTensor(f"{where}: its entry is not dtype, shape, data_offsets")
    dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ArtifactTensor(f"{where}: dtype {str(dtype)[:40]!r} is unknown; use one of {', '.join(DTYPES)}")
    for what, numbers in (("shape", shape), ("data_offsets", span)):
        if not isinstance(numbers, list) or not all(type(n) is int and n >= 0 for n in numbers):
            raise ArtifactTensor(f"{where}: {what} is not a list of whole numbers")
    if len(shape) > MAX_DIMENSIONS or prod(max(size, 1) for size in shape) > MAX_ELEMENTS:
        raise ArtifactTensor(f"{where}: shape {shape[:4]}… is beyond {MAX_DIMENSIONS} dimensions or 64 bits")
    nbytes = DTYPES[dtype].itemsize * prod(shape)
    if len(span) != 2 or span[1] - span[0] != nbytes:
        raise ArtifactTensor(f"{where}: shape {shape} of {dtype} takes {nbytes:,} bytes, not {span[:2]}")
    return (DTYPES[dtype], tuple(shape)), (span[0], span[1])


def open_tensors(path: Path, device: torch.device) -> dict[str, Tensor]:
    """Every tensor of a file whose header has been checked, on `device`; on the CPU mapped, not read.

    Raises ArtifactTensor, KernelUnavailable when there is no such device, CapacityError when it is too small.
    """
    try:
        with safe_open(str(path), framework="pt", device=str(device)) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise CapacityError(f"{path.name} does not fit on {device}: {error}") from error
    except safetensors.SafetensorError as error:
        raise ArtifactTensor(f"{path.name}: {error}") from error
    except OSError as error:
        raise ArtifactMissing(f"{path}: {error.strerror or error}") from error
    except (RuntimeError, AssertionError) as error:  # torch without that device raises either
        raise KernelUnavailable(f"device {device} cannot be used: {str(error).splitlines()[0]}") from error
    for name, tensor in tensors.items():
        if tensor.dtype == torch.bool and bool((tensor.view(torch.uint8) > 1).any()):
            raise ArtifactTensor(f"{path.name}: tensor {name}: a truth value is neither 0 nor 1")
    return tensors
