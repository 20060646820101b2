"""Compiles recorded launches for a GPU that need not be there, exactly as the just-in-time compiler would on it."""

import itertools
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from kvcc.errors import KernelUnavailable
from kvcc.kernels import triton_kernels
from kvcc.kernels.triton import Launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}
KERNELS = ("attend_pages", "attend_window", "merge_parts", "seal_pages")

_serial = itertools.count()
_pretending = threading.RLock()  # Triton's driver and hooks are the process's


def target_name(target: GPUTarget) -> str:
    """ "sm_90", "gfx942": what `TARGETS` calls a target, also one that is not in it."""
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)


class _Pretended:
    """The part of a Triton driver that compiling asks."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target
        self.device = f"pretended {target_name(target)} {next(_serial)}"

    def get_current_device(self) -> str:
        return self.device

    def get_current_stream(self, _device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target


def check_can_compile() -> None:
    """Raise KernelUnavailable under Triton's interpreter, which compiles nothing."""
    if not isinstance(triton_kernels.attend_pages, triton.JITFunction):
        raise KernelUnavailable("kernels cannot be compiled under TRITON_INTERPRET=1; unset it")


@contextmanager
def pretended(target: GPUTarget) -> Iterator[None]:
    """Make Triton believe, in this context, that the current device is a `target`; nothing can be launched on it.

    Raises KernelUnavailable under the interpreter, which compiles nothing.
    """
    check_can_compile()
    with _pretending:
        try:
            before = driver.active
        except RuntimeError:  # no GPU
            before = None
        mine = _Pretended(target)
        driver.set_active(mine)
        try:
            yield
        finally:
            driver.set_active(before)
            for name in KERNELS:
                getattr(triton_kernels, name).device_caches.pop(mine.device, None)


def compile_launch(launch: Launch) -> Any:
    """The kernel compiled for the current device, really there or pretended; as `triton.compile` gives it."""
    return launch.kernel.warmup(*launch.arguments, grid=(1,), **launch.constants)


def specialisation(hook_arguments: dict[str, Any]) -> dict[str, Any]:
    """What Triton's `jit_cache_hook` says that it will compile: name, signature, constants, attributes, options,
    target. Paths of this machine are left out."""
    found: dict[str, Any] = json.loads(hook_arguments["compile"]["specialization_data"])
    del found["key"]
    found["options"] = {key: value for key, value in found["options"].items() if key != "extern_libs"}
    return found


@contextmanager
def compile_hook(hook: Any) -> Iterator[None]:
    """Call `hook` with what this thread is about to compile, in this context; when it returns True, nothing is."""
    with _pretending:
        before, mine = knobs.runtime.jit_cache_hook, threading.get_ident()

        def in_this_thread(**said: Any) -> Any:
            if threading.get_ident() == mine:
                return hook(**said)
            return before(**said) if before else False

        knobs.runtime.jit_cache_hook = in_this_thread
        try:
            yield
        finally:
            knobs.runtime.jit_cache_hook = before
