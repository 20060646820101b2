"""Cross-compiles the shipped Triton kernels for GPUs that need not be there, and reads what they use.

A configuration is one kernel as the launchers in `triton` launch it for one layer: the storage layouts of the shipped
recipes and some of users', and the head sizes of common models.
"""

import re
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget

from kvcc.errors import KernelUnavailable
from kvcc.kernels import cross_compile
from kvcc.kernels.cross_compile import compile_launch, pretended
from kvcc.kernels.layer_launches import LayerShape, layer_launches
from kvcc.kernels.storages import COMMON_SIZES, HEAD_SIZES, RECIPES, STORAGE, storage_layout
from kvcc.kernels.triton import Launch

TARGETS = {name: cross_compile.TARGETS[name] for name in ("sm_80", "sm_90", "gfx942")}
GROUP = 4  # query heads per KV head of the configurations; their rows are padded to 16 anyway
APPENDED = 8  # tokens of a multi-token append: with GROUP, 32 rows
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Configuration:
    """One kernel as it is launched for a layer of `shape` with `queries` new tokens."""

    kernel: str
    name: str
    shape: LayerShape
    queries: int = 1

    @property
    def launch(self) -> Launch:
        """What the launchers launch."""
        launches = layer_launches(self.shape, self.queries)
        return next(launch for launch in launches if launch.kernel.__name__ == self.kernel)


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel takes: registers and stack bytes (spills) a thread, shared bytes, code bytes."""

    registers: int
    spilled: int
    shared: int
    code: int


def layer_shape(
    storage: str, head_size: int, half: str = "bf16", *, biased: bool = False, capped: bool = False
) -> LayerShape:
    """A layer with one of STORAGE, and heads of one size."""
    dtype = DTYPES[half]
    layout = storage_layout(storage, head_size, torch.bfloat16 if half == "bf16" else torch.float16)
    return LayerShape(
        layout, 2 * GROUP, 2, head_size, head_size, dtype, dtype,
        gathered=layout.k_channels < head_size, biased=biased, capped=capped,
    )  # fmt: skip


def configurations() -> list[Configuration]:
    """All shipped configurations."""
    return [*_decode(), *_append(), *_windows(), *_merges(), *_seals()]


def _decode() -> Iterator[Configuration]:
    for storage in STORAGE:
        for size in HEAD_SIZES if storage in RECIPES else COMMON_SIZES:
            yield pages_configuration(storage, size)
    for half in ("fp16", "fp32"):
        for size in COMMON_SIZES:
            yield pages_configuration("kivi-4", size, half=half)
    yield pages_configuration("think-40-kivi-4", 128, biased=True)
    yield pages_configuration("kivi-4", 256, capped=True)


def _append() -> Iterator[Configuration]:
    for storage, size in (("kivi-4", 64), ("kivi-4", 128), ("kivi-4", 256), ("kivi-2", 64), ("kivi-2", 128)):
        yield pages_configuration(storage, size, queries=APPENDED)


def pages_configuration(
    storage: str,
    head_size: int,
    *,
    queries: int = 1,
    half: str = "bf16",
    biased: bool = False,
    capped: bool = False,
) -> Configuration:
    """`attend_pages` for one storage and head size."""
    extras = [half, *(["bias"] if biased else []), *(["softcap"] if capped else [])]
    name = f"{storage}, head {head_size}, {queries} new, {' '.join(extras)}"
    shape = layer_shape(storage, head_size, half, biased=biased, capped=capped)
    return Configuration("attend_pages", name, shape, queries)


def _windows() -> Iterator[Configuration]:
    for half in ("bf16", "fp16", "fp32"):
        for size in HEAD_SIZES if half == "bf16" else COMMON_SIZES:
            shape = layer_shape("exact", size, half)
            yield Configuration("attend_window", f"head {size}, 1 new, {half}", shape)


def _merges() -> Iterator[Configuration]:
    for size in HEAD_SIZES:
        yield Configuration("merge_parts", f"head {size}", layer_shape("exact", size))


def _seals() -> Iterator[Configuration]:
    for storage in STORAGE:
        for size in (64, 80, 128, 256) if storage in RECIPES else COMMON_SIZES:
            yield Configuration("seal_pages", f"{storage}, head {size}, bf16", layer_shape(storage, size))


def compile_configuration(configuration: Configuration, target: GPUTarget) -> Any:
    """The compiled kernel, as `triton.compile` gives it."""
    with pretended(target):
        return compile_launch(configuration.launch)


def measure(configuration: Configuration, target: GPUTarget) -> Usage:
    """Compile for a target and read registers, spills, shared memory and code size from the binary."""
    return usage(compile_configuration(configuration, target), target)


def usage(compiled: Any, target: GPUTarget) -> Usage:
    """What a compiled kernel uses."""
    shared = int(compiled.metadata.shared)
    if target.backend == "hip":
        text, binary = compiled.asm["amdgcn"], compiled.asm["hsaco"]
        spilled = max(
            _number(r"\.private_segment_fixed_size:\s+(\d+)", text),
            4 * _number(r"\.vgpr_spill_count:\s+(\d+)", text),
            4 * _number(r"\.sgpr_spill_count:\s+(\d+)", text),
        )
        return Usage(_number(r"\.vgpr_count:\s+(\d+)", text), spilled, shared, code_bytes(binary))
    binary = compiled.asm["cubin"]
    report = _resource_usage(binary)
    spilled = _number(r"STACK:(\d+)", report) + _number(r"LOCAL:(\d+)", report)
    return Usage(_number(r"REG:(\d+)", report), spilled, shared, code_bytes(binary))


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise KernelUnavailable(f"the compiler's report has no {pattern!r}; is this version of triton known?")
    return int(found.group(1))


def _resource_usage(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def code_bytes(binary: bytes) -> int:
    """Bytes of machine code in a 64-bit little-endian ELF file (cubin, hsaco): its .text sections."""
    (table,) = struct.unpack_from("<Q", binary, 0x28)
    size, count, names = struct.unpack_from("<HHH", binary, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", binary, table + i * size) for i in range(count)]
    strings = headers[names][4]
    return sum(
        header[5]
        for header in headers
        if binary[strings + header[0] :].split(b"\0", 1)[0].startswith(b".text")
    )
