"""ONNX graphs with the compressed cache as inputs and outputs, for stock ONNX Runtime: see docs/onnx.md.

A folder of three graphs over one file of weights: `prefill.onnx` takes prompts, `decode.onnx` one token a sequence,
`seal.onnx` makes a page of tokens that leave the recent window.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from kvcc._version import __version__
from kvcc.artifact import check_export
from kvcc.errors import ArtifactUnwritable, KernelUnavailable, PlanError
from kvcc.exchange.onnx_support import why_not
from kvcc.runtime.artifact import Artifact

if TYPE_CHECKING:
    import onnx_ir

GRAPHS = ("prefill", "decode", "seal")
WEIGHTS, DESCRIPTION = "weights.bin", "kvcc_onnx.json"
VERSION = 1
INLINE_BYTES = 1024  # tensors up to this size stay in the graphs
ALIGNMENT = 4096  # of larger ones in the file of weights: a page of memory


def check_onnx() -> None:
    """Raises KernelUnavailable where the packages that make ONNX graphs are missing."""
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise KernelUnavailable(f"--format onnx needs {' and '.join(missing)}: pip install 'kvcc[onnx]'")


def write_onnx(
    artifact: Artifact,
    output: Path,
    *,
    overwrite: bool = False,
    attention: Literal["standard", "gqa"] = "standard",
) -> dict[str, Any]:
    """Lower an artifact to ONNX and write the folder `output`; gives what its kvcc_onnx.json says.

    attention "gqa": ONNX Runtime's GroupQueryAttention with its own INT8 cache, of all tokens; see onnx_gqa.py.
    Raises PlanError for what ONNX cannot express, KernelUnavailable without the onnx packages, ArtifactExists and
    ArtifactUnwritable.
    """
    if reason := why_not(artifact.plan, artifact.graph):
        raise PlanError(f"{artifact.manifest.model.name} cannot be lowered to ONNX: {reason}")
    check_onnx()
    check_export(output, DESCRIPTION, overwrite=overwrite)
    graphs, described = _standard(artifact) if attention == "standard" else _gqa(artifact)
    description = _header(artifact, attention) | described
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        with _Weights(partial / WEIGHTS) as weights:
            for name, model in graphs:
                weights.write(model, partial / f"{name}.onnx")
        if (artifact.path / "tokenizer").is_dir():
            shutil.copytree(artifact.path / "tokenizer", partial / "tokenizer")
        (partial / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n")
        shutil.rmtree(output, ignore_errors=True)
        partial.rename(output)
    except OSError as error:
        raise ArtifactUnwritable(f"{output} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return description


Graphs = Iterator[tuple[str, "onnx_ir.Model"]]  # made one after another


def _standard(artifact: Artifact) -> tuple[Graphs, dict[str, Any]]:
    """Graphs of standard operators, and what is said of their cache: where tokens lie, and every state."""
    from kvcc.exchange.onnx_attention import translations
    from kvcc.exchange.onnx_graphs import layers_of, name_of, onnx_model, state_shape, states, traced

    layers = layers_of(artifact)
    plan, table = layers[0].plan, translations(layers)
    described = []
    for state in states(layers):
        dtype, shape = state_shape(state, layers[state[1]])
        described.append(
            {
                "name": name_of(state, "")[1:],
                "layer": state[1],
                "segment": "window" if state[0].startswith("window") else "pages",
                "dtype": str(dtype).removeprefix("torch."),
                "shape": list(shape),
            }
        )
    graphs = ((name, onnx_model(traced(artifact, layers, name), table)) for name in GRAPHS)
    return graphs, {
        "sinks": plan.sinks,
        "recent": plan.recent,
        "page": plan.page,
        "bytes_per_token": sum(layer.pages.nbytes for layer in layers) / plan.page,
        "states": described,
    }


def _gqa(artifact: Artifact) -> tuple[Graphs, dict[str, Any]]:
    """The graph of GroupQueryAttention, and what is said of its cache. Raises PlanError where it cannot be it."""
    from kvcc.exchange.onnx_gqa import gqa_states, traced_step, why_not_gqa
    from kvcc.exchange.onnx_graphs import onnx_model

    if reason := why_not_gqa(artifact):
        raise PlanError(f"{artifact.manifest.model.name} cannot be lowered to ONNX: {reason}")
    states = [
        {"name": name, "layer": int(name.split(".")[0]), "segment": "tokens", "dtype": "int8", "shape": shape}
        for name, shape in gqa_states(artifact).items()
    ]
    stored = sum(layer.exact_elements for layer in artifact.plan.layers)
    graphs = (("step", onnx_model(traced_step(artifact), {})) for _ in range(1))
    return graphs, {"bytes_per_token": stored, "states": states}


def _header(artifact: Artifact, attention: str) -> dict[str, Any]:
    """What is said of every folder: its version, and the model."""
    from kvcc.exchange.onnx_graphs import OPSET

    model = artifact.manifest.model
    return {
        "version": VERSION,
        "kvcc_version": __version__,
        "opset": OPSET,
        "attention": attention,
        "recipe": artifact.manifest.recipe_name,
        "model": {
            key: getattr(model, key)
            for key in ("name", "layers", "vocab_size", "context_length", "bos_token_id", "eos_token_ids")
        },
    }


class _Weights:
    """One file of the tensors of several graphs, each stored once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._places: dict[bytes, tuple[int, int]] = {}  # digest: offset, bytes

    def __enter__(self) -> "_Weights":
        self._file: BinaryIO = self._path.open("wb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def write(self, model: "onnx_ir.Model", path: Path) -> None:
        """Write a graph to `path`, its larger tensors to the file of weights."""
        import onnx_ir

        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is None or tensor.nbytes <= INLINE_BYTES:
                continue
            offset, length = self._place(tensor.tobytes())
            value.const_value = onnx_ir.ExternalTensor(
                *(self._path.name, offset, length, tensor.dtype),
                shape=onnx_ir.Shape(tensor.shape),
                name=str(value.name),
                base_dir=str(self._path.parent),
            )
        onnx_ir.save(model, path)

    def _place(self, data: bytes) -> tuple[int, int]:
        digest = hashlib.sha256(data).digest()
        if digest not in self._places:
            self._file.write(bytes(-self._file.tell() % ALIGNMENT))
            self._places[digest] = self._file.tell(), len(data)
            self._file.write(data)
        return self._places[digest]
