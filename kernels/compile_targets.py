"""Cross-compiles the shipped Triton kernels for GPUs that need not be there, and reads what they use.

A configuration is one kernel with the compile-time constants that the launchers in `triton` would give it,
for the storage layouts of the shipped recipes and some of users', and the head sizes of common models.
"""

import re
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvcc.errors import KernelUnavailable
from kvcc.kernels import triton_kernels
from kvcc.kernels.head_classes import PlaneSpec, head_classes, padded
from kvcc.kernels.layout import PageLayout, Plane, Side, page_layout
from kvcc.kernels.triton import page_tiling, seal_tiling, window_tiling

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
HEAD_SIZES = (64, 80, 96, 128, 256)
COMMON_SIZES = (64, 128)  # for what no shipped recipe stores, but a user's may
PAGE_TOKENS = 64
GROUP = 4  # query heads per KV head of the configurations; their rows are padded to 16 anyway
APPENDED = 8  # tokens of a multi-token append: with GROUP, 32 rows

# Storage of K and V: (bits, share of the channels) planes, and the group size wished for.
STORAGE: dict[str, tuple[tuple[tuple[int, float], ...], tuple[tuple[int, float], ...], int]] = {
    "exact": (((16, 1.0),), ((16, 1.0),), 64),
    "think-40": (((16, 0.6),), ((16, 1.0),), 64),
    "kivi-8": (((8, 1.0),), ((8, 1.0),), 64),
    "kivi-4": (((4, 1.0),), ((4, 1.0),), 64),
    "kivi-3": (((3, 1.0),), ((3, 1.0),), 32),
    "kivi-2": (((2, 1.0),), ((2, 1.0),), 32),
    "think-40-kivi-4": (((4, 0.6),), ((4, 1.0),), 64),
    "think-40-kivi-2": (((2, 0.6),), ((2, 1.0),), 32),
    "mixed-4-2": (((4, 0.25), (2, 0.75)), ((2, 1.0),), 32),
}
RECIPES = ("exact", "think-40", "kivi-4", "kivi-2", "think-40-kivi-4", "think-40-kivi-2")


@dataclass(frozen=True)
class Configuration:
    """One kernel to compile: `constants` as for the launchers; integer arguments in `ones` are 1."""

    kernel: str
    name: str
    constants: dict[str, Any]
    warps: int
    stages: int = 2
    fp_fusion: bool = True
    ones: tuple[str, ...] = ()
    half: str = "bf16"  # type of q, and of the window or of what is sealed
    layout: PageLayout | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel takes: registers and stack bytes (spills) a thread, shared bytes, code bytes."""

    registers: int
    spilled: int
    shared: int
    code: int


def storage_layout(storage: str, head_size: int) -> PageLayout:
    """Page of two KV heads under one of STORAGE; groups of V are the widest allowed that divide the head."""
    k, v, wished = STORAGE[storage]
    v_group = max(g for g in range(8, wished + 1, 8) if head_size % g == 0)
    k_side = Side(_planes(k, head_size), "tokens", wished)
    v_side = Side(_planes(v, head_size), "channels", v_group)
    return page_layout(PAGE_TOKENS, (k_side, k_side), (v_side, v_side))


def _planes(shares: tuple[tuple[int, float], ...], head_size: int) -> tuple[Plane, ...]:
    return tuple(Plane(bits, int(share * head_size)) for bits, share in shares)


def configurations() -> list[Configuration]:
    """All shipped configurations."""
    return [*_decode(), *_append(), *_windows(), *_merges(), *_seals()]


def _decode() -> Iterator[Configuration]:
    for storage in STORAGE:
        for size in HEAD_SIZES if storage in RECIPES else COMMON_SIZES:
            yield pages_configuration(storage, size)
    for storage, half in (("kivi-4", "fp16"), ("kivi-4", "fp32")):
        for size in COMMON_SIZES:
            yield pages_configuration(storage, size, half=half)
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
    layout = storage_layout(storage, head_size)
    heads = head_classes(layout)[0]
    dot = tl.float32 if half == "fp32" else tl.float16
    tiling = page_tiling(layout.tokens, heads.k + heads.v, queries * GROUP, dot)
    constants = {
        "K": heads.k, "V": heads.v, "TOKENS": layout.tokens, "TILE": tiling.tokens, "GROUP": GROUP,
        "ROWS": tiling.rows, "HALF": tl.float16, "DOT": dot, "BIASED": biased, "CAPPED": capped,
    }  # fmt: skip
    extras = [half, *(["bias"] if biased else []), *(["softcap"] if capped else [])]
    name = f"{storage}, head {head_size}, {queries} new, {' '.join(extras)}"
    ones = ("n_queries",) if queries == 1 else ()
    return Configuration(
        "attend_pages", name, constants, tiling.warps, tiling.stages, ones=ones, half=half, layout=layout
    )


def _windows() -> Iterator[Configuration]:
    for half in ("bf16", "fp16", "fp32"):
        for size in HEAD_SIZES if half == "bf16" else COMMON_SIZES:
            dot = tl.float32 if half == "fp32" else tl.float16
            width = padded(size)
            tiling = window_tiling(width, GROUP, dot)
            constants = {
                "K_DIM": size, "V_DIM": size, "K_WIDTH": width, "V_WIDTH": width, "TILE": tiling.tokens,
                "GROUP": GROUP, "ROWS": tiling.rows, "DOT": dot, "CAPPED": False,
            }  # fmt: skip
            name = f"head {size}, 1 new, {half}"
            ones = ("n_queries",)
            yield Configuration(
                "attend_window", name, constants, tiling.warps, tiling.stages, ones=ones, half=half
            )


def _merges() -> Iterator[Configuration]:
    for size in HEAD_SIZES:
        yield Configuration("merge_parts", f"head {size}", {"V_DIM": size, "V_WIDTH": padded(size)}, 1)


def _seals() -> Iterator[Configuration]:
    for storage in ("exact", "kivi-8", "kivi-4", "kivi-3", "kivi-2", "think-40-kivi-2"):
        for size in (64, 80, 128) if storage in RECIPES else COMMON_SIZES:
            layout = storage_layout(storage, size)
            heads = head_classes(layout)[0]
            for letter, plane in (("K", heads.k[0]), ("V", heads.v[0])):
                yield _seal(layout, plane, f"{storage} {letter}, head {size}")


def _seal(layout: PageLayout, plane: PlaneSpec, name: str) -> Configuration:
    runs, length = (plane.channels, layout.tokens) if plane.by_tokens else (layout.tokens, plane.channels)
    span, block = seal_tiling(runs, length)
    constants = {
        "PLANE": plane, "RUNS": runs, "LENGTH": length, "SPAN": span, "BLOCK": block, "HALF": tl.float16
    }  # fmt: skip
    ones = ("run_stride",) if plane.by_tokens else ("pos_stride",)
    return Configuration("seal_plane", name, constants, 4, fp_fusion=False, ones=ones, layout=layout)


POINTERS = {
    "bias": "*fp32", "addresses": "*i64", "table": "*i64", "pages": "*i64", "lengths": "*i32",
    "sealed": "*i32", "heads": "*i32", "part_out": "*fp32", "part_lse": "*fp32", "out": "*fp32",
    "lse": "*fp32",
}  # fmt: skip
INPUTS = ("q", "k", "v", "x")  # of the configuration's `half` type
FLOATS = ("scale", "softcap")


def compile_configuration(configuration: Configuration, target: GPUTarget) -> Any:
    """The compiled kernel, as `triton.compile` gives it."""
    kernel = getattr(triton_kernels, configuration.kernel)
    if not hasattr(kernel, "arg_names") or not isinstance(kernel, triton.JITFunction):
        raise KernelUnavailable("kernels cannot be compiled under TRITON_INTERPRET=1; unset it")
    constants = configuration.constants | dict.fromkeys(configuration.ones, 1)
    signature = {name: _type(name, constants, configuration.half) for name in kernel.arg_names}
    # Tensors and their strides are multiples of 16, as the just-in-time compiler would find; counts are not.
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or (kind == "i32" and name.endswith("stride") and name != "table_stride")
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {
        "num_warps": configuration.warps,
        "num_stages": configuration.stages,
        "enable_fp_fusion": configuration.fp_fusion,
    }
    return triton.compile(source, target=target, options=options)


def _type(name: str, constants: dict[str, Any], half: str) -> str:
    if name in constants:
        return "constexpr"
    if name in INPUTS:
        return f"*{half}"
    return POINTERS.get(name, "fp32" if name in FLOATS else "i32")


def measure(configuration: Configuration, target: GPUTarget) -> Usage:
    """Compile for a target and read registers, spills, shared memory and code size from the binary."""
    compiled = compile_configuration(configuration, target)
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


@lru_cache
def bytes_per_token(storage: str, head_size: int) -> float:
    """Bytes of pages that decoding reads per cached token and KV head, metadata and alignment included."""
    layout = storage_layout(storage, head_size)
    return layout.nbytes / layout.tokens / layout.kv_heads


def operations_per_token(storage: str, head_size: int, group: int) -> float:
    """Floating-point operations per cached token and KV head.

    2 a stored element to dequantise it, 2 more for each query head in the product that uses it, and about 6 a
    query head for the softmax.
    """
    heads = head_classes(storage_layout(storage, head_size))[0]
    dequantise = sum(2 * p.channels for p in heads.k + heads.v if p.bits < 16)
    products = 2 * group * sum(p.channels for p in heads.k + heads.v)
    return dequantise + products + 6 * group
