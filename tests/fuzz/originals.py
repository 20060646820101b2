"""The artifacts that are changed: tiny models whose plans and graphs use all that the format has."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from kvcc.artifact import update_file
from kvcc.compile import compile_model
from kvcc.runtime.kernel_files import KernelEntry, KernelIndex
from tests.compiled import WINDOWS, recipe, tiny_profile
from tests.test_report import verdict
from tests.tiny import tiny_graph, tiny_loaded

GOLDEN = Path(__file__).parent.parent / "golden"
PAGES_OF_16 = "windows: {sinks: 2, recent: 4, page: 16}\n"
RECIPES = [  # architecture, windows, passes
    ("llama", WINDOWS, "\n  - think: {keep_ratio: 0.6, mean_correction: true}\n  - kivi: {group_size: 8}"),
    ("gemma2", WINDOWS, "\n  - transform: {bits: 3}"),  # bases; soft caps, and a layer of sliding windows
    ("mixtral", WINDOWS, "\n  - think: {keep_ratio: 0.5, mode: request}\n  - kivi: {group_size: 8}"),
    ("opt", WINDOWS, "[]"),
    ("qwen3", PAGES_OF_16, "\n  - zipcache: {}"),  # two classes of tokens
    ("gpt_oss", PAGES_OF_16, "\n  - turboquant: {k_bits: 3, v_bits: 2}"),  # levels of normal variables; sinks
    ("llama", "windows: {sinks: 2, recent: 4, page: 8, dtype: half}\n", "\n  - nvfp4: {}"),
    ("gpt_neox", WINDOWS, "\n  - fp8: {}"),
    ("qwen2", PAGES_OF_16, "\n  - oscar: {}"),  # bases and clipped ranges
    ("llama", WINDOWS, "\n  - transform: {bits: 3, joint_heads: 2}"),
]
KERNEL = b"\x7fELF of nothing"


def write_originals(folder: Path, recipes: Sequence[tuple[str, str, str]] = RECIPES) -> list[Path]:
    """An artifact a recipe; the first has all optional files: tokenizer, template, accuracy, a GPU kernel."""
    paths = []
    for number, (name, windows, passes) in enumerate(recipes):
        path = folder / f"{number}-{name}.kvcc"
        chosen = recipe(passes, windows)
        compile_model(tiny_loaded(name), tiny_profile(name), chosen, path, graph=tiny_graph(name))
        paths.append(path)
    tokenizer = (GOLDEN / "tiny.kvcc/tokenizer").iterdir()
    _add(paths[0], {f"tokenizer/{file.name}": file.read_bytes() for file in tokenizer} | _kernel())
    update_file(paths[0], "accuracy.json", json.dumps(verdict()).encode())
    return paths


def write_front(path: Path) -> None:
    """What `kvcc compare -o` writes, for a report."""
    entries = [{"name": f"{name}.kvcc", "bits_per_element": 4.5, "mean_kl": 0.01} for name in "abc"]
    path.write_text(json.dumps({"artifacts": entries}))


def _kernel() -> dict[str, bytes]:
    """A GPU kernel that no GPU would take; it is data for as long as nobody allows that it is used."""
    file = f"sm_90-{hashlib.sha256(KERNEL).hexdigest()[:16]}.cubin"
    entry = KernelEntry(key="0" * 64, name="attend", file=file, results={"shared": 1024})
    index = KernelIndex(target="sm_90", triton="3.9.0", sources="sha256:" + "0" * 64, kernels=(entry,))
    return {f"kernels/{file}": KERNEL, "kernels/sm_90.json": json.dumps(index.model_dump()).encode()}


def _add(path: Path, files: dict[str, bytes]) -> None:
    manifest = json.loads((path / "manifest.json").read_bytes())
    for name, data in files.items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_bytes(data)
        manifest["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest))
