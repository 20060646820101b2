"""Hugging Face folders with scales for the cache, read back by compressed-tensors' own loader."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from kvcc.calibration import PromptSet, TokenPrompt, calibrate
from kvcc.cli import cli
from kvcc.errors import ArtifactExists, PassError, UnsupportedModel
from kvcc.exchange.compressed_tensors import write_compressed_tensors
from kvcc.frontend import LoadedModel, capture, load_model
from kvcc.pipeline import run_passes
from kvcc.profile import Profile
from kvcc.recipe import parse_recipe
from tests.compiled import tiny_profile, tokens
from tests.saved import save_tiny_llama
from tests.tiny import tiny_loaded

pytest.importorskip("compressed_tensors", reason="the reader of these folders")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LoadedModel, Profile]:
    folder = save_tiny_llama(tmp_path_factory.mktemp("model"))
    loaded = load_model(str(folder))
    prompts = tuple(TokenPrompt(tuple(ids), str(i)) for i, ids in enumerate(tokens(120, 90, seed=3)))
    return folder, loaded, calibrate(capture(loaded), [PromptSet("random", "sha256:0", 3, prompts)])


def written(model: tuple[Path, LoadedModel, Profile], line: str, output: Path) -> dict[str, float]:
    _, loaded, profile = model
    recipe = parse_recipe(f"passes:\n  - {line}\n", "test.yaml")
    compiled = run_passes(capture(loaded), profile, recipe)
    return write_compressed_tensors(loaded, profile, recipe, compiled, output, overwrite=False)


@pytest.mark.parametrize(
    ("line", "kind", "most"), [("fp8: {}", "float", 448), ("int8: {scales: head}", "int", 127.5)]
)
def test_their_loader_takes_it(
    model: tuple[Path, LoadedModel, Profile], line: str, kind: str, most: float, tmp_path: Path
) -> None:
    scales = written(model, line, tmp_path / "out")
    low, high = model[2].k_range(1)
    assert scales["model.layers.1.self_attn.k_scale"] == pytest.approx(
        float(torch.maximum(-low, high).max()) / most
    )
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    held = {name: value for name, value in found.state_dict().items() if "scale" in name}
    assert {name: pytest.approx(float(value)) for name, value in held.items()} == scales
    scheme = found.model.layers[0].self_attn.quantization_scheme.input_activations
    assert (scheme.num_bits, scheme.type, scheme.strategy, scheme.dynamic) == (8, kind, "tensor", False)
    ids = torch.tensor([tokens(60, seed=9)[0]])
    with torch.no_grad():
        plain, theirs = model[1].model(ids).logits, found(ids).logits
    assert (
        0 < (theirs - plain).abs().max() < 0.1 * plain.abs().max()
    )  # a cache of 8 bits, and not another model
    bits = json.loads((tmp_path / "out" / "kv_cache_bits.json").read_text())
    assert bits["layers"][0] == {"k": [8.0, 8.0], "v": [8.0, 8.0]}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("kivi: {group_size: 16}", "kivi; compressed-tensors stores caches of 8 bits"),
        ("int8: {}", "a scale a channel; use scales: head"),
        ("fp8: {layers: [0]}", "for some layers only"),
    ],
)
def test_what_it_cannot_express_is_refused(
    model: tuple[Path, LoadedModel, Profile], line: str, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(PassError, match=reason):
        written(model, line, tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_models_whose_projections_are_one_are_refused(tmp_path: Path) -> None:
    loaded, recipe = tiny_loaded("gpt_neox"), parse_recipe("passes:\n  - fp8: {}\n", "test.yaml")
    profile = tiny_profile("gpt_neox")
    compiled = run_passes(capture(loaded), profile, recipe)
    with pytest.raises(UnsupportedModel, match="wants a k_proj and a v_proj"):
        write_compressed_tensors(loaded, profile, recipe, compiled, tmp_path / "out", overwrite=False)


def test_the_command(model: tuple[Path, LoadedModel, Profile], tmp_path: Path) -> None:
    recipe = tmp_path / "fp8.yaml"
    recipe.write_text("passes:\n  - fp8: {scale: one}\n")
    command = ["export", str(model[0]), "-r", str(recipe), "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(cli, [*command, "--format", "compressed-tensors", "--json"])
    assert done.exit_code == 0, done.output
    assert set(json.loads(done.stdout)["scales"].values()) == {1.0}
    again = CliRunner().invoke(cli, [*command, "--format", "compressed-tensors"])
    assert isinstance(again.exception, ArtifactExists) or again.exit_code == 2
    forced = CliRunner().invoke(cli, [*command, "--format", "compressed-tensors", "--force", "--explain"])
    assert forced.exit_code == 0, forced.output
    assert "layer 0" in forced.output
    both = CliRunner().invoke(cli, [*command, "--format", "compressed-tensors", "--check"])
    assert both.exit_code == 2
    planned = ["export", "no model", "--budget", "2x", "-o", str(tmp_path / "planned")]
    searched = CliRunner().invoke(cli, [*planned, "--format", "compressed-tensors"])
    assert searched.exit_code == 2
    assert "is for --recipe fp8 or int8" in searched.output
