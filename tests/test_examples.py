"""The examples run, on a tiny model with a tokenizer of one token a letter."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import tokenizers
import torch
import transformers

from kvcc.checking import CheckSize
from kvcc.gates import load_gates
from kvcc.recipe import load_recipe
from kvcc.runtime import load

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    letters = [chr(c) for c in range(32, 127)] + ["\n", "<unk>"]
    words = tokenizers.models.WordLevel({c: i for i, c in enumerate(letters)}, unk_token="<unk>")
    backend = tokenizers.Tokenizer(words)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def artifact(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What examples/four_verbs.py leaves, with examples/my_recipe.yaml."""
    output = tmp_path_factory.mktemp("build")
    size = CheckSize(texts=1, length=240, context=200, retrieval_lengths=(), greedy_prompts=0)
    verdict = example("four_verbs").four_verbs(
        str(model_folder), str(EXAMPLES / "my_recipe.yaml"), output, samples=5, length=200, size=size
    )
    assert verdict.recipe == "my-recipe"
    assert verdict.passed
    assert 0 < verdict.texts[0].overall.kl < 0.1
    return output / "model.kvcc"


def test_four_verbs_leave_an_artifact_that_is_smaller(artifact: Path) -> None:
    plan = load(artifact).plan
    # K 4 bits, V 2 bits, and for each group of 32 a float16 scale and zero: 3 + 1 bits an element.
    assert plan.bits_per_element() == 4.0
    assert plan.layers[0].page == 32
    assert plan.cache_bytes(4096) < plan.uncompressed_bytes(4096) / 3


def test_batch(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    batch, model = example("batch"), load(artifact)
    prompts = ["short", "a prompt that is longer than the first and than a page. " * 3]
    together = batch.answer(model, prompts, max_tokens=12)
    alone = batch.answer(model, prompts[:1], max_tokens=12)
    assert [len(g.tokens) for g in together] == [12, 12]
    assert together[0].tokens == alone[0].tokens
    batch.show_cache(model, prompts)
    shown = capsys.readouterr().out
    assert shown.startswith(f"{sum(map(len, prompts))} tokens: ")
    assert ", 0 in sealed pages" not in shown


def test_the_yaml_files_are_valid() -> None:
    assert [p.name for p in load_recipe(str(EXAMPLES / "my_recipe.yaml")).passes] == ["fold-values", "kivi"]
    assert load_gates(EXAMPLES / "gates.yaml").kl == 0.02
