"""The artifact folder: round trip, every malformation by its class, and writes that are cut short."""

import contextlib
import errno
import hashlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from kvcc import errors
from kvcc.artifact import check_target, update_file, write_artifact
from kvcc.errors import ArtifactError, ArtifactExists, ArtifactUnwritable
from kvcc.pipeline import Compiled
from kvcc.runtime import load
from kvcc.runtime.artifact import module, read_artifact, read_manifest, verify_digests
from kvcc.runtime.fuse import fuse
from tests.compiled import compiled, recipe, runnable, tokens
from tests.test_graph_format import mutate
from tests.tiny import tiny_graph

GOLDEN = Path(__file__).parent / "golden"
CHOSEN = "\n  - think: {keep_ratio: 0.6, mean_correction: true}\n  - kivi: {group_size: 8}"


@lru_cache
def _compiled(passes: str = CHOSEN) -> Compiled:
    return compiled("llama", recipe(passes))


def _write(path: Path, passes: str = CHOSEN, **options: Any) -> Path:
    found = _compiled(passes)
    facts: dict[str, Any] = {
        "identity": tiny_graph("llama").model,
        "plan": found.plan,
        "module": found.module,
        "tables": found.tables,
        "recipe": {"name": "test", "summary": ""},
        "recipe_name": passes,
        "passes": [{"name": report.name} for report in found.reports],
    }
    return write_artifact(path, **(facts | options))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    (folder / "tok").mkdir()
    for name in ("tokenizer.json", "tokenizer_settings.json"):
        shutil.copy(GOLDEN / "tiny.kvcc/tokenizer" / name, folder / "tok" / name)
    return _write(folder / "a.kvcc", tokenizer_dir=folder / "tok", accuracy={"kl": 0.5}, report_html="<p>")


@pytest.fixture
def artifact(original: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(original, tmp_path / "a.kvcc"))


def _reseal(path: Path) -> None:
    """Make the manifest's sizes and digests those of the files, so that deeper checks are reached."""
    file = path / "manifest.json"
    manifest = json.loads(file.read_bytes())
    for name, entry in manifest["files"].items():
        data = (path / name).read_bytes()
        entry.update(size=len(data), sha256=hashlib.sha256(data).hexdigest())
    file.write_text(json.dumps(manifest))


def _edit(path: Path, name: str, change: Callable[[Any], Any]) -> None:
    """Change a JSON file of an artifact in place."""
    data = json.loads((path / name).read_bytes())
    change(data)
    (path / name).write_text(json.dumps(data))


# --------------------------------------------------------------------------- round trip


def test_golden_loads_for_ever() -> None:
    expected = json.loads((GOLDEN / "expected.json").read_text())
    ids, prompt = expected["tokens"], expected["prompt"]
    model = load(GOLDEN / "tiny.kvcc", backend="reference")
    cache = model.new_cache()
    first = model.forward([ids[:prompt]], cache)[0]
    torch.testing.assert_close(first, torch.tensor(expected["prompt_logits"]), rtol=1e-4, atol=1e-4)
    for token, logits in zip(ids[prompt:], expected["step_logits"]):
        torch.testing.assert_close(
            model.forward([[token]], cache)[0], torch.tensor(logits), rtol=1e-3, atol=1e-3
        )
    assert model.tokenizer is not None
    assert model.tokenizer.encode("w3 w31") == [3, 31]
    assert verify_digests(GOLDEN / "tiny.kvcc") == []


def test_round_trip(original: Path) -> None:
    before = runnable("llama", recipe(CHOSEN))
    fuse(before.graph)
    found = read_artifact(original)
    after = load(original, backend="reference")
    assert (found.plan, found.manifest.model, found.accuracy) == (before.plan, before.identity, {"kl": 0.5})
    assert found.manifest.recipe_name == CHOSEN
    assert set(found.tables) == set(before.tables)
    assert all(torch.equal(table, before.tables[name]) for name, table in found.tables.items())
    rows = tokens(40, 11, seed=5)
    caches = [model.new_cache(2) for model in (before, after)]
    for step in (rows, [[3], [4]], [[5, 6, 7], [8]]):
        old, new = (model.forward(step, cache) for model, cache in zip((before, after), caches))
        assert torch.equal(old, new)


def test_official_library_reads_the_tensors(original: Path) -> None:
    official = load_file(original / "weights.safetensors")
    found = read_artifact(original).weights
    assert set(official) == set(found)
    assert all(torch.equal(official[name], found[name]) for name in found)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
def test_weights_are_mapped(original: Path) -> None:
    graph = module(read_artifact(original), "cpu")
    (name,) = [n for n, b in graph.named_buffers() if b.shape == (128, 64)][:1]
    address = graph.get_buffer(name).data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(part, 16) for part in line.split()[0].split("-"))
        if first <= address < last:
            assert line.endswith("weights.safetensors")
            return
    pytest.fail("the weight is nowhere in memory")


def test_same_input_same_bytes(original: Path, tmp_path: Path) -> None:
    again = [_write(tmp_path / name) for name in ("x.kvcc", "y.kvcc")]
    names = sorted(p.relative_to(again[0]) for p in again[0].rglob("*") if p.is_file())
    assert len(names) == 6
    assert all((again[0] / name).read_bytes() == (again[1] / name).read_bytes() for name in names)


def test_format_has_not_changed_by_accident(tmp_path: Path) -> None:
    """The start of a weights file, byte for byte."""
    written = _write(tmp_path / "a.kvcc")
    data = (written / "tables.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert (8 + length) % 64 == 0
    assert data[8:].startswith(
        b'{"layers.0.k_channels":{"dtype":"I64","shape":[2,16],"data_offsets":[0,256]},'
    )
    head = '{"version": 1,\n"inputs": ["tokens", "positions", "rows", "cache"],\n"nodes": [\n{"name": "'
    assert (written / "graph/graph.json").read_text().startswith(head)
    assert sorted(json.loads((written / "manifest.json").read_text())) == [
        "files", "folded", "kvcc_version", "licence", "model", "passes", "recipe", "recipe_name", "runtimes",
        "schema_version", "torch_version",
    ]  # fmt: skip


def test_foreign_names_at_the_top_are_left_alone(artifact: Path) -> None:
    (artifact / "README.md").write_text("mine")
    (artifact / ".git").mkdir()
    read_artifact(artifact)
    update_file(artifact, "report.html", b"new")
    assert (artifact / "README.md").read_text() == "mine"
    with pytest.raises(ArtifactExists, match=r"\.git"):
        _write(artifact, overwrite=True)


# --------------------------------------------------------------------------- malformed folders


def _unlink(name: str) -> Callable[[Path], None]:
    return lambda path: (path / name).unlink()


def _bytes(name: str, change: Callable[[bytes], bytes], reseal: bool = True) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        (path / name).write_bytes(change((path / name).read_bytes()))
        if reseal:
            _reseal(path)

    return spoil


def _json(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        _edit(path, name, change)
        if name != "manifest.json":
            _reseal(path)

    return spoil


def _manifest(**changes: Any) -> Callable[[Path], None]:
    return _json("manifest.json", lambda data: data.update(changes))


def _list_file(name: str, content: bytes | None = b"") -> Callable[[Path], None]:
    """List another file in the manifest, and write it unless content is None."""

    def spoil(path: Path) -> None:
        entry = {"size": 0, "sha256": hashlib.sha256(b"").hexdigest()}
        _edit(path, "manifest.json", lambda data: data["files"].update({name: entry}))
        if content is not None:
            (path / name).write_bytes(content)

    return spoil


def _link(name: str) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        target = path.parent / "elsewhere"
        (path / name).rename(target)
        (path / name).symlink_to(target)

    return spoil


def _pipe(name: str) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        (path / name).unlink()
        os.mkfifo(path / name)

    return spoil


def _header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(data: bytes) -> bytes:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text + data[8 + length :]

    return _bytes("weights.safetensors", edit)


def _tables(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        tables = {name: table.clone() for name, table in load_file(path / "tables.safetensors").items()}
        change(tables)
        save_file(tables, path / "tables.safetensors")
        _reseal(path)

    return spoil


def _first(header: dict[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = min(header.values(), key=lambda e: e["data_offsets"][0])
    return entry


def _rename_tensor(header: dict[str, Any]) -> None:
    header["other"] = header.pop(next(iter(header)))


Spoil = Callable[[Path], Any]
CHANNELS, MEAN = "layers.0.k_channels", "layers.0.k_mean"
MALFORMED: dict[str, tuple[Spoil, type[ArtifactError], str]] = {
    "no folder": (shutil.rmtree, errors.ArtifactMissing, "does not exist"),
    "no manifest": (_unlink("manifest.json"), errors.ArtifactMissing, "unfinished"),
    "file gone": (_unlink("weights.safetensors"), errors.ArtifactMissing, "weights"),
    "listed, not there": (_list_file("tokenizer/x.json", None), errors.ArtifactMissing, "x.json"),
    "other schema": (_manifest(schema_version=2), errors.ArtifactVersion, "schema version 2"),
    "other runtime": (_manifest(runtimes=["onnx"]), errors.ArtifactVersion, "made for onnx"),
    "graph version": (_json("graph/graph.json", lambda d: d.update(version=7)), errors.ArtifactVersion, "7"),
    "manifest not JSON": (_bytes("manifest.json", lambda b: b[:-9], False), errors.ArtifactManifest, "JSON"),
    "manifest a list": (
        _bytes("manifest.json", lambda b: b"[1]", False),
        errors.ArtifactManifest,
        "schema_version",
    ),
    "manifest field": (_manifest(model={}), errors.ArtifactManifest, "model"),
    "manifest extra": (_manifest(code="x"), errors.ArtifactManifest, "code"),
    "passes a text": (_manifest(recipe={"passes": "fp8"}), errors.ArtifactManifest, "recipe: .*one name"),
    "passes of nothing": (_manifest(recipe={"passes": [{"int8": None}]}), errors.ArtifactManifest, "recipe"),
    "folded, not there": (_manifest(folded={"x": ""}), errors.ArtifactManifest, "no tensor 'x'"),
    "field of two lines": (_manifest(**{"x\ny": 1}), errors.ArtifactManifest, "x\ufffdy: Extra"),
    "runtime of two lines": (_manifest(runtimes=["x\ny"]), errors.ArtifactManifest, "runtimes"),
    "manifest digest": (
        _json("manifest.json", lambda d: d["files"]["plan.json"].update(sha256="no")),
        errors.ArtifactManifest,
        "sha256",
    ),
    "terminal codes": (_manifest(recipe_name="\x1b[2J"), errors.ArtifactManifest, r"U\+001B"),
    "not listed, needed": (
        _json("manifest.json", lambda d: d["files"].pop("plan.json")),
        errors.ArtifactManifest,
        "does not list",
    ),
    "accuracy a list": (_bytes("accuracy.json", lambda b: b"[]"), errors.ArtifactManifest, "accuracy"),
    "kernels a list": (_bytes("kernels/kernels.json", lambda b: b"[]"), errors.ArtifactManifest, "kernels"),
    "path up": (_list_file("../x", None), errors.ArtifactPath, r"\.\./x"),
    "path up within": (_list_file("tokenizer/../../x", None), errors.ArtifactPath, "no file"),
    "absolute path": (_list_file("/etc/passwd", None), errors.ArtifactPath, "passwd"),
    "backslash": (_list_file("tokenizer\\x", None), errors.ArtifactPath, "no file"),
    "name of no part": (_list_file("run.py"), errors.ArtifactPath, "run.py"),
    "not listed": (
        lambda path: (path / "tokenizer/chat_template.jinja").write_text("x"),
        errors.ArtifactPath,
        "not listed",
    ),
    "folder in folder": (lambda path: (path / "graph/inner").mkdir(), errors.ArtifactPath, "inner"),
    "link": (_link("weights.safetensors"), errors.ArtifactPath, "links"),
    "link as manifest": (_link("manifest.json"), errors.ArtifactPath, "links"),
    "link as folder": (_link("tokenizer"), errors.ArtifactPath, "link"),
    "pipe": (_pipe("plan.json"), errors.ArtifactPath, "regular"),
    "pipe as manifest": (_pipe("manifest.json"), errors.ArtifactPath, "regular"),
    "truncated": (
        _bytes("weights.safetensors", lambda b: b[:-1], False),
        errors.ArtifactTruncated,
        "incomplete",
    ),
    "longer": (_bytes("report.html", lambda b: b + b"x", False), errors.ArtifactTruncated, "report.html"),
    "altered": (
        _bytes("weights.safetensors", lambda b: b[:-1] + bytes([b[-1] ^ 1]), False),
        errors.ArtifactDigest,
        "sha256",
    ),
    "graph not JSON": (_bytes("graph/graph.json", lambda b: b"\x80"), errors.ArtifactManifest, "graph"),
    "graph": (_json("graph/graph.json", lambda d: d.update(outputs=[])), errors.ArtifactGraph, "one output"),
    "operator": (
        _json("graph/graph.json", lambda d: d["nodes"][-1].update(op="os.system")),
        errors.ArtifactOperator,
        "os.system",
    ),
    "plan field": (_json("plan.json", lambda d: d.pop("dtype")), errors.ArtifactPlan, "dtype"),
    "plan version": (_json("plan.json", lambda d: d.update(version=2)), errors.ArtifactPlan, "version"),
    "plan of fewer layers": (
        _json("plan.json", lambda d: d["layers"].pop()),
        errors.ArtifactPlan,
        "1 layers",
    ),
    "plan of other dtype": (
        _json("plan.json", lambda d: d.update(dtype="float16")),
        errors.ArtifactPlan,
        "float16",
    ),
    "plan of other heads": (
        _json("plan.json", lambda d: d["layers"][1].update(q_heads=8)),
        errors.ArtifactPlan,
        "layer 1: 8 query",
    ),
    "plan beyond memory": (
        _json("plan.json", lambda d: d["layers"][1].update(recent=1 << 40)),
        errors.ArtifactPlan,
        "beyond",
    ),
    "plan of a basis without pages": (
        _json(
            "plan.json",
            lambda d: d["layers"][0].update(
                window=8, page=0, sinks=0, recent=0, heads=[], select="basis", mean_correction=False
            ),
        ),
        errors.ArtifactPlan,
        "no pages",
    ),
    "plan of uneven groups": (
        _json("plan.json", lambda d: d["layers"][0]["heads"][0]["v"].update(group_size=7)),
        errors.ArtifactPlan,
        "group",
    ),
    "plan of means with scales": (
        _json("plan.json", lambda d: d["layers"][0]["heads"][0]["k"].update(page_means=4)),
        errors.ArtifactPlan,
        "layer 0: KV head 0, K: page_means 4",
    ),
    "plan of means of V": (
        _json("plan.json", lambda d: d["layers"][1]["heads"][1]["v"].update(steps="unit", page_means=4)),
        errors.ArtifactPlan,
        "KV head 1, V: ",
    ),
    "plan of other width": (
        _json("plan.json", lambda d: d["layers"][0].update(k_dim=32)),
        errors.ArtifactTensor,
        "k_channels",
    ),
    "identity of other vocabulary": (
        _json("manifest.json", lambda d: d["model"].update(vocab_size=64)),
        errors.ArtifactGraph,
        "logits",
    ),
    "header too long": (
        _bytes("weights.safetensors", lambda b: b"\xff" * 8 + b[8:]),
        errors.ArtifactTensor,
        "header of",
    ),
    "no header": (_bytes("weights.safetensors", lambda b: b"\0\0\0"), errors.ArtifactTensor, "header of"),
    "header not JSON": (
        _bytes("weights.safetensors", lambda b: b[:8] + b"x" + b[9:]),
        errors.ArtifactTensor,
        "JSON",
    ),
    "header a list": (
        _bytes("weights.safetensors", lambda b: b"\2" + bytes(7) + b"[]"),
        errors.ArtifactTensor,
        "not an object",
    ),
    "unknown dtype": (_header(lambda h: _first(h).update(dtype="C64")), errors.ArtifactTensor, "C64"),
    "shape": (_header(lambda h: _first(h)["shape"].append(2)), errors.ArtifactTensor, "takes"),
    "negative shape": (
        _header(lambda h: _first(h).update(shape=[-1])),
        errors.ArtifactTensor,
        "whole numbers",
    ),
    "overlap": (_header(lambda h: h.update(copy=dict(_first(h)))), errors.ArtifactTensor, "overlap"),
    "hole": (_header(lambda h: h.pop(next(iter(h)))), errors.ArtifactTensor, "hole|bytes of data"),
    "misaligned": (
        _bytes(
            "weights.safetensors",
            lambda b: (int.from_bytes(b[:8], "little") + 1).to_bytes(8, "little") + b[8:9] + b" " + b[9:],
        ),
        errors.ArtifactTensor,
        "multiple of its elements",
    ),
    "very many dimensions": (
        _header(lambda h: _first(h).update(shape=[1 << 62] * 200_000)),
        errors.ArtifactTensor,
        "beyond 16 dimensions",
    ),
    "empty, yet beyond 64 bits": (
        _header(
            lambda h: h.update(more={"dtype": "F32", "shape": [0, 1 << 62, 1 << 62], "data_offsets": [0, 0]})
        ),
        errors.ArtifactTensor,
        "64 bits",
    ),
    "bytes after": (
        _bytes("weights.safetensors", lambda b: b + b"PK"),
        errors.ArtifactTensor,
        "bytes of data",
    ),
    "tensor renamed": (_header(_rename_tensor), errors.ArtifactTensor, "has no tensor"),
    "tensor unused": (
        _header(lambda h: h.update(more={"dtype": "F32", "shape": [0], "data_offsets": [0, 0]})),
        errors.ArtifactTensor,
        "does not use the tensor more",
    ),
    "table missing": (_tables(lambda t: t.pop(CHANNELS)), errors.ArtifactTensor, "needs layers.0.k_channels"),
    "table unused": (
        _tables(lambda t: t.update(more=torch.ones(1))),
        errors.ArtifactTensor,
        "does not use more",
    ),
    "table dtype": (_tables(lambda t: t.update({MEAN: t[MEAN].double()})), errors.ArtifactTensor, "float64"),
    "table shape": (
        _tables(lambda t: t.update({MEAN: t[MEAN][:1].clone()})),
        errors.ArtifactTensor,
        "k_mean",
    ),
    "table no permutation": (
        _tables(lambda t: t[CHANNELS][1].fill_(3)),
        errors.ArtifactTensor,
        "permutation",
    ),
    "table out of range": (_tables(lambda t: t[CHANNELS].add_(1)), errors.ArtifactTensor, "permutation"),
    "table infinite": (_tables(lambda t: t[MEAN].fill_(torch.inf)), errors.ArtifactTensor, "not finite"),
}


@pytest.mark.parametrize("fault", MALFORMED)
def test_malformed(fault: str, artifact: Path) -> None:
    spoil, error, message = MALFORMED[fault]
    spoil(artifact)
    with pytest.raises(error, match=message) as caught:
        read_artifact(artifact)
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)
    assert caught.value.exit_status == 2


def test_every_class_has_its_own_code_and_test() -> None:
    family = ArtifactError.__subclasses__()
    assert len({cls.code for cls in family}) == len(family)
    tested = {error for _, error, _ in MALFORMED.values()} | {ArtifactExists, ArtifactUnwritable}
    tested |= {errors.ArtifactSignature}  # by test_signing.py
    assert set(family) == tested


@pytest.fixture(scope="module")
def with_means(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write(tmp_path_factory.mktemp("means") / "a.kvcc", "[{transform: {bits: 3}}]")


@pytest.mark.parametrize(
    ("side", "means", "message"),
    [
        ("k", -1, "layer 0: KV head 0, K: page_means -1"),
        ("k", -(1 << 63), "layer 0: KV head 0, K: page_means -9"),
        ("k", 17, "layers.0: KV head 0 stores 17 K"),
        ("k", (1 << 63) - 1, "layers.0: KV head 0 stores 9223372036854775807 K"),
        ("k", 1 << 63, "out of range"),
        ("k", 0.5, "page_means"),
        ("k", None, "page_means"),
        ("v", 1, "KV head 0, V: page_means are for K"),
        ("v", -1, "KV head 0, V: page_means -1"),
    ],
)
def test_page_means_that_no_page_has(
    side: str, means: Any, message: str, with_means: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(with_means, tmp_path / "a.kvcc"))
    _json("plan.json", lambda d: d["layers"][0]["heads"][0][side].update(page_means=means))(path)
    with pytest.raises(ArtifactError, match=message) as caught:
        load(path, backend="reference")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("means", range(17))
def test_any_other_number_of_page_means_runs(means: int, with_means: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(with_means, tmp_path / "a.kvcc"))
    _json("plan.json", lambda d: d["layers"][0]["heads"][0]["k"].update(page_means=means))(path)
    model = load(path, backend="reference")
    prompts = tokens(40)
    assert model.forward(prompts, model.new_cache(1)).isfinite().all()


def test_tables_are_as_wide_as_the_most_page_means(with_means: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(with_means, tmp_path / "a.kvcc"))

    def bare(plan: dict[str, Any]) -> None:
        for head in plan["layers"][0]["heads"]:
            head["k"].update(planes=[], token_scales=False, page_means=12)

    _json("plan.json", bare)(path)
    with pytest.raises(errors.ArtifactTensor, match=r"layers\.0\.k_basis"):
        read_artifact(path)
    _tables(
        lambda t: t.update(
            {name: t[name][..., :12].contiguous() for name in ("layers.0.k_basis", "layers.0.q_basis")}
        )
    )(path)
    model = load(path, backend="reference")
    assert model.forward(tokens(40), model.new_cache(1)).isfinite().all()


def test_levels_of_verification(artifact: Path) -> None:
    report = artifact / "report.html"
    report.write_bytes(report.read_bytes()[::-1])
    assert verify_digests(artifact)[0].startswith("report.html: sha256")
    read_artifact(artifact, verify="sizes")
    with pytest.raises(errors.ArtifactDigest):
        read_artifact(artifact, verify=True)
    report.write_bytes(b"longer than before")
    with pytest.raises(errors.ArtifactTruncated):
        read_artifact(artifact, verify="sizes")
    read_artifact(artifact, verify=False)


def test_a_device_that_is_not_there(original: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(errors.KernelUnavailable, match="cuda"):
        read_artifact(original, device="cuda")


# --------------------------------------------------------------------------- mutations

JSON_FILES = ("manifest.json", "plan.json", "graph/graph.json", "kernels/kernels.json", "accuracy.json")
FILES = (*JSON_FILES, "weights.safetensors", "tables.safetensors")


def _mutate_json(path: Path, draw: Any) -> None:
    name = draw.draw(st.sampled_from(JSON_FILES))
    _edit(path, name, lambda data: mutate(data, draw))


def _mutate_bytes(path: Path, draw: Any) -> None:
    file = path / draw.draw(st.sampled_from(FILES))
    data = bytearray(file.read_bytes())
    at = draw.draw(st.integers(0, min(len(data), 3000)))  # headers are at the start
    piece = draw.draw(st.binary(max_size=9))
    what = draw.draw(st.sampled_from(["overwrite", "insert", "cut", "truncate"]))
    if what == "overwrite":
        data[at : at + len(piece)] = piece
    elif what == "insert":
        data[at:at] = piece
    elif what == "cut":
        del data[at : at + draw.draw(st.integers(1, 200))]
    else:
        del data[at:]
    file.write_bytes(data)


def _read_or_refuse(original: Path, folder: Path, draw: Any) -> None:
    path = folder / "mutated.kvcc"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(original, path)
    if draw.draw(st.booleans()):
        _mutate_json(path, draw)
    else:
        _mutate_bytes(path, draw)
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, OSError):
        _reseal(path)  # where the manifest still allows it
    with contextlib.suppress(ArtifactError):
        module(read_artifact(path), "cpu")


@settings(max_examples=60, deadline=None)
@given(draw=st.data())
def test_mutated_artifact_is_read_or_refused(
    original: Path, tmp_path_factory: pytest.TempPathFactory, draw: Any
) -> None:
    _read_or_refuse(original, tmp_path_factory.getbasetemp(), draw)


@pytest.mark.slow
@settings(max_examples=3000, deadline=None)
@given(draw=st.data())
def test_many_mutated_artifacts_are_read_or_refused(
    original: Path, tmp_path_factory: pytest.TempPathFactory, draw: Any
) -> None:
    _read_or_refuse(original, tmp_path_factory.getbasetemp(), draw)


# --------------------------------------------------------------------------- writing


def test_targets_that_are_refused(original: Path, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("x")
    for path, overwrite, error, message in (
        (original, False, ArtifactExists, "--force"),
        (tmp_path / "notes", True, ArtifactExists, "no artifact"),
        (tmp_path / "file", True, ArtifactExists, "no artifact"),
        (tmp_path / "nowhere/a.kvcc", False, ArtifactUnwritable, "does not exist"),
    ):
        with pytest.raises(error, match=message):
            check_target(path, overwrite=overwrite)
        with pytest.raises(error, match=message):
            _write(path, overwrite=overwrite)
    assert (tmp_path / "notes/thesis.tex").read_text() == "years of work"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ArtifactUnwritable, match="permission"):
        _write(tmp_path / "a.kvcc")
    tmp_path.chmod(0o700)


@pytest.mark.parametrize("exchange", [True, False])
def test_overwriting_replaces_everything(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    if not exchange:  # a system without renameat2
        monkeypatch.setattr("kvcc.artifact._rename_exchange", lambda *_: False)
    _write(artifact, "[]", overwrite=True)
    assert read_artifact(artifact).manifest.recipe_name == "[]"
    assert sorted(p.name for p in artifact.parent.iterdir()) == ["a.kvcc"]
    assert not (artifact / "accuracy.json").exists()


def test_writing_through_a_link_keeps_the_link(artifact: Path) -> None:
    link = artifact.parent / "link.kvcc"
    link.symlink_to(artifact)
    _write(link, "[]", overwrite=True)
    assert link.is_symlink()
    assert read_artifact(artifact).manifest.recipe_name == "[]"


def test_parts_that_do_not_fit_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(errors.ArtifactTensor, match="k_channels"):
        _write(tmp_path / "a.kvcc", tables={})
    with pytest.raises(errors.ArtifactPlan, match="layers"):
        _write(tmp_path / "a.kvcc", identity=tiny_graph("llama").model.model_copy(update={"layers": 3}))
    with pytest.raises(errors.ArtifactManifest, match="control character"):
        _write(tmp_path / "a.kvcc", recipe_name="\x1b")
    with pytest.raises(errors.ArtifactManifest, match="JSON"):
        _write(tmp_path / "a.kvcc", accuracy={"kl": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_update_file(artifact: Path) -> None:
    before = read_manifest(artifact)
    update_file(artifact, "accuracy.json", b'{"kl": 0.25}')
    update_file(artifact, "report.html", b"<p>new")
    found = read_artifact(artifact)
    assert found.accuracy == {"kl": 0.25}
    assert (artifact / "report.html").read_bytes() == b"<p>new"
    changed = {name for name in before.files if before.files[name] != found.manifest.files[name]}
    assert changed == {"accuracy.json", "report.html"}
    assert sorted(p.name for p in artifact.parent.iterdir()) == ["a.kvcc"]
    for name, data in (
        ("plan.json", b"{}"),
        ("../x", b""),
        ("accuracy.json", b"[]"),
        ("accuracy.json", b"{"),
    ):
        with pytest.raises(ArtifactError):
            update_file(artifact, name, data)
    assert read_artifact(artifact).accuracy == {"kl": 0.25}


def _failing_at(call: int, number: int) -> Callable[[int], None]:
    """An fsync that fails with `number` when called for the `call`th time."""
    calls = iter(range(1, 1000))

    def fsync(descriptor: int) -> None:
        if next(calls) == call:
            raise OSError(number, os.strerror(number))

    return fsync


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_failure_at_any_moment_leaves_the_old(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    failures = 0
    for call in range(1, 100):
        monkeypatch.setattr(os, "fsync", _failing_at(call, number))
        try:
            _write(artifact, "[]", overwrite=True)
        except ArtifactUnwritable as error:
            failures += 1
            wanted = os.strerror(number)
            said = str(error)
        else:
            break
        if wanted not in said or "\n" in said:
            pytest.fail(said)
        assert sorted(p.name for p in artifact.parent.iterdir()) == ["a.kvcc"]
        read_artifact(artifact)
    assert failures >= 9  # six files, three folders
    assert read_artifact(artifact).manifest.recipe_name == "[]"


def test_file_too_large_for_the_disk(tmp_path: Path) -> None:
    """A real write error, from the system."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    try:
        with pytest.raises(ArtifactUnwritable, match="too large"):
            _write(tmp_path / "a.kvcc")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def _killed_writer(path: Path, seconds: float) -> None:
    """A process that writes two artifacts to `path` in turn until SIGKILL ends it."""
    child = os.fork()
    if child == 0:
        while True:
            for passes in (CHOSEN, "[]"):
                _write_with_report(path, passes)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def _write_with_report(path: Path, passes: str) -> None:
    _write(path, passes, overwrite=True)
    update_file(path, "report.html", passes.encode())


def _kill_often(path: Path, times: int) -> None:
    torch.set_num_threads(1)
    _write_with_report(path, CHOSEN), _write_with_report(path, "[]")  # warm
    start = time.monotonic()
    _write_with_report(path, CHOSEN)
    whole = time.monotonic() - start
    shutil.rmtree(path)
    chance = random.Random(1)
    written = 0
    for _ in range(times):
        _killed_writer(path, chance.uniform(0, 4 * whole))
        if path.exists():
            written += 1
            found = read_artifact(path)
            report = path / "report.html"
            assert found.manifest.recipe_name in (CHOSEN, "[]")
            assert not report.exists() or report.read_text() == found.manifest.recipe_name
    assert written


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.slow
def test_killed_write_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    """In a process of its own: children forked from one that other tests have used may hang on what those left."""
    process = multiprocessing.get_context("spawn").Process(
        target=_kill_often, args=(tmp_path / "a.kvcc", 150)
    )
    process.start()
    process.join()
    assert process.exitcode == 0


def test_what_killed_writers_left_is_removed(tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    dead, busy, fresh, other = (
        tmp_path / name
        for name in (
            ".a.kvcc.000000000000.tmp",
            ".a.kvcc.111111111111.tmp",
            ".a.kvcc.222222222222.tmp",
            ".b.kvcc.000000000000.tmp",
        )
    )
    for folder in (dead, busy, fresh, other):
        folder.mkdir()
        (folder / "weights.safetensors").write_text("half")
        if folder != fresh:
            os.utime(folder, (1, 1))
    descriptor = os.open(busy, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    _write(tmp_path / "a.kvcc")
    os.close(descriptor)
    assert {p.name for p in tmp_path.iterdir()} == {"a.kvcc", busy.name, fresh.name, other.name}


def test_two_writers_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "a.kvcc"
    _compiled(), _compiled("[]")
    threads = [
        threading.Thread(target=_write, args=(path, passes), kwargs={"overwrite": True})
        for passes in (CHOSEN, "[]") * 3
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = read_artifact(path)
    assert bool(found.tables) == (found.manifest.recipe_name == CHOSEN)
    assert [p.name for p in tmp_path.iterdir()] == ["a.kvcc"]


def test_appeared_meanwhile(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.kvcc"
    monkeypatch.setattr("kvcc.artifact._sync_folders", lambda _: shutil.copytree(original, path))
    with pytest.raises(ArtifactExists, match="appeared"):
        _write(path)
    assert read_artifact(path).manifest.recipe_name == CHOSEN
    assert [p.name for p in tmp_path.iterdir()] == ["a.kvcc"]
