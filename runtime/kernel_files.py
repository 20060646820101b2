"""The GPU kernels that an artifact may carry: for each target an index, and the binaries that it names.

Reading them runs nothing. Whether they are used is the caller's decision: see `kvcc.runtime.precompiled`.
"""

import re
from collections.abc import Iterable, Mapping
from keyword import iskeyword
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from kvcc.errors import ArtifactManifest
from kvcc.runtime.strict_json import first_fault

_TARGET = r"(sm_[0-9]{2,3}|gfx[0-9a-f]{3,4})"
_INDEX = re.compile(rf"kernels/{_TARGET}\.json")
_BINARY = re.compile(rf"kernels/{_TARGET}-[0-9a-f]{{16}}\.(cubin|hsaco)")
_FIELD = re.compile(r"[a-z][a-z0-9_]{0,63}")
_DIGEST = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
MAX_INDEX_BYTES = 4 << 20
MAX_BINARY_BYTES = 16 << 20


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class KernelEntry(_Data):
    """One binary: the key of what it was compiled from, its function, its file in kernels/, what launching needs."""

    key: _DIGEST
    name: Annotated[str, Field(pattern=r"^[a-z_][a-z0-9_]{0,63}$")]
    file: str
    results: dict[str, Any]

    @field_validator("results")
    @classmethod
    def _plain_names(cls, results: dict[str, Any]) -> dict[str, Any]:
        for name in results:
            if not _FIELD.fullmatch(name) or iskeyword(name):
                raise ValueError(f"{name[:40]!r} is no name of a result")
        return results


class KernelIndex(_Data):
    """kernels/TARGET.json: with which Triton, and from which kernel sources, a target's binaries were compiled."""

    version: Literal[1] = 1
    target: str
    triton: str
    sources: Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
    kernels: tuple[KernelEntry, ...]


def index_target(name: str) -> str | None:
    """The target whose index a file of this name is; None for other files."""
    found = _INDEX.fullmatch(name)
    return found.group(1) if found else None


def binary_target(name: str) -> str | None:
    """The target that a file of this name is a binary for; None for other files."""
    found = _BINARY.fullmatch(name)
    return found.group(1) if found else None


def index_name(target: str) -> str:
    """The file name of a target's index."""
    return f"kernels/{target}.json"


def parse_index(data: Any, name: str) -> KernelIndex:
    """An index from decoded JSON. Raises ArtifactManifest."""
    try:
        index = KernelIndex.model_validate(data)
    except ValidationError as error:
        raise ArtifactManifest(f"{name}: {first_fault(error)}") from error
    if index_name(index.target) != name:
        raise ArtifactManifest(f"{name}: says that it is for {index.target[:40]!r}")
    return index


def check_kernel_files(sizes: Mapping[str, int], indexes: Iterable[KernelIndex]) -> None:
    """Raise ArtifactManifest unless the indexes name exactly the binaries among the files, by name and size."""
    named = set()
    for index in indexes:
        where = index_name(index.target)
        if len({entry.key for entry in index.kernels}) != len(index.kernels):
            raise ArtifactManifest(f"{where}: a key stands twice")
        for entry in index.kernels:
            file = f"kernels/{entry.file}"
            if binary_target(file) != index.target or file not in sizes:
                raise ArtifactManifest(f"{where}: {entry.file[:200]!r} is no listed binary of this target")
            if sizes[file] > MAX_BINARY_BYTES:
                raise ArtifactManifest(
                    f"{file}: {sizes[file]:,} bytes; at most {MAX_BINARY_BYTES:,} are read"
                )
            named.add(file)
    for file in sizes:
        if binary_target(file) and file not in named:
            raise ArtifactManifest(f"{file}: no index names it")
