"""Writing an artifact folder, all or nothing; `kvcc.runtime.artifact` reads it (see docs/format.md)."""

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from kvcc._version import __version__
from kvcc.atomic import locked, remove_abandoned, unfinished
from kvcc.engines import engines
from kvcc.errors import (
    ArtifactDigest,
    ArtifactExists,
    ArtifactManifest,
    ArtifactPath,
    ArtifactUnwritable,
    KernelUnavailable,
)
from kvcc.graph_format import graph_text, write_graph
from kvcc.runtime import artifact as reader
from kvcc.runtime.artifact import FileEntry, Manifest, read_artifact, read_manifest, verify_digests
from kvcc.runtime.calibrated import Calibrated
from kvcc.runtime.graph import parse_graph
from kvcc.runtime.identity import ModelIdentity
from kvcc.runtime.kernel_files import KernelEntry, KernelIndex, binary_target, index_name
from kvcc.runtime.plan import Plan
from kvcc.runtime.signature import SIGNATURE, Signature
from kvcc.runtime.strict_json import parse_json
from kvcc.runtime.tensor_file import DTYPES

_ALIGNMENT = 64  # of the first tensor: mapped weights then start on a cache line
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_RENAME_EXCHANGE, _AT_FDCWD = 2, -100  # of Linux's renameat2


def write_artifact(
    path: str | Path,
    *,
    identity: ModelIdentity,
    plan: Plan,
    module: fx.GraphModule,
    tables: Mapping[str, Tensor],
    recipe: dict[str, Any],
    recipe_name: str,
    passes: list[dict[str, Any]],
    tokenizer_dir: Path | None = None,
    accuracy: dict[str, Any] | None = None,
    report_html: str | None = None,
    licence: str | None = None,
    folded: Mapping[str, str] | None = None,
    calibration: Calibrated | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the artifact folder `path` from a lowered graph, its plan and its tables; gives the path back.

    The folder appears complete or not at all; the same input gives the same bytes. Raises ArtifactExists,
    ArtifactUnwritable (disk full, no permission, …), UnsupportedModel for what a graph file cannot hold, and
    the reader's ArtifactError for parts that do not fit together; nothing is left behind then.
    """
    target = check_target(path, overwrite=overwrite)
    graph, weights = write_graph(module)
    text = graph_text(graph).encode()
    program = parse_graph(_checked(text, reader.GRAPH))
    reader.check_plan(plan, identity)
    reader.check_tables(_header(tables), plan)
    reader.check_table_values(tables, plan)
    reader.check_graph(program, _header(weights), plan, identity)
    contents: dict[str, Iterable[Any]] = {
        reader.PLAN: [_json(plan.model_dump(mode="json"), reader.PLAN)],
        reader.GRAPH: [text],
        reader.KERNELS: [_json(_kernel_digests(), reader.KERNELS)],
        reader.WEIGHTS: _tensor_file(weights),
        reader.TABLES: _tensor_file(tables),
    }
    if accuracy is not None:
        contents[reader.ACCURACY] = [_json(accuracy, reader.ACCURACY)]
    if report_html is not None:
        contents[reader.REPORT] = [report_html.encode()]
    with _replacement(target, overwrite) as folder:
        entries = {name: _write(folder / name, chunks) for name, chunks in contents.items()}
        entries |= _copy_tokenizer(tokenizer_dir, folder)
        manifest = Manifest(
            kvcc_version=__version__,
            torch_version=torch.__version__,
            model=identity,
            recipe_name=recipe_name,
            recipe=recipe,
            passes=tuple(passes),
            licence=licence,
            runtimes=tuple(
                name
                for name, reason in engines(recipe.get("passes", []), folded, plan, program).items()
                if not reason
            ),
            folded=None if folded is None else dict(folded),
            calibration=calibration,
            files=entries,
        )
        _write_manifest(folder, manifest)
    return Path(path)


def update_file(path: str | Path, name: str, data: bytes) -> None:
    """Put accuracy.json or report.html into an artifact, or replace it, and its line in the manifest.

    A reader finds the old artifact or the new one; a signature of the old one goes. Raises ArtifactError when `path` is
    no artifact, `name` is another file, the JSON is not an object, or the folder cannot be written.
    """
    if name not in (reader.ACCURACY, reader.REPORT):
        raise ArtifactPath(f"{name}: only {reader.ACCURACY} and {reader.REPORT} can be added to an artifact")
    if name == reader.ACCURACY and not isinstance(_checked(data, name), dict):
        raise ArtifactManifest(f"{name}: not an object")
    _update(path, {name: data}, [])


def add_kernels(path: str | Path, targets: Sequence[str]) -> dict[str, int]:
    """Compile the kernels that an artifact's decode steps need for GPU targets, and put them into it.

    Kernels that it carries for these targets are replaced. Returns the number of kernels by target. Raises
    KernelUnavailable for an unknown target, without triton, or when a kernel does not compile; ArtifactError when
    `path` is no artifact or cannot be written.
    """
    check_gpu_targets(targets)
    import triton

    from kvcc.kernels.precompiled import compiled_for, sources_digest
    from kvcc.runtime.precompiled import layer_shapes

    artifact = read_artifact(path, verify="sizes")
    shapes = layer_shapes(artifact.plan, artifact.graph)
    contents: dict[str, bytes] = {}
    counts: dict[str, int] = {}
    for target in targets:
        entries = []
        for binary in compiled_for(shapes, target):
            extension = "cubin" if target.startswith("sm_") else "hsaco"
            file = f"{target}-{hashlib.sha256(binary.data).hexdigest()[:16]}.{extension}"
            contents[f"kernels/{file}"] = binary.data
            entries.append(KernelEntry(key=binary.key, name=binary.name, file=file, results=binary.results))
        index = KernelIndex(
            target=target,
            triton=triton.__version__,
            sources=sources_digest(),
            kernels=tuple(sorted(entries, key=lambda entry: (entry.name, entry.key))),
        )
        contents[index_name(target)] = _json(index.model_dump(mode="json"), index_name(target))
        counts[target] = len(entries)
    old = [name for name in artifact.manifest.files if binary_target(name) in targets]
    if len(artifact.manifest.files) - len(old) + len(contents) > reader.MAX_FILES:
        raise KernelUnavailable(
            f"{path}: its layers need so many different kernels that there would be more than {reader.MAX_FILES} "
            "files; compile for fewer targets at a time, or let them be compiled where it runs"
        )
    _update(path, contents, old)
    return counts


def check_gpu_targets(targets: Sequence[str]) -> None:
    """Raise KernelUnavailable unless kernels can be compiled for these targets here; to be called early."""
    if not targets:
        return
    if find_spec("triton") is None:
        raise KernelUnavailable("compiling GPU kernels needs triton; pip install 'kvcc[triton]'")
    from kvcc.kernels.cross_compile import check_can_compile
    from kvcc.kernels.precompiled import known_target

    for target in targets:
        known_target(target)
    check_can_compile()


def put_signature(path: str | Path, sign: Callable[[bytes], Signature]) -> Signature:
    """Put signature.json into an artifact, made by `sign` of its manifest's bytes; replaces an older one.

    Every digest is checked first. Raises ArtifactError.
    """
    with _changed(path) as folder:
        if problems := verify_digests(folder):
            raise ArtifactDigest(f"{path}: {problems[0]}; an altered artifact is not signed: export it again")
        found = sign((folder / reader.MANIFEST).read_bytes())
        _write(folder / SIGNATURE, [f"{found.model_dump_json(indent=1)}\n".encode()])
    return found


def _update(path: str | Path, contents: Mapping[str, bytes], removed: Iterable[str]) -> None:
    """Put files into an artifact, or replace them, take others out, and change its manifest, all or nothing."""
    manifest = read_manifest(Path(path))
    gone = {*contents, *removed}
    with _changed(path) as folder:
        for old in (*gone, reader.MANIFEST):  # unlink: the old folder holds the same file
            (folder / old).unlink(missing_ok=True)
        kept = {name: entry for name, entry in manifest.files.items() if name not in gone}
        new = {name: _write(folder / name, [data]) for name, data in contents.items()}
        _write_manifest(folder, manifest.model_copy(update={"files": kept | new}))


@contextlib.contextmanager
def _changed(path: str | Path) -> Iterator[Path]:
    """An artifact's files, in a folder that takes its place when the block ends well; without a signature."""
    read_manifest(Path(path))
    target = Path(os.path.realpath(path))
    with _replacement(target, overwrite=True) as folder:
        shutil.copytree(target, folder, symlinks=True, copy_function=_link, dirs_exist_ok=True)
        (folder / SIGNATURE).unlink(missing_ok=True)
        yield folder


def check_export(output: Path, marker: str, *, overwrite: bool) -> None:
    """`check_target` for folders of other formats, which `overwrite` may replace: those that hold the file `marker`."""
    if not (overwrite and (output / marker).is_file()):
        check_target(output, overwrite=False)


def check_target(path: str | Path, *, overwrite: bool) -> Path:
    """Where an artifact at `path` would be written, links resolved; to be called before hours of work.

    Raises ArtifactExists when something is there that may not be replaced (with `overwrite` only an artifact
    may), ArtifactUnwritable when the folder around it is missing or read-only.
    """
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise ArtifactUnwritable(f"{path}: the folder {target.parent} does not exist; create it first")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise ArtifactUnwritable(f"{path}: no permission to write in {target.parent}")
    if not target.exists():
        return target
    if not overwrite:
        raise ArtifactExists(f"{path}: exists already; choose another name, or replace it (--force)")
    if not target.is_dir() or (any(target.iterdir()) and not (target / reader.MANIFEST).is_file()):
        raise ArtifactExists(f"{path}: exists and is no artifact; it will not be replaced")
    foreign = sorted(entry.name for entry in target.iterdir() if entry.name not in reader.TOP_NAMES)
    if foreign:
        raise ArtifactExists(
            f"{path}: holds {foreign[0]}, which no artifact has; move it away before replacing"
        )
    return target


# --------------------------------------------------------------------------- contents


def _json(data: Any, name: str) -> bytes:
    try:
        text = json.dumps(data, indent=1, sort_keys=True, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ArtifactManifest(f"{name}: cannot be written as JSON: {error}") from error
    _checked(text.encode(), name)
    return text.encode()


def _checked(data: bytes, name: str) -> Any:
    """Decoded as the reader does it, so that what is written can be read."""
    return parse_json(data, name, ArtifactManifest, reader.json_limit(name))


def _kernel_digests() -> dict[str, str]:
    """Digests of the Triton sources that the numbers in this artifact were made with."""
    sources = [
        f for f in files("kvcc.kernels").iterdir() if f.name.startswith("triton") and f.name.endswith(".py")
    ]
    return {f.name: "sha256:" + hashlib.sha256(f.read_bytes()).hexdigest() for f in sources}


def _header(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def _tensor_file(tensors: Mapping[str, Tensor]) -> Iterator[Any]:
    """A safetensors file piece by piece: wide types first, which aligns all, then by name."""
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {}
    at = 0
    for name in names:
        tensor = tensors[name]
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    yield len(text).to_bytes(8, "little")
    yield text
    for name in names:
        yield tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _copy_tokenizer(source: Path | None, folder: Path) -> dict[str, FileEntry]:
    entries: dict[str, FileEntry] = {}
    for file in sorted(source.iterdir()) if source is not None else ():
        name = f"tokenizer/{file.name}"
        if not reader.is_file_name(name) or not file.is_file():
            raise ArtifactPath(
                f"{file}: the tokenizer folder of an artifact holds plain files with plain names only"
            )
        entries[name] = _write(folder / name, [file.read_bytes()])
    return entries


# --------------------------------------------------------------------------- writing


@contextlib.contextmanager
def _replacement(target: Path, overwrite: bool) -> Iterator[Path]:
    """A new folder beside `target`, which takes its place when the block ends well, and else disappears."""
    folder = unfinished(target)
    remove_abandoned(target)
    try:
        folder.mkdir()
        with locked(folder):
            yield folder
            _sync_folders(folder)
            _install(folder, target, overwrite)
            _sync(target.parent)
    except OSError as error:
        raise _unwritable(target, error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # after an exchange it is the old artifact


def _unwritable(target: Path, error: OSError) -> ArtifactUnwritable:
    advice = {
        errno.ENOSPC: "free some space, or write elsewhere",
        errno.EDQUOT: "free some space, or write elsewhere",
        errno.EACCES: "change the permissions, or write elsewhere",
        errno.EPERM: "change the permissions, or write elsewhere",
        errno.EROFS: "write elsewhere",
    }.get(error.errno or 0, "nothing was written")
    return ArtifactUnwritable(f"{target}: cannot be written: {error.strerror or error}; {advice}")


def _write(path: Path, chunks: Iterable[Any]) -> FileEntry:
    """Write bytes to a new file, to the disk and not just towards it; chunks support the buffer protocol."""
    path.parent.mkdir(exist_ok=True)
    digest, size = hashlib.sha256(), 0
    with path.open("xb") as file:
        for chunk in chunks:
            view = memoryview(chunk).cast("B") if len(chunk) else b""
            file.write(view)
            digest.update(view)
            size += len(view)
        file.flush()
        os.fsync(file.fileno())
    return FileEntry(size=size, sha256=digest.hexdigest())


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    """Written last: a folder without it is no artifact."""
    data = manifest.model_dump(mode="json")
    if manifest.calibration is None:  # readers that do not know the field read artifacts without it
        del data["calibration"]
    _write(folder / reader.MANIFEST, [_json(data, reader.MANIFEST)])


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # a file system without links
        shutil.copy2(source, target, follow_symlinks=False)


def _install(folder: Path, target: Path, overwrite: bool) -> None:
    """Put `folder` in `target`'s place; what was there before lies in `folder` afterwards."""
    if overwrite and target.exists():
        _exchange(folder, target)
        return
    try:
        folder.rename(target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise ArtifactExists(
                f"{target}: appeared while this artifact was written; nothing was changed"
            ) from error
        raise


def _exchange(folder: Path, target: Path) -> None:
    """Swap two folders, in one step where the system can."""
    if _rename_exchange(folder, target):
        return
    aside = folder.with_suffix(".old")
    target.rename(aside)
    try:
        folder.rename(target)
    except OSError:
        aside.rename(target)
        raise
    aside.rename(folder)


def _rename_exchange(first: Path, second: Path) -> bool:
    """Linux's atomic exchange; False where the system or file system has none."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    names = os.fsencode(first), os.fsencode(second)
    if renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(second))


def _sync_folders(folder: Path) -> None:
    for inner in [*(entry for entry in folder.iterdir() if entry.is_dir()), folder]:
        _sync(inner)


def _sync(folder: Path) -> None:
    if os.name != "posix":  # elsewhere folders cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
