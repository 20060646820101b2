"""Kernels compiled on one machine for the GPU of another: packed for an artifact, and given to Triton there.

An index says for one target which Triton and which kernel sources the binaries come from. A binary's key is a digest
over these two and over all that Triton's compiler is told (signature, constants, options, target), so that a key that
is found is the kernel that would be compiled. GPU binaries are code: load them from makers you trust only.
"""

import hashlib
import json
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.cache import FileCacheManager

from kvcc.errors import KernelUnavailable
from kvcc.kernels import triton_kernels
from kvcc.kernels.cross_compile import (
    TARGETS,
    compile_hook,
    compile_launch,
    pretended,
    specialisation,
    target_name,
)
from kvcc.kernels.layer_launches import LayerShape, layer_launches
from kvcc.kernels.triton import Launch

BINARY = {"cuda": "cubin", "hip": "hsaco"}


@dataclass(frozen=True)
class Binary:
    """A compiled kernel: `results` is what launching it needs besides what was asked of the compiler."""

    key: str
    name: str
    data: bytes
    results: dict[str, Any]  # plain JSON


@lru_cache
def sources_digest() -> str:
    """Of the kernels' source file: "sha256:…"."""
    return "sha256:" + hashlib.sha256(Path(triton_kernels.__file__).read_bytes()).hexdigest()


def known_target(name: str) -> GPUTarget:
    """The target called `name`. Raises KernelUnavailable for an unknown one, with those that are known."""
    if name not in TARGETS:
        raise KernelUnavailable(f"GPU target {name!r} is unknown; use one of {', '.join(TARGETS)}")
    return TARGETS[name]


def compiled_for(shapes: Iterable[LayerShape], name: str) -> list[Binary]:
    """The kernels with which layers of these shapes decode on target `name`, each once.

    Raises KernelUnavailable when the target is unknown, or a kernel does not compile for it.
    """
    target, found = known_target(name), {}
    with pretended(target), knobs.compilation.scope():
        knobs.compilation.disable_line_info = True  # smaller, and it would name folders of this machine
        for launch in _launches(shapes):
            asked: list[dict[str, Any]] = []
            with compile_hook(lambda asked=asked, **said: asked.append(specialisation(said)) or False):
                try:
                    kernel = compile_launch(launch)
                except Exception as error:  # whatever the compiler or its assembler raises
                    first = str(error).strip().splitlines() or [type(error).__name__]
                    raise KernelUnavailable(
                        f"{launch.kernel.__name__} for {name}: {first[0][:300]}"
                    ) from error
            if asked:  # else it was compiled for another layer
                binary = _binary(kernel, asked[0], target)
                found[binary.key] = binary
    return list(found.values())


def _binary(kernel: Any, asked: dict[str, Any], target: GPUTarget) -> Binary:
    metadata = json.loads(json.dumps(kernel.metadata._asdict(), default=vars))
    given = asked["options"].keys() | {"extern_libs", "target", "hash", "triton_version"}
    changed = {key for key, value in asked["options"].items() if metadata[key] != value}
    results = {  # names in capitals are variables of this machine's environment
        key: value
        for key, value in metadata.items()
        if (key not in given or key in changed) and not key.isupper()
    }
    return Binary(_key(asked), kernel.metadata.name, kernel.asm[BINARY[target.backend]], results)


def launch_key(launch: Launch, target: GPUTarget) -> str:
    """The key of what a launch would be compiled to; nothing is compiled."""
    asked: dict[str, Any] = {}

    def no_more(**said: Any) -> bool:
        asked.update(specialisation(said))
        return True

    with pretended(target), compile_hook(no_more):
        compile_launch(launch)
    return _key(asked)


def _key(asked: dict[str, Any]) -> str:
    text = json.dumps([sources_digest(), triton.__version__, asked], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _launches(shapes: Iterable[LayerShape]) -> Iterator[Launch]:
    for shape in dict.fromkeys(shapes):
        yield from layer_launches(shape)


# ---- loading


def current_target() -> str:
    """The name of the current GPU's target."""
    return target_name(driver.active.get_current_target())


def preload(shapes: Iterable[LayerShape], binaries: Mapping[str, Binary]) -> tuple[int, int]:
    """Give Triton, in this process and for the current device only, the binaries that layers of these shapes need.

    `binaries` by key. Returns how many kernels came from them, and how many will be compiled at their first use.
    Nothing is written to Triton's cache on disk.
    """
    offer = _Offer(binaries)
    with offer.open(), compile_hook(offer.hook):
        for launch in _launches(shapes):
            compile_launch(launch)
    return offer.used, offer.missing


class _Offer:
    """Answers Triton's compiler from `binaries`: its hook says what is wanted, its cache is asked for it next."""

    def __init__(self, binaries: Mapping[str, Binary]) -> None:
        self.binaries = binaries
        self.used = self.missing = 0
        self._group: dict[str, str] | None = None  # of the kernel wanted now: file name -> path

    def hook(self, **said: Any) -> bool:
        """Whether to leave the kernel alone: when it is not offered."""
        asked = specialisation(said)
        binary = self.binaries.get(_key(asked))
        if binary is None:
            self.missing += 1
            return True
        options = json.loads(said["compile"]["specialization_data"])["options"]
        self._group = self._write(binary, asked, options)
        self.used += 1
        return False

    def _write(self, binary: Binary, asked: dict[str, Any], options: dict[str, Any]) -> dict[str, str]:
        """The files that Triton's cache would hold; everything but the results is of this machine."""
        kernel = asked["name"].rpartition(".")[2]
        facts = {"hash": binary.key, "target": asked["target"], "triton_version": triton.__version__}
        metadata = {**options, **binary.results, **facts}
        extension = BINARY[asked["target"]["backend"]]
        files = {f"{kernel}.{extension}": binary.data, f"{kernel}.json": json.dumps(metadata).encode()}
        group = {}
        for name, data in files.items():
            path = self._folder / f"{self.used}-{name}"
            path.write_bytes(data)
            group[name] = str(path)
        return group

    @contextmanager
    def open(self) -> Iterator[None]:
        """Let Triton's cache find what is offered, in this context; CompiledKernel reads the files at once."""
        with tempfile.TemporaryDirectory(prefix="kvcc-kernels-") as folder, knobs.cache.scope():
            self._folder = Path(folder)
            knobs.cache.manager_class = self._manager(knobs.cache.manager_class or FileCacheManager)
            yield

    def _manager(self, usual: type) -> type:
        mine = threading.get_ident()

        def get_group(manager: Any, filename: str) -> dict[str, str] | None:
            if threading.get_ident() == mine and self._group is not None and filename in self._group:
                group, self._group = self._group, None
                return group
            found: dict[str, str] | None = usual.get_group(manager, filename)  # type: ignore[attr-defined]
            return found

        return type("OfferedCacheManager", (usual,), {"get_group": get_group})
