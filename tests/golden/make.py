"""Makes tests/golden/tiny.kvcc and expected.json: run once for a version of the format, then kept for ever.

python -m tests.golden.make
"""

import json
import tempfile
from pathlib import Path

import tokenizers
import torch
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM

from kvcc.artifact import write_artifact
from kvcc.calibration import PromptSet, TokenPrompt, calibrate
from kvcc.frontend import LoadedModel, as_loaded, capture, reference_logits
from kvcc.pipeline import Compiled, run_passes
from kvcc.recipe import Recipe, parse_recipe
from kvcc.runtime.loading import load

HERE = Path(__file__).parent
VOCABULARY = 32
PROMPT, STEPS = 20, 3
RECIPE = """
name: golden
summary: half of the K channels, 4 bits
windows: {sinks: 2, recent: 4, page: 8}
passes:
  - think: {keep_ratio: 0.5, mean_correction: true}
  - kivi: {k_bits: 4, v_bits: 4, group_size: 8}
"""


def main() -> None:
    """Write both."""
    loaded = _model()
    chosen = parse_recipe(RECIPE, "golden.yaml")
    compiled = _compile(loaded, chosen)
    with tempfile.TemporaryDirectory() as folder:
        _tokenizer(Path(folder))
        write_artifact(
            HERE / "tiny.kvcc",
            identity=loaded.identity,
            plan=compiled.plan,
            module=compiled.module,
            tables=compiled.tables,
            recipe=chosen.as_dict(),
            recipe_name=chosen.name,
            passes=[{"name": report.name} for report in compiled.reports],
            tokenizer_dir=Path(folder),
            accuracy={"texts": []},
            report_html="<!doctype html><title>golden</title>",
            licence="Apache-2.0",
            overwrite=True,
        )
    tokens = _random(PROMPT + STEPS, 11)
    ids = torch.tensor([tokens[:PROMPT]])
    exact = reference_logits(loaded, ids, torch.ones_like(ids), torch.arange(PROMPT)[None])[0, -1]
    model = load(HERE / "tiny.kvcc", backend="reference")
    cache = model.new_cache(1)
    model.forward([tokens[:PROMPT]], cache)
    steps = [model.forward([[token]], cache)[0].tolist() for token in tokens[PROMPT:]]
    expected = {"tokens": tokens, "prompt": PROMPT, "prompt_logits": exact.tolist(), "step_logits": steps}
    (HERE / "expected.json").write_text(json.dumps(expected) + "\n")


def _model() -> LoadedModel:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return as_loaded(model, None, "golden-llama")


def _compile(loaded: LoadedModel, chosen: Recipe) -> Compiled:
    graph = capture(loaded)
    prompts = tuple(TokenPrompt(tuple(_random(40, seed)), str(seed)) for seed in range(3))
    profile = calibrate(graph, [PromptSet("random", "sha256:0", 0, prompts)], skip_first=2)
    return run_passes(graph, profile, chosen)


def _random(count: int, seed: int) -> list[int]:
    return torch.randint(3, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def _tokenizer(folder: Path) -> None:
    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, VOCABULARY))]
    tokenizer = tokenizers.Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"special_tokens": {"eos_token": "</s>"}, "eos_token_ids": [2], "generation": {}}
    (folder / "tokenizer_settings.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }} {% endfor %}")


if __name__ == "__main__":
    main()
