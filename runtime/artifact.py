"""Reading an artifact folder: all of it is checked before any of it is used (see docs/format.md)."""

import hashlib
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError, field_validator
from torch import Tensor, fx

from kvcc.errors import (
    ArtifactDigest,
    ArtifactManifest,
    ArtifactMissing,
    ArtifactPath,
    ArtifactPlan,
    ArtifactTensor,
    ArtifactTruncated,
    ArtifactVersion,
    PlanError,
)
from kvcc.runtime.calibrated import Calibrated
from kvcc.runtime.dry_run import check_shapes
from kvcc.runtime.graph import Program, build_module, parse_graph
from kvcc.runtime.identity import ModelIdentity
from kvcc.runtime.kernel_files import (
    MAX_INDEX_BYTES,
    KernelIndex,
    binary_target,
    check_kernel_files,
    index_target,
    parse_index,
)
from kvcc.runtime.plan import LayerPlan, Plan, parse_plan
from kvcc.runtime.signature import SIGNATURE, check_signature, trusted_keys
from kvcc.runtime.strict_json import first_fault, parse_json
from kvcc.runtime.tensor_file import Header, open_tensors, read_header

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
PLAN, GRAPH, KERNELS = "plan.json", "graph/graph.json", "kernels/kernels.json"
WEIGHTS, TABLES = "weights.safetensors", "tables.safetensors"
ACCURACY, REPORT = "accuracy.json", "report.html"
REQUIRED = (PLAN, GRAPH, KERNELS, WEIGHTS, TABLES)
FOLDERS = ("graph", "kernels", "tokenizer")
MAX_JSON_BYTES = {MANIFEST: 16 << 20, PLAN: 64 << 20, GRAPH: 64 << 20, KERNELS: 1 << 20, ACCURACY: 64 << 20}
MAX_FILES = 4096
MAX_TOKENS = 1 << 24  # of a window or page
_FILE = re.compile(r"tokenizer/[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
TOP_NAMES = {MANIFEST, SIGNATURE, PLAN, WEIGHTS, TABLES, ACCURACY, REPORT, *FOLDERS}

Verify = bool | Literal["sizes"]


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


_Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9 _-]{0,40}$")]


class FileEntry(_Data):
    """What the manifest says of one file."""

    size: NonNegativeInt  # bytes
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Manifest(_Data):
    """manifest.json: what the artifact is, and every file in it."""

    schema_version: Literal[1] = 1
    kvcc_version: str
    torch_version: str
    model: ModelIdentity
    recipe_name: str
    recipe: dict[str, Any]
    passes: tuple[dict[str, Any], ...]  # the log: what each pass did
    licence: str | None
    runtimes: tuple[_Name, ...]  # engines that can run it or its recipe; "torch" is this one
    # Tensors that passes changed, and the model's parameter that each replaces ("": none); older artifacts do not say.
    folded: dict[str, str] | None = None
    calibration: Calibrated | None = None  # of the profile it was compiled with
    files: dict[str, FileEntry]

    @field_validator("recipe")
    @classmethod
    def _names_passes(cls, recipe: dict[str, Any]) -> dict[str, Any]:
        """What reads a recipe counts on its passes, if it has any, being {name: parameters}, one after another."""
        passes = recipe.get("passes", [])
        named = isinstance(passes, list) and all(isinstance(p, dict) and len(p) == 1 for p in passes)
        if not named or not all(isinstance(value, dict) for p in passes for value in p.values()):
            raise ValueError("passes are not a list of one name with parameters each")
        return recipe


@dataclass(frozen=True)
class Artifact:
    """An artifact whose parts are checked and fit together."""

    path: Path
    manifest: Manifest
    plan: Plan
    graph: Program
    weights: Mapping[str, Tensor]  # mapped from the file when on the CPU
    tables: Mapping[str, Tensor]
    accuracy: dict[str, Any] | None
    kernels: Mapping[str, KernelIndex] = field(default_factory=dict)  # GPU binaries carried, by target
    signer: str | None = (
        None  # fingerprint of the trusted key that signed it; None: no signature was asked for
    )


def read_artifact(
    path: str | Path,
    *,
    verify: Verify = True,
    device: torch.device | str = "cpu",
    key: str | Path | None = None,
) -> Artifact:
    """Open and check the artifact folder `path`; weights and tables on `device`.

    verify: True reads every file to check its digest, "sizes" checks sizes, False neither; structure, plan,
    shapes and the graph are always checked. key: a PEM file of Ed25519 public keys, by default the one that
    KVCC_TRUSTED_KEY in the environment names; one of them must have signed the manifest, and every digest is then
    checked. Raises an ArtifactError (one class a kind of fault), DataError for an unusable key file, KernelUnavailable
    for a device that is not there, CapacityError for one too small.
    """
    folder = Path(path)
    trusted = trusted_keys(key)
    data = _manifest_bytes(folder)
    signer = None if trusted is None else check_signature(folder, data, trusted)
    manifest = _parse_manifest(folder, data)
    _check_files(folder, manifest)
    if verify or signer:
        _check_sizes(folder, manifest)
    if (verify is True or signer) and (problems := _wrong_digests(folder, manifest)):
        raise ArtifactDigest(f"{folder}: {problems[0]}; the artifact was altered or damaged: get it again")
    plan = _read_plan(folder, manifest.model)
    _check_calibration(manifest, plan)
    _check_sources(_read_json(folder, KERNELS))
    kernels = _read_indexes(folder, manifest)
    check_tables(read_header(folder / TABLES), plan)
    graph = parse_graph(_read_json(folder, GRAPH))
    weights_header = read_header(folder / WEIGHTS)
    check_graph(graph, weights_header, plan, manifest.model)
    _check_folded(manifest, weights_header)
    target = torch.device(device)
    # Kernels follow these numbers, so they are copied before they are checked: the mapped file may still change.
    tables = {name: table.clone() for name, table in open_tensors(folder / TABLES, target).items()}
    check_table_values(tables, plan)
    weights = open_tensors(folder / WEIGHTS, target)
    accuracy = _read_accuracy(folder, manifest)
    return Artifact(folder, manifest, plan, graph, weights, tables, accuracy, kernels, signer)


def module(artifact: Artifact, device: torch.device | str) -> fx.GraphModule:
    """The graph, to be called with tokens, positions, rows and a cache. On the CPU weights stay mapped."""
    return build_module(artifact.graph, artifact.weights, torch.device(device))


def verify_digests(path: str | Path) -> list[str]:
    """Files that differ from the manifest, one line each. Raises ArtifactError without a usable manifest."""
    folder = Path(path)
    manifest = read_manifest(folder)
    _check_files(folder, manifest)
    return _wrong_digests(folder, manifest)


# --------------------------------------------------------------------------- manifest and files


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder. Raises ArtifactMissing, ArtifactPath, ArtifactVersion or ArtifactManifest."""
    return _parse_manifest(folder, _manifest_bytes(folder))


def _manifest_bytes(folder: Path) -> bytes:
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise ArtifactMissing(f"{folder}: {what}; an artifact is a folder that `kvcc export` wrote")
    if _kind(folder / MANIFEST) is None:
        raise ArtifactMissing(f"{folder}: has no {MANIFEST}, so it is no artifact, or an unfinished one")
    return _read(folder, MANIFEST)


def _parse_manifest(folder: Path, content: bytes) -> Manifest:
    data = _parse_json(folder, MANIFEST, content)
    if not isinstance(data, dict) or "schema_version" not in data:
        raise ArtifactManifest(f"{folder / MANIFEST}: not a manifest: it states no schema_version")
    version = data["schema_version"]
    if version != SCHEMA_VERSION or isinstance(version, bool):
        raise ArtifactVersion(
            f"{folder}: schema version {str(version)[:40]}; this kvcc reads {SCHEMA_VERSION}: use the kvcc "
            "that wrote it, or export again"
        )
    try:
        manifest = Manifest.model_validate(data)
    except ValidationError as error:
        raise ArtifactManifest(f"{folder / MANIFEST}: {first_fault(error)}") from error
    if "torch" not in manifest.runtimes:
        raise ArtifactVersion(
            f"{folder}: made for {', '.join(manifest.runtimes) or 'no runtime'}, not for torch"
        )
    return manifest


def is_file_name(name: str) -> bool:
    """Whether version 1 has a place for a file of this name, relative to the folder, with `/`."""
    if name in (*REQUIRED, ACCURACY, REPORT) or _FILE.fullmatch(name):
        return True
    return index_target(name) is not None or binary_target(name) is not None


def _check_files(folder: Path, manifest: Manifest) -> None:
    """The folder holds the files that the manifest lists and, but for foreign names at the top, no others."""
    if len(manifest.files) > MAX_FILES:
        raise ArtifactManifest(
            f"{folder / MANIFEST}: lists {len(manifest.files)} files; at most {MAX_FILES} are read"
        )
    for name in manifest.files:
        if not is_file_name(name):
            raise ArtifactPath(f"{folder / MANIFEST}: version 1 has no file {name[:200]!r}")
    for name in REQUIRED:
        if name not in manifest.files:
            raise ArtifactManifest(f"{folder / MANIFEST}: does not list {name}")
    found = _list(folder)
    for name in manifest.files:
        if name not in found:
            raise ArtifactMissing(f"{folder / name}: missing, though the manifest lists it")
    for name in sorted(found - set(manifest.files) - {MANIFEST, SIGNATURE}):
        raise ArtifactPath(f"{folder / name}: not listed in the manifest; remove it")


def _list(folder: Path) -> set[str]:
    """Files of the format in the folder. Raises ArtifactPath for links, devices, folders in folders."""
    found = set()
    for top in _entries(folder):
        if top.name not in TOP_NAMES:
            continue
        if top.name not in FOLDERS:
            found.add(_regular(top, top.name))
            continue
        if _kind(top) != "folder":
            raise ArtifactPath(f"{top}: not a folder, or a link")
        found |= {_regular(entry, f"{top.name}/{entry.name}") for entry in _entries(top)}
    return found


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise ArtifactMissing(f"{folder}: {error.strerror or error}") from error


def _regular(path: Path, name: str) -> str:
    if _kind(path) != "file":
        raise ArtifactPath(f"{path}: not a regular file; links and devices are refused")
    return name


def _kind(path: Path) -> str | None:
    """What a path is, without following links."""
    try:
        mode = path.lstat().st_mode
    except OSError:
        return None
    return "file" if stat.S_ISREG(mode) else "folder" if stat.S_ISDIR(mode) else "other"


def _check_sizes(folder: Path, manifest: Manifest) -> None:
    for name, entry in manifest.files.items():
        size = (folder / name).lstat().st_size
        if size != entry.size:
            raise ArtifactTruncated(
                f"{folder / name}: {size:,} bytes, the manifest says {entry.size:,}: an incomplete copy; "
                "get it again"
            )


def _wrong_digests(folder: Path, manifest: Manifest) -> list[str]:
    problems = []
    for name, entry in sorted(manifest.files.items()):
        try:
            with (folder / name).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            problems.append(f"{name}: {error.strerror or error}")
            continue
        if digest != entry.sha256:
            problems.append(f"{name}: sha256 is {digest[:12]}…, the manifest says {entry.sha256[:12]}…")
    return problems


def _read_json(folder: Path, name: str) -> Any:
    return _parse_json(folder, name, _read(folder, name))


def _parse_json(folder: Path, name: str, data: bytes) -> Any:
    return parse_json(data, str(folder / name), ArtifactManifest, json_limit(name))


def _read(folder: Path, name: str) -> bytes:
    """At most one byte more of a JSON file than may be read of it."""
    path = folder / name
    if _kind(path) != "file":
        raise ArtifactPath(f"{path}: not a regular file; links and devices are refused")
    try:
        with path.open("rb") as file:
            return file.read(json_limit(name) + 1)
    except OSError as error:
        raise ArtifactMissing(f"{path}: {error.strerror or error}") from error


def _read_accuracy(folder: Path, manifest: Manifest) -> dict[str, Any] | None:
    if ACCURACY not in manifest.files:
        return None
    data = _read_json(folder, ACCURACY)
    if not isinstance(data, dict):
        raise ArtifactManifest(f"{folder / ACCURACY}: not an object")
    return data


def json_limit(name: str) -> int:
    """The most bytes that are read of a JSON file of this name."""
    return MAX_JSON_BYTES.get(name, MAX_INDEX_BYTES)


def _check_calibration(manifest: Manifest, plan: Plan) -> None:
    keys = manifest.calibration.keys if manifest.calibration else None
    if keys is not None and (
        len(keys) != len(plan.layers)
        or any(found and len(found.kept) != layer.kv_heads for found, layer in zip(keys, plan.layers))
    ):
        raise ArtifactManifest(f"{MANIFEST}: calibration.keys: not of the plan's layers and KV heads")


def _check_folded(manifest: Manifest, weights: Header) -> None:
    for name in manifest.folded or {}:
        if name not in weights:
            raise ArtifactManifest(f"{MANIFEST}: folded: weights.safetensors has no tensor {name[:200]!r}")


def _check_sources(data: Any) -> None:
    if not isinstance(data, dict) or not all(isinstance(value, str) for value in data.values()):
        raise ArtifactManifest(f"{KERNELS}: not an object of source names and digests")


def _read_indexes(folder: Path, manifest: Manifest) -> dict[str, KernelIndex]:
    """The indexes of GPU binaries by target; the binaries themselves are not read."""
    names = {name: target for name in sorted(manifest.files) if (target := index_target(name))}
    indexes = {target: parse_index(_read_json(folder, name), name) for name, target in names.items()}
    check_kernel_files({name: entry.size for name, entry in manifest.files.items()}, indexes.values())
    return indexes


# --------------------------------------------------------------------------- plan, tables, graph


def _read_plan(folder: Path, model: ModelIdentity) -> Plan:
    try:
        plan = parse_plan(_read_json(folder, PLAN))
    except PlanError as error:
        raise ArtifactPlan(f"{folder / PLAN}: {error}") from error
    check_plan(plan, model)
    return plan


def check_plan(plan: Plan, model: ModelIdentity) -> None:
    """Raise ArtifactPlan unless a plan is for this model."""
    if len(plan.layers) != model.layers or plan.dtype != model.dtype:
        raise ArtifactPlan(
            f"plan: {len(plan.layers)} layers of {plan.dtype}; "
            f"{model.name} has {model.layers} of {model.dtype}"
        )
    for index, layer in enumerate(plan.layers):
        # A pass may have joined KV heads: some of them stand side by side as one.
        if layer.q_heads != model.q_heads or model.kv_heads % layer.kv_heads:
            raise ArtifactPlan(
                f"plan: layer {index}: {layer.q_heads} query and {layer.kv_heads} KV heads; {model.name} has "
                f"{model.q_heads} and {model.kv_heads}"
            )
        if max(layer.sinks, layer.recent, layer.page, layer.window, layer.k_dim, layer.v_dim) > MAX_TOKENS:
            raise ArtifactPlan(f"plan: layer {index}: a size is beyond {MAX_TOKENS:,}")


def needed_tables(plan: Plan) -> Header:
    """Names, dtypes and shapes of the tables that a plan needs."""
    needed: Header = {}
    for index, layer in enumerate(plan.layers):
        shape = (layer.kv_heads, layer.k_dim)
        if layer.select == "static":
            needed[f"layers.{index}.k_channels"] = (torch.int64, shape)
        if layer.select == "basis":
            stored = max(head.k.channels for head in layer.heads)
            for name in ("k_basis", "q_basis"):
                needed[f"layers.{index}.{name}"] = (torch.float32, (*shape, stored))
        if layer.mean_correction:
            needed[f"layers.{index}.k_mean"] = (torch.float32, shape)
    return needed


def check_tables(found: Header, plan: Plan) -> None:
    """Raise ArtifactTensor unless there are exactly the tables that the plan needs."""
    _check_same(found, needed_tables(plan), "tables.safetensors", "the plan")


def check_table_values(tables: Mapping[str, Tensor], plan: Plan) -> None:
    """Raise ArtifactTensor unless every channel order is one, and every mean and basis finite."""
    for name, table in tables.items():
        if name.endswith(".k_channels"):
            layer: LayerPlan = plan.layers[int(name.split(".")[1])]
            order = torch.arange(layer.k_dim, device=table.device)
            if not torch.equal(table.sort(-1).values, order.expand_as(table)):
                raise ArtifactTensor(
                    f"tables.safetensors: {name}: a row is no permutation of 0 to {layer.k_dim - 1}"
                )
        elif not bool(table.isfinite().all()):
            raise ArtifactTensor(f"tables.safetensors: {name}: not finite")


def check_graph(graph: Program, weights: Header, plan: Plan, model: ModelIdentity) -> None:
    """Raise ArtifactTensor or ArtifactGraph unless the graph, its weights and the plan fit together."""
    used = graph.weights()
    for name, where in used.items():
        if name not in weights:
            raise ArtifactTensor(f"{where}: weights.safetensors has no tensor {name[:200]!r}")
    for name in weights:
        if name not in used:
            raise ArtifactTensor(f"weights.safetensors: the graph does not use the tensor {name}")
    check_shapes(graph, weights, plan, model.vocab_size)


def _check_same(found: Header, needed: Header, file: str, who: str) -> None:
    for name, (dtype, shape) in needed.items():
        if name not in found:
            raise ArtifactTensor(f"{file}: {who} needs {name}, which is missing")
        if found[name] != (dtype, shape):
            raise ArtifactTensor(
                f"{file}: {name} is {found[name][0]} {list(found[name][1])}; "
                f"{who} needs {dtype} {list(shape)}"
            )
    for name in found:
        if name not in needed:
            raise ArtifactTensor(f"{file}: {who} does not use {name}")
