"""GPU kernels in an artifact: compiled at export, checked when read, used when allowed and when they match."""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import torch

pytest.importorskip("triton")

from click.testing import CliRunner, Result
from triton import knobs
from triton.compiler.compiler import ASTSource

from kvcc.artifact import add_kernels, update_file, write_artifact
from kvcc.cli import cli
from kvcc.errors import ArtifactDigest, ArtifactError, ArtifactManifest, ArtifactPath, KernelUnavailable
from kvcc.kernels import cross_compile, precompiled, triton, triton_kernels
from kvcc.kernels.cross_compile import TARGETS, compile_hook, compile_launch, pretended
from kvcc.kernels.layer_launches import layer_launches
from kvcc.kernels.protocol import Backend
from kvcc.runtime import load
from kvcc.runtime.artifact import Artifact, read_artifact, verify_digests
from kvcc.runtime.precompiled import _use, layer_shapes, use_precompiled
from tests.compiled import compiled, recipe, runnable, tokens
from tests.saved import save_tiny_llama
from tests.tiny import tiny_graph

PASSES = "\n  - think: {keep_ratio: 0.6, mean_correction: true}\n  - kivi: {group_size: 8}"
CARRIED = ("sm_90", "gfx942")


def _write(path: Path) -> Path:
    found = compiled("llama", recipe(PASSES))
    return write_artifact(
        path, identity=tiny_graph("llama").model, plan=found.plan, module=found.module, tables=found.tables,
        recipe={"name": "test", "summary": "of a test"}, recipe_name="test", passes=[],
    )  # fmt: skip


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = _write(tmp_path_factory.mktemp("original") / "a.kvcc")
    counts = add_kernels(path, CARRIED)
    assert set(counts) == set(CARRIED)
    assert min(counts.values()) >= 4
    return path


@pytest.fixture
def artifact(original: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(original, tmp_path / "a.kvcc"))


def _edit_index(path: Path, change: Callable[[Any], Any], target: str = "sm_90") -> None:
    """Change an index in place, and the manifest with it."""
    file = path / f"kernels/{target}.json"
    index = json.loads(file.read_bytes())
    change(index)
    _put(path, f"kernels/{target}.json", json.dumps(index).encode())


def _put(path: Path, name: str, data: bytes) -> None:
    (path / name).write_bytes(data)
    manifest = json.loads((path / "manifest.json").read_bytes())
    manifest["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest))


def _binary(path: Path, target: str = "sm_90", name: str = "attend_pages") -> Path:
    index = read_artifact(path).kernels[target]
    return path / "kernels" / next(entry.file for entry in index.kernels if entry.name == name)


@contextmanager
def _no_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Anything that reaches Triton's front end fails."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the compiler was called")

    with monkeypatch.context() as patch:
        patch.setattr(ASTSource, "make_ir", refuse)
        yield


def _files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


# ---- from export to the launch


@pytest.mark.parametrize("target", CARRIED)
def test_triton_takes_the_binaries_instead_of_compiling(
    original: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    target: str,
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # empty: it cannot come from there
    caplog.set_level(logging.INFO, "kvcc")
    artifact = read_artifact(original)
    index = artifact.kernels[target]
    with pretended(TARGETS[target]), _no_compiler(monkeypatch):
        assert _use(artifact, allowed=True) == len(index.kernels)
        data = {(original / "kernels" / entry.file).read_bytes() for entry in index.kernels}
        for shape in layer_shapes(artifact.plan, artifact.graph):
            for launch in layer_launches(shape):
                kernel = compile_launch(launch)  # what a launch on the device would take
                assert kernel.kernel in data
                assert kernel.name == launch.kernel.__name__
                assert kernel.metadata.num_warps == launch.constants["num_warps"]
                assert kernel.metadata.target == TARGETS[target]
        assert _use(artifact, allowed=True) == 0
    assert [r.getMessage() for r in caplog.records] == [
        f"using {len(index.kernels)} precompiled kernels for {target}",
        f"this process holds all kernels for {target} already",
    ]
    assert _files_in(tmp_path) == []  # nothing of the artifact's stays in Triton's cache
    assert knobs.runtime.jit_cache_hook is None
    assert knobs.cache.manager_class is None


def test_without_binaries_the_compiler_would_be_called(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    artifact = read_artifact(original)
    launch = layer_launches(layer_shapes(artifact.plan, artifact.graph)[0])[0]
    with (
        pretended(TARGETS["sm_90"]),
        _no_compiler(monkeypatch),
        pytest.raises(AssertionError, match="compiler was called"),
    ):
        compile_launch(launch)


def test_metadata_of_binaries_are_those_of_compiled_kernels(original: Path) -> None:
    artifact = read_artifact(original)
    shapes = layer_shapes(artifact.plan, artifact.graph)
    for target in CARRIED:
        with pretended(TARGETS[target]):
            fresh = [compile_launch(launch) for launch in layer_launches(shapes[0])]
        with pretended(TARGETS[target]):
            _use(artifact, allowed=True)
            taken = [compile_launch(launch) for launch in layer_launches(shapes[0])]
        for one, other in zip(fresh, taken, strict=True):
            mine, its = (dict(kernel.metadata._asdict()) for kernel in (one, other))
            assert mine.pop("hash") != its.pop("hash")
            # Triton's cache is shared by environments and keeps the path of the one that filled it.
            for metadata in (mine, its):
                metadata["extern_libs"] = [(name, Path(path).name) for name, path in metadata["extern_libs"]]
            assert mine == its


LAYERS: dict[str, tuple[str, str]] = {
    "uniform": ("llama", "\n  - kivi: {group_size: 8}"),
    "static channels, mean": ("llama", PASSES),
    "channels of the request": ("qwen3", "\n  - think: {mode: request}\n  - kivi: {group_size: 8}"),
    "folded": ("llama", "\n  - think: {mode: fold}\n  - kivi: {group_size: 8}"),
    "exact pages": ("phi3", "[]"),
    "softcap, sliding window": ("gemma2", "\n  - kivi: {group_size: 8, k_bits: 2, v_bits: 2}"),
    "sinks": ("gpt_oss", "\n  - kivi: {group_size: 8}"),
    "bases, page means": ("llama", "\n  - transform: {bits: 3}"),
    "bases of several heads": ("llama", "\n  - transform: {bits: 3, joint_heads: 2}"),
    "one head a group": ("gpt_neox", "\n  - kivi: {group_size: 8}"),
}


def _asked(launches: list[triton.Launch]) -> set[str]:
    """What Triton would be told to compile for some launches."""
    found: list[dict[str, Any]] = []
    with compile_hook(lambda **said: found.append(cross_compile.specialisation(said)) or True):
        for launch in launches:
            compile_launch(launch)
    return {json.dumps(asked, sort_keys=True) for asked in found}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("case", LAYERS)
def test_decode_steps_launch_what_was_foreseen(case: str, batch: int) -> None:
    """The runtime's own decode steps, with launches written down, against what the plan alone predicts."""
    name, passes = LAYERS[case]
    model = runnable(name, recipe(passes), cast(Backend, triton))
    found = compiled(name, recipe(passes))
    nodes = found.module.graph.nodes
    caps = {n.kwargs["layer"]: n.kwargs["softcap"] for n in nodes if "softcap" in n.kwargs}
    prompts = tokens(*range(30, 30 + batch))
    cache = model.new_cache(batch)
    with triton.recorded() as launches:
        model.forward(prompts, cache)
        launches.clear()
        for step in range(12):  # more than a page
            model.forward([[step]] * batch, cache)
    program = type("Program", (), {"nodes": [_node(layer, cap) for layer, cap in caps.items()]})()
    foreseen = [x for shape in layer_shapes(model.plan, program) for x in layer_launches(shape)]
    for target in ("sm_90", "gfx942"):
        with pretended(TARGETS[target]):
            real = _asked(launches)
        with pretended(TARGETS[target]):
            assert real == _asked(foreseen)


def _node(layer: int, softcap: float) -> Any:
    kwargs = {"layer": layer, "softcap": softcap}
    return type("Node", (), {"op": "kvcc.cached_attention", "kwargs": kwargs})()


@pytest.mark.parametrize("kernel", cross_compile.KERNELS)
def test_values_of_arguments_compile_nothing_anew(kernel: str) -> None:
    """Nothing is compiled in the middle of a sequence because a count became 1 or a multiple of 16."""
    for parameter in getattr(triton_kernels, kernel).params:
        assert parameter.is_constexpr or parameter.do_not_specialize, parameter.name


# ---- what is carried


def test_what_an_artifact_carries(original: Path, tmp_path: Path) -> None:
    artifact = read_artifact(original)
    assert set(artifact.kernels) == set(CARRIED)
    assert verify_digests(original) == []
    names = {entry.name for entry in artifact.kernels["sm_90"].kernels}
    assert names == {"attend_pages", "attend_window", "merge_parts", "seal_pages"}
    for file in (original / "kernels").iterdir():
        data = file.read_bytes()
        for private in (Path(__file__).parents[1], Path(knobs.__file__).parent, Path.home()):
            assert str(private).encode() not in data, file.name
        assert file.suffix == ".json" or b"triton_kernels.py" not in data
    for entry in artifact.kernels["sm_90"].kernels:
        data = (original / "kernels" / entry.file).read_bytes()
        assert data[:4] == b"\x7fELF"
        assert entry.file == f"sm_90-{hashlib.sha256(data).hexdigest()[:16]}.cubin"
    again = _write(tmp_path / "b.kvcc")
    add_kernels(again, CARRIED)
    mine, its = (
        sorted((p.name, p.read_bytes()) for p in (x / "kernels").iterdir()) for x in (original, again)
    )
    assert mine == its


def test_adding_again_replaces_and_other_updates_keep(artifact: Path) -> None:
    before = sorted(p.name for p in (artifact / "kernels").iterdir())
    stray = b"\x7fELF old"
    name = f"sm_90-{hashlib.sha256(stray).hexdigest()[:16]}.cubin"
    _put(artifact, f"kernels/{name}", stray)
    _edit_index(artifact, lambda d: d["kernels"].append({**d["kernels"][0], "key": "0" * 64, "file": name}))
    assert name in [entry.file for entry in read_artifact(artifact).kernels["sm_90"].kernels]
    add_kernels(artifact, ["sm_90"])
    assert sorted(p.name for p in (artifact / "kernels").iterdir()) == before
    update_file(artifact, "report.html", b"<p>")
    assert set(read_artifact(artifact).kernels) == set(CARRIED)


@pytest.mark.slow
@pytest.mark.parametrize("target", sorted(set(TARGETS) - set(CARRIED)))
def test_every_known_target_compiles(target: str) -> None:
    shape = layer_shapes(*_parts())[0]
    assert len(precompiled.compiled_for([shape], target)) == 4


def _parts() -> tuple[Any, Any]:
    found = compiled("llama", recipe(PASSES))
    nodes = [_node(layer, 0.0) for layer in range(len(found.plan.layers))]
    return found.plan, type("Program", (), {"nodes": nodes})()


# ---- when they are not used


def _use_spoiled(path: Path, target: str, allowed: bool = True) -> int:
    artifact = read_artifact(path)
    with pretended(TARGETS[target]):
        used = _use(artifact, allowed)
        kept = [c for name in cross_compile.KERNELS for c in _in_memory(name)]
    assert len(kept) == used
    return used


def _in_memory(kernel: str) -> list[Any]:
    """Kernels that Triton holds for the current device."""
    device = precompiled.driver.active.get_current_device()
    caches = getattr(triton_kernels, kernel).device_caches
    return list(caches[device][0].values()) if device in caches else []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d.update(triton="3.8.0"), "are for triton 3.8.0, this is "),
        (lambda d: d.update(sources="sha256:" + "0" * 64), "from other sources"),
    ],
)
def test_kernels_of_another_compiler_are_left_alone(
    artifact: Path, caplog: pytest.LogCaptureFixture, change: Callable[[Any], Any], said: str
) -> None:
    _edit_index(artifact, change)
    assert _use_spoiled(artifact, "sm_90") == 0
    assert len(caplog.records) == 1
    assert said in caplog.text
    assert "; compiling" in caplog.text


def test_kernels_for_another_gpu(artifact: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert _use_spoiled(artifact, "sm_80") == 0
    assert len(caplog.records) == 1
    assert "carries kernels for gfx942, sm_90, not for sm_80; compiling" in caplog.text


def test_a_kernel_that_is_not_carried_is_compiled(artifact: Path, caplog: pytest.LogCaptureFixture) -> None:
    count = len(read_artifact(artifact).kernels["sm_90"].kernels)
    _edit_index(artifact, lambda d: d["kernels"][0].update(key="0" * 64))
    assert _use_spoiled(artifact, "sm_90") == count - 1
    assert len(caplog.records) == 1
    assert f"using {count - 1} precompiled kernels for sm_90; 1 more" in caplog.text


def test_nothing_is_used_unless_allowed(artifact: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "kvcc")
    assert _use_spoiled(artifact, "sm_90", allowed=False) == 0
    assert len(caplog.records) == 1
    assert "on request only" in caplog.text


def test_loading_on_a_cpu_reads_no_binary(artifact: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Not even one that was altered, when the caller skips digests; and says that there is nothing to use."""
    file = _binary(artifact)
    file.write_bytes(file.read_bytes()[::-1])
    load(artifact, backend="reference", verify="sizes")
    assert not caplog.records
    load(artifact, backend="reference", verify="sizes", precompiled=True)
    assert [r.getMessage() for r in caplog.records] == [
        "precompiled kernels are for GPUs; the reference kernels use none"
    ]


def test_an_altered_binary_is_refused(artifact: Path) -> None:
    file = _binary(artifact)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ArtifactDigest, match=file.name):
        load(artifact, backend="reference")
    unverified = read_artifact(artifact, verify="sizes")
    with pretended(TARGETS["sm_90"]), pytest.raises(ArtifactDigest, match=file.name):
        _use(unverified, allowed=True)  # code is verified whatever the caller skipped
    file.write_bytes(data[:-1])
    unverified = read_artifact(artifact, verify=False)
    with pretended(TARGETS["sm_90"]), pytest.raises(ArtifactDigest, match=file.name):
        _use(unverified, allowed=True)


def test_an_artifact_without_kernels(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = _write(tmp_path / "a.kvcc")
    assert _use_spoiled(path, "sm_90") == 0
    assert "carries kernels for no GPU, not for sm_90" in caplog.text
    assert (
        use_precompiled(read_artifact(path), cast(Backend, triton), torch.device("cpu"), allowed=False) == 0
    )


# ---- malformed


def _stray(path: Path) -> None:
    _put(path, "kernels/sm_90-0123456789abcdef.cubin", b"x")


def _of_another_target(index: Any) -> None:
    index["kernels"][0]["file"] = index["kernels"][0]["file"].replace("sm_90", "sm_80")


MALFORMED: dict[str, tuple[Callable[[Path], Any], type[ArtifactError], str]] = {
    "no index names it": (_stray, ArtifactManifest, "no index names it"),
    "no such file": (
        lambda p: _edit_index(p, lambda d: d["kernels"][0].update(file="sm_90-0123456789abcdef.cubin")),
        ArtifactManifest,
        "no listed binary",
    ),
    "another target's": (lambda p: _edit_index(p, _of_another_target), ArtifactManifest, "no listed binary"),
    "path": (
        lambda p: _edit_index(p, lambda d: d["kernels"][0].update(file="../manifest.json")),
        ArtifactManifest,
        "no listed binary",
    ),
    "key twice": (
        lambda p: _edit_index(p, lambda d: d["kernels"].append(d["kernels"][0])),
        ArtifactManifest,
        "twice",
    ),
    "key": (lambda p: _edit_index(p, lambda d: d["kernels"][0].update(key="x")), ArtifactManifest, "key"),
    "name of a result": (
        lambda p: _edit_index(p, lambda d: d["kernels"][0]["results"].update({"import": 1})),
        ArtifactManifest,
        "no name of a result",
    ),
    "says another target": (
        lambda p: _edit_index(p, lambda d: d.update(target="sm_80")),
        ArtifactManifest,
        "is for 'sm_80'",
    ),
    "version": (lambda p: _edit_index(p, lambda d: d.update(version=2)), ArtifactManifest, "version"),
    "more": (lambda p: _edit_index(p, lambda d: d.update(code="x")), ArtifactManifest, "code"),
    "not JSON": (lambda p: _put(p, "kernels/sm_90.json", b"{"), ArtifactManifest, "JSON"),
    "name of no part": (lambda p: _put(p, "kernels/run.so", b"x"), ArtifactPath, "run.so"),
    "unknown kind": (
        lambda p: _put(p, "kernels/sm_90-0123456789abcdef.ptx", b"x"),
        ArtifactPath,
        "ptx",
    ),
}


@pytest.mark.parametrize("fault", MALFORMED)
def test_malformed(fault: str, artifact: Path) -> None:
    spoil, error, message = MALFORMED[fault]
    spoil(artifact)
    with pytest.raises(error, match=message) as caught:
        read_artifact(artifact)
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)


# ---- the command line


def _run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, list(arguments), catch_exceptions=True)


def test_export_and_inspect(tmp_path: Path) -> None:
    source = save_tiny_llama(tmp_path / "model", layers=1)
    target = tmp_path / "model.kvcc"
    (tmp_path / "tiny.yaml").write_text(
        "windows: {sinks: 2, recent: 4, page: 16}\npasses:\n  - kivi: {group_size: 16}\n"
    )
    exported = _run(
        "export",
        str(source),
        "-r",
        str(tmp_path / "tiny.yaml"),
        "-o",
        str(target),
        "--gpu",
        "sm_90",
        "--json",
    )
    assert exported.exit_code == 0, exported.output
    assert json.loads(exported.stdout)["gpu_kernels"] == {"sm_90": 4}
    facts = json.loads(_run("inspect", str(target), "--verify", "--json").stdout)
    (carried,) = facts["gpu_kernels"].values()
    assert (carried["kernels"], carried["usable_here"], carried["why_not"]) == (4, True, None)
    shown = _run("inspect", str(target)).stdout
    assert "carried for sm_90" in shown
    assert "--precompiled" in shown
    _edit_index(target, lambda d: d.update(triton="3.8.0"))
    facts = json.loads(_run("inspect", str(target), "--json").stdout)
    assert facts["gpu_kernels"]["sm_90"]["usable_here"] is False
    assert facts["gpu_kernels"]["sm_90"]["why_not"].startswith("for triton 3.8.0, this is ")
    assert "not usable here" in " ".join(_run("inspect", str(target)).stdout.split())


@pytest.mark.parametrize("given", ["sm_12", "90", "H100"])
def test_an_unknown_target_is_refused_before_the_work(tmp_path: Path, given: str) -> None:
    done = _run("export", "no such model", "-r", "kivi-4", "-o", str(tmp_path / "a.kvcc"), "--gpu", given)
    assert isinstance(done.exception, KernelUnavailable)
    assert f"{given!r} is unknown; use one of sm_80" in str(done.exception)


def test_without_triton(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvcc.artifact.find_spec", lambda _: None)
    done = _run("export", "no such model", "-r", "kivi-4", "-o", str(tmp_path / "a.kvcc"), "--gpu", "sm_90")
    assert isinstance(done.exception, KernelUnavailable)
    assert "kvcc[triton]" in str(done.exception)


def test_a_kernel_that_does_not_compile(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("ptxas went away\nand more")

    artifact: Artifact = read_artifact(original)
    monkeypatch.setattr(precompiled, "compile_launch", refuse)
    with pytest.raises(KernelUnavailable, match=r"^attend_window for sm_90: ptxas went away$"):
        precompiled.compiled_for(layer_shapes(artifact.plan, artifact.graph), "sm_90")
