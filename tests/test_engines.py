"""Which engines can run an artifact, by its recipe and folds; and what `kvcc inspect` says of it."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from kvcc.cli import cli
from kvcc.engines import engines
from tests.saved import save_tiny_llama


@pytest.mark.parametrize(
    ("passes", "folded", "able"),
    [
        ([], {}, ["torch", "transformers"]),
        ([{"kivi": {"k_bits": 4}}], {}, ["torch", "transformers"]),
        ([{"transform": {}}], {"folded_weight": "model.v_proj.weight"}, ["torch", "transformers"]),
        ([{"think": {"mode": "fold"}}], {"narrow_weight": ""}, ["torch"]),
        ([{"kivi": {}}], None, ["torch"]),
        ([{"fp8": {"layers": None}}], {}, ["torch", "transformers", "vllm"]),
        ([{"fp8": {"layers": [1]}}], {}, ["torch", "transformers"]),
        ([{"int8": {"scales": "head", "layers": None}}], {}, ["torch", "transformers", "vllm"]),
        ([{"int8": {"scales": "channel", "layers": None}}], {}, ["torch", "transformers"]),
    ],
)
def test_engines(passes: list[dict[str, object]], folded: dict[str, str] | None, able: list[str]) -> None:
    found = engines(passes, folded)  # type: ignore[arg-type]
    assert [name for name, reason in found.items() if reason is None] == able


def test_inspect_says_why_not(tmp_path: Path) -> None:
    model, recipe = save_tiny_llama(tmp_path / "model"), tmp_path / "r.yaml"
    recipe.write_text("passes:\n  - kivi: {group_size: 16}\n")
    made = CliRunner().invoke(cli, ["export", str(model), "-r", str(recipe), "-o", str(tmp_path / "a.kvcc")])
    assert made.exit_code == 0, made.output
    assert json.loads((tmp_path / "a.kvcc" / "manifest.json").read_text())["runtimes"] == [
        "torch",
        "transformers",
    ]
    facts = json.loads(CliRunner().invoke(cli, ["inspect", str(tmp_path / "a.kvcc"), "--json"]).stdout)
    assert facts["engines"]["transformers"] is None
    assert "this is kivi" in facts["engines"]["vllm"]
    assert "in vllm" in CliRunner().invoke(cli, ["inspect", str(tmp_path / "a.kvcc")]).stdout
