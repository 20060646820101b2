"""Which engines can run an artifact, by its recipe and folds; and what `kvcc inspect` says of it."""

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from kvcc.cli import cli
from kvcc.compile import compile_model
from kvcc.engines import engines
from kvcc.runtime.graph import Program
from tests.compiled import compiled, recipe, tiny_profile
from tests.saved import save_tiny_llama
from tests.tiny import tiny_graph, tiny_loaded


@pytest.mark.parametrize(
    ("passes", "folded", "able"),
    [
        ([], {}, ["torch", "transformers", "onnxruntime"]),
        ([{"kivi": {"k_bits": 4}}], {}, ["torch", "transformers", "onnxruntime"]),
        (
            [{"transform": {}}],
            {"folded_weight": "model.v_proj.weight"},
            ["torch", "transformers", "onnxruntime"],
        ),
        ([{"think": {"mode": "fold"}}], {"narrow_weight": ""}, ["torch", "onnxruntime"]),
        ([{"kivi": {}}], None, ["torch", "onnxruntime"]),
        ([{"fp8": {"layers": None}}], {}, ["torch", "transformers", "vllm", "onnxruntime"]),
        ([{"fp8": {"layers": [1]}}], {}, ["torch", "transformers", "onnxruntime"]),
        (
            [{"int8": {"scales": "head", "layers": None}}],
            {},
            ["torch", "transformers", "vllm", "onnxruntime"],
        ),
        ([{"int8": {"scales": "channel", "layers": None}}], {}, ["torch", "transformers", "onnxruntime"]),
    ],
)
def test_engines(passes: list[dict[str, object]], folded: dict[str, str] | None, able: list[str]) -> None:
    plan = compiled("llama", recipe()).plan
    found = engines(passes, folded, plan, Program((), 0))  # type: ignore[arg-type]
    assert [name for name, reason in found.items() if reason is None] == able


def test_sliding_windows_are_not_for_onnx() -> None:
    found = engines([], {}, compiled("mistral", recipe()).plan, Program((), 0))
    assert found["onnxruntime"] == "layer 0 attends over a sliding window"


def test_inspect_tells_of_page_means(tmp_path: Path) -> None:
    path, chosen = tmp_path / "a.kvcc", recipe("[{transform: {bits: 3, heads: shared}}]")
    compile_model(tiny_loaded("llama"), tiny_profile("llama"), chosen, path, graph=tiny_graph("llama"))
    facts = json.loads(CliRunner().invoke(cli, ["inspect", str(path), "--json"]).stdout)
    for layer in facts["layers"]:
        assert re.fullmatch(r"K (\d+ ch x \d bit \+ )*16 page means; V [^;]*bit", layer["stored"])


def test_inspect_says_why_not(tmp_path: Path) -> None:
    model, file = save_tiny_llama(tmp_path / "model"), tmp_path / "r.yaml"
    file.write_text("passes:\n  - kivi: {group_size: 16}\n")
    made = CliRunner().invoke(cli, ["export", str(model), "-r", str(file), "-o", str(tmp_path / "a.kvcc")])
    assert made.exit_code == 0, made.output
    assert json.loads((tmp_path / "a.kvcc" / "manifest.json").read_text())["runtimes"] == [
        "torch",
        "transformers",
        "onnxruntime",
    ]
    facts = json.loads(CliRunner().invoke(cli, ["inspect", str(tmp_path / "a.kvcc"), "--json"]).stdout)
    assert facts["engines"]["transformers"] is None
    assert "this is kivi" in facts["engines"]["vllm"]
    assert "in vllm" in CliRunner().invoke(cli, ["inspect", str(tmp_path / "a.kvcc")]).stdout
