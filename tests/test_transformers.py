"""CompressedCache inside stock transformers models: what any cache must do, over the architectures."""

import copy
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcc.artifact import write_artifact
from kvcc.compile import folded
from kvcc.errors import DataError, UnsupportedModel
from kvcc.integrations.transformers import CompressedCache
from kvcc.pipeline import run_passes
from kvcc.recipe import parse_recipe
from kvcc.runtime import load
from tests.compiled import tiny_profile, tokens
from tests.tiny import ARCHITECTURES, tiny_graph

WINDOWS = "windows: {sinks: 2, recent: 4, page: 8}\n"
RECIPES = {
    "exact": "[]",
    "kivi": "\n  - kivi: {k_bits: 8, v_bits: 8, group_size: 8}",
    "kivi-2": "\n  - kivi: {k_bits: 2, v_bits: 2, group_size: 8}",
    "think": "\n  - think: {keep_ratio: 0.75}\n  - kivi: {k_bits: 8, v_bits: 8, group_size: 8}",
    "request": "\n  - think: {keep_ratio: 0.5, mode: request}",
    "transform": "\n  - transform: {bits: 8.5}",
    "narrow": "\n  - think: {keep_ratio: 0.5, mode: fold}",
}
# Softcap and attention sinks are computed by eager attention only, which reads keys itself.
BY_NAME = ("gemma2", "gpt_oss")
GROUPED = (
    "llama",
    "qwen2",
    "mistral",
    "gemma2",
    "gemma3",
    "gpt_oss",
    "gpt_neox",
    "opt",
    "phi3",
    "mixtral",
    "qwen3",
)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    folder = tmp_path_factory.mktemp("artifacts")

    @lru_cache
    def made(name: str, recipe: str) -> Path:
        graph = tiny_graph(name)
        found = run_passes(
            graph, tiny_profile(name), parse_recipe(f"{WINDOWS}passes: {RECIPES[recipe]}\n", "x")
        )
        return write_artifact(
            folder / f"{name}-{recipe}.kvcc", identity=graph.model, plan=found.plan, module=found.module,
            tables=found.tables, recipe={}, recipe_name=recipe, passes=[], folded=folded(graph.module, found.module),
        )  # fmt: skip

    return made


@lru_cache
def _model(name: str) -> PreTrainedModel:
    return ARCHITECTURES[name]()


def stock(name: str) -> PreTrainedModel:
    """A fresh model, with the attention that the cache wants where its own cannot be met."""
    model = copy.deepcopy(_model(name))
    if name in BY_NAME:
        model.set_attn_implementation("kvcc_cache")
    return model


def batch_of(*rows: list[int]) -> tuple[Tensor, Tensor]:
    """Left-padded ids and their mask."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(r)) + r for r in rows])
    return ids, torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])


def greedy(
    model: PreTrainedModel, rows: list[list[int]], cache: CompressedCache | None, n: int = 24, **more: object
) -> list[list[int]]:
    ids, mask = batch_of(*rows)
    model.generation_config.eos_token_id = -1  # nothing ends a text
    options = {"max_new_tokens": n, "do_sample": False, "pad_token_id": 0} | more
    out = model.generate(ids, attention_mask=mask, past_key_values=cache, **options)
    return [row[ids.shape[1] :].tolist() for row in out]


@torch.no_grad()
def logits(model: PreTrainedModel, row: list[int], cache: CompressedCache | None, cuts: list[int]) -> Tensor:
    """Logits of all tokens, which go through the cache in pieces."""
    found, first = [], 0
    for last in [*cuts, len(row)]:
        found.append(
            model(torch.tensor([row[first:last]]), past_key_values=cache, use_cache=cache is not None).logits[
                0
            ]
        )
        first = last
    return torch.cat(found)


def mostly_slow(names: tuple[str, ...], fast: tuple[str, ...]) -> list[Any]:
    return [pytest.param(n, marks=[] if n in fast else [pytest.mark.slow]) for n in names]


@pytest.mark.parametrize("name", mostly_slow(GROUPED, ("llama", "gpt_oss", "gemma3")))
def test_nothing_compressed_is_the_model(name: str, artifact: Callable[[str, str], Path]) -> None:
    """Points 1 and 3: prefill and steps, in one piece and in chunks; the mixed layers of sliding models too."""
    (row,) = tokens(45, seed=3)
    plain = logits(ARCHITECTURES[name](), row, None, [])
    for cuts in ([], [20, 21, 22, 40], list(range(7, 44))):
        cache = CompressedCache.from_artifact(artifact(name, "exact"))
        found = logits(stock(name), row, cache, cuts)
        torch.testing.assert_close(found, plain, atol=2e-4, rtol=1e-3)
        assert cache.get_seq_length() == 45
        assert cache.get_mask_sizes(3, 0) == (48, 0)


@pytest.mark.parametrize("recipe", ["kivi", "kivi-2", "think", "request"])
@pytest.mark.parametrize(
    "name", mostly_slow(("llama", "qwen2", "gemma3", "gpt_oss", "mistral"), ("llama", "gpt_oss"))
)
def test_greedy_tokens_are_the_runtime_s(
    name: str, recipe: str, artifact: Callable[[str, str], Path]
) -> None:
    """Points 1, 2 and 8: unequal prompts, left-padded; tokens and bytes as kvcc's own runtime has them."""
    rows = tokens(37, 20, 29, seed=5)
    path = artifact(name, recipe)
    cache = CompressedCache.from_artifact(path)
    found = greedy(stock(name), rows, cache)
    model = load(path)
    expected = [r.tokens for r in model.generate(rows, max_tokens=24, ignore_eos=True)]
    assert found == expected
    for row, alone in zip(rows, found):
        if (
            recipe != "request"
        ):  # a prompt alone chooses the same channels, but rounding may differ in a batch
            assert greedy(stock(name), [row], CompressedCache.from_artifact(path)) == [alone]
    assert cache.pages is not None
    lengths = [len(row) + 23 for row in rows]
    assert cache.pages.lengths == lengths
    pages = sum(m.pages_used for m in cache.pages.memory())
    layouts = cache.artifact.plan.layouts()
    wanted = sum(
        plan.sealed(n) // plan.page * layout.nbytes
        for plan, layout in zip(cache.artifact.plan.layers, layouts)
        if layout is not None
        for n in lengths
    )
    assert pages == wanted


def test_folds_go_into_the_model(artifact: Callable[[str, str], Path]) -> None:
    path, rows = artifact("llama", "transform"), tokens(37, 20, seed=5)
    with pytest.raises(UnsupportedModel, match="changes weights of the model: give it"):
        greedy(stock("llama"), rows, CompressedCache.from_artifact(path))
    model = stock("llama")
    cache = CompressedCache.from_artifact(path, model)
    assert set(cache.folded_state_dict()) >= {
        "model.layers.0.self_attn.v_proj.weight",
        "model.layers.1.self_attn.o_proj.bias",
    }
    found = greedy(model, rows, cache)
    assert found == [r.tokens for r in load(path).generate(rows, max_tokens=24, ignore_eos=True)]
    cache.fold_into(model)  # a second time nothing happens
    assert greedy(model, rows, CompressedCache.from_artifact(path, model)) == found
    assert greedy(model, rows, None) == greedy(
        stock("llama"), rows, None
    )  # folds change no output by themselves
    with pytest.raises(UnsupportedModel, match="folds of another artifact"):
        CompressedCache.from_artifact(artifact("llama", "kivi"), model)


def test_folds_that_drop_channels_are_refused(artifact: Callable[[str, str], Path]) -> None:
    with pytest.raises(UnsupportedModel, match="cannot hold; run the artifact with"):
        CompressedCache.from_artifact(artifact("llama", "narrow"), stock("llama"))


def test_beams_share_sealed_pages(artifact: Callable[[str, str], Path]) -> None:
    """Points 5 and 10: reordering the payload; deep changes of one beam leave the others alone."""
    rows = tokens(37, 20, seed=5)
    cache = CompressedCache.from_artifact(artifact("llama", "exact"))
    found = greedy(stock("llama"), rows, cache, num_beams=3)
    assert found == greedy(stock("llama"), rows, None, num_beams=3)
    assert cache.pages is not None
    apart = sum(plan.sealed(60) // plan.page for plan in cache.artifact.plan.layers) * 3
    held = sum(
        m.pages_used // layer.pool.page_bytes
        for m, layer in zip(cache.pages.memory(), cache.pages.layers)
        if layer.pool
    )
    assert held < 2 * apart


@torch.no_grad()
def test_rows_are_repeated_and_selected(artifact: Callable[[str, str], Path]) -> None:
    model, rows = stock("llama"), tokens(30, 30, seed=8)
    cache = CompressedCache.from_artifact(artifact("llama", "kivi"))
    model(torch.tensor(rows), past_key_values=cache)
    cache.batch_repeat_interleave(2)
    nexts = torch.tensor([[5], [6], [7], [8]])
    four = model(nexts, past_key_values=cache).logits[:, -1]
    for i, row in enumerate([rows[0], rows[0], rows[1], rows[1]]):
        alone = logits(
            model, [*row, int(nexts[i])], CompressedCache.from_artifact(artifact("llama", "kivi")), [30]
        )[-1]
        torch.testing.assert_close(four[i], alone, atol=1e-4, rtol=1e-3)
    cache.batch_select_indices(torch.tensor([3, 0]))
    two = model(torch.tensor([[9], [9]]), past_key_values=cache).logits[:, -1]
    for got, row in zip(two, ([*rows[1], 8, 9], [*rows[0], 5, 9])):
        alone = logits(model, row, CompressedCache.from_artifact(artifact("llama", "kivi")), [30, 31])[-1]
        torch.testing.assert_close(got, alone, atol=1e-4, rtol=1e-3)
    assert cache.batch_size == 2


@torch.no_grad()
def test_reset_forgets(artifact: Callable[[str, str], Path]) -> None:
    """Points 4, 6 and 7: not croppable, and empty after a reset, for any batch."""
    model, (row,) = stock("llama"), tokens(30, seed=8)
    cache = CompressedCache.from_artifact(artifact("llama", "kivi"))
    first = logits(model, row, cache, [20])
    assert not cache.is_croppable
    with pytest.raises(DataError, match="cannot be cropped"):
        cache.crop(-1)
    cache.crop(0)
    with pytest.raises(DataError, match=r"holds 1 sequences and was given 2"):
        model(torch.tensor([row, row]), past_key_values=cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.nbytes == 0
    assert torch.equal(logits(model, row, cache, [20]), first)


def test_sampling_streaming_and_pipelines_run(
    artifact: Callable[[str, str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers.generation.streamers import BaseStreamer

    class Collected(BaseStreamer):
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            pass

    model, (row,) = stock("llama"), tokens(30, seed=8)
    path, streamer = artifact("llama", "kivi"), Collected()
    ids = torch.tensor([row])
    outs = []
    for more in ({"streamer": streamer}, {}):
        torch.manual_seed(1)
        cache = CompressedCache.from_artifact(path)
        out = model.generate(
            ids, past_key_values=cache, max_new_tokens=12, min_new_tokens=12, do_sample=True, top_k=20, **more
        )
        outs.append(out[0].tolist())
    assert outs[0] == outs[1] == streamer.tokens


def test_a_draft_model_cannot_roll_back(artifact: Callable[[str, str], Path]) -> None:
    """Assisted generation has to crop what it rejects: it is refused, not answered wrongly."""
    model, assistant = stock("llama"), stock("llama")
    with torch.no_grad():
        assistant.lm_head.weight.neg_()  # proposes what the model would never say
    cache = CompressedCache.from_artifact(artifact("llama", "kivi"))
    with pytest.raises(DataError, match="cannot be cropped"):
        model.generate(
            torch.tensor(tokens(30)),
            past_key_values=cache,
            max_new_tokens=8,
            do_sample=False,
            assistant_model=assistant,
        )


def test_masks_that_are_not_causal_are_refused(artifact: Callable[[str, str], Path]) -> None:
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    mask[0, 0, 4, 1] = False
    with pytest.raises(DataError, match="not causal"):
        stock("llama")(
            torch.tensor(tokens(6)),
            attention_mask=mask,
            past_key_values=CompressedCache.from_artifact(artifact("llama", "kivi")),
        )


def test_no_graph_of_gradients_is_kept(artifact: Callable[[str, str], Path]) -> None:
    (row,) = tokens(20)
    expected = logits(stock("llama"), row, CompressedCache.from_artifact(artifact("llama", "kivi")), [12])
    cache, model, found = CompressedCache.from_artifact(artifact("llama", "kivi")), stock("llama"), []
    for part in (row[:12], row[12:]):
        found.append(model(torch.tensor([part]), past_key_values=cache).logits[0])
    assert found[0].requires_grad  # of what is no attention
    assert cache.pages is not None
    assert not any(layer.window_k.requires_grad for layer in cache.pages.layers)
    assert torch.equal(torch.cat(found), expected)


def test_layers_on_several_devices_are_refused(artifact: Callable[[str, str], Path]) -> None:
    cache = CompressedCache.from_artifact(artifact("llama", "kivi"))
    plan = cache.artifact.plan.layers[0]
    q, k = (torch.zeros(1, heads, 3, plan.k_dim) for heads in (plan.q_heads, plan.kv_heads))
    cache.attend(0, q, k, k, None, 1.0)
    with pytest.raises(UnsupportedModel, match="layer 1 is on meta and the cache on cpu"):
        cache.attend(1, q.to("meta"), k.to("meta"), k.to("meta"), None, 1.0)


def test_attention_that_reads_keys_is_told_what_to_set(artifact: Callable[[str, str], Path]) -> None:
    model = ARCHITECTURES["llama"]()
    model.set_attn_implementation("eager")
    with pytest.raises(UnsupportedModel, match='set_attn_implementation\\("kvcc_cache"\\)'):
        model(
            torch.tensor(tokens(6)), past_key_values=CompressedCache.from_artifact(artifact("llama", "kivi"))
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype: torch.dtype, artifact: Callable[[str, str], Path]) -> None:
    """A float32 artifact serves a model that was loaded in half precision."""
    (row,) = tokens(45, seed=3)
    model = stock("llama").to(dtype)
    plain = logits(model, row, None, []).float()
    found = logits(
        model, row, CompressedCache.from_artifact(artifact("llama", "kivi")), [20, 21, 22, 40]
    ).float()
    torch.testing.assert_close(found, plain, atol=0.15, rtol=0.1)
