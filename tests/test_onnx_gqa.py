"""ONNX Runtime's own INT8 cache, against the same graph with K and V rounded before exact attention."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import kvcc.integrations.onnx
from kvcc.errors import ArtifactManifest, PlanError
from kvcc.exchange.onnx import write_onnx
from kvcc.integrations.onnx import OnnxGqaModel, OnnxModel
from kvcc.runtime.artifact import Artifact, module, read_artifact
from kvcc.runtime.attention import cached_attention
from tests.compiled import tokens
from tests.test_onnx import HALF, artifact, export

onnx = pytest.importorskip("onnx", reason="the onnx extra")
pytest.importorskip("onnxscript", reason="the onnx extra")
pytest.importorskip("onnxruntime", reason="the onnx extra")

GREEDY = 200


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model.kvcc and its model.onnx, by the command."""
    folder = tmp_path_factory.mktemp("gqa")
    path = artifact("llama", "[{int8: {}}]", HALF, folder)
    done = export(path, folder / "model.onnx", "--onnx-attention", "gqa")
    assert done.exit_code == 0, done.output
    return folder


def simulated(found: Artifact, ids: list[int]) -> list[int]:
    """The most likely next token after each of a sequence, all K and V rounded as the pages of the plan round them."""

    def attend(
        cache: None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: None,
        *,
        layer: int,
        scale: float,
        window: int,
        softcap: float,
    ) -> Tensor:
        keys, queries = (found.tables[f"layers.{layer}.{side}_basis"] for side in "kq")
        k, v = (x.floor().clamp(-128, 127) + 0.5 for x in (k[0] @ keys, v[0]))
        q = q[0].unflatten(0, (len(k), -1)) @ queries[:, None]
        logits = scale * q @ k[:, None].mT
        hidden = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
        out = logits.masked_fill(hidden, -torch.inf).softmax(-1) @ v[:, None]
        return out.flatten(0, 1).transpose(0, 1)[None]

    graph = module(found, "cpu")
    for node in graph.graph.nodes:
        if node.target is cached_attention:
            node.target = attend
    graph.recompile()
    count = torch.arange(len(ids))
    logits: Tensor = graph(torch.tensor([ids]), count[None], count, None)
    chosen: list[int] = logits[0].argmax(-1).tolist()
    return chosen


@pytest.mark.parametrize("lengths", [(9,), (1, 7, 43)], ids=str)
def test_greedy_tokens_are_those_of_rounded_keys_and_values(
    made: Path, lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kvcc.integrations.onnx, "ROOM", 64)  # so that the cache grows
    onnx.checker.check_model(str(made / "model.onnx" / "step.onnx"), full_check=True)
    model, found = OnnxGqaModel(made / "model.onnx", threads=1), read_artifact(made / "model.kvcc")
    prompts = tokens(*lengths, seed=8)
    for prompt, got in zip(prompts, model.generate(prompts, GREEDY, ignore_eos=True)):
        assert len(got) == GREEDY
        assert simulated(found, prompt + got)[len(prompt) - 1 : -1] == got


def test_sequences_that_end_leave_the_batch(made: Path) -> None:
    model, prompts = OnnxGqaModel(made / "model.onnx", threads=1), tokens(240, 3, seed=6)
    together = model.generate(prompts, 60, ignore_eos=True)  # the first meets the end of the context
    assert [len(ids) for ids in together] == [16, 60]
    assert together == [model.generate([prompt], 60, ignore_eos=True)[0] for prompt in prompts]


def test_the_cache_is_a_byte_an_element(made: Path) -> None:
    model = OnnxGqaModel(made / "model.onnx", threads=1)
    _, cache = model.prefill(tokens(10))
    assert cache.nbytes == (10 + kvcc.integrations.onnx.ROOM) * model.description["bytes_per_token"]
    assert model.description["bytes_per_token"] == 2 * 2 * 2 * 16


def test_it_is_opened_as_what_it_is(made: Path) -> None:
    with pytest.raises(ArtifactManifest, match="attention is gqa"):
        OnnxModel(made / "model.onnx")
    assert "is for --format onnx" in export(made / "model.kvcc", made / "new", "--format", "kvcc",
                                            "--onnx-attention", "gqa").output  # fmt: skip


def test_page_means_are_refused(made: Path, tmp_path: Path) -> None:
    found = read_artifact(made / "model.kvcc")
    layers = list(found.plan.layers)
    heads = tuple(h.model_copy(update={"k": replace(h.k, page_means=16)}) for h in layers[1].heads)
    layers[1] = layers[1].model_copy(update={"heads": heads})
    changed = replace(found, plan=found.plan.model_copy(update={"layers": tuple(layers)}))
    with pytest.raises(PlanError, match="layer 1: GroupQueryAttention keeps 8 bits"):
        write_onnx(changed, tmp_path / "out", attention="gqa")


@pytest.mark.parametrize("passes", ["[{kivi: {group_size: 8}}]", "[{int8: {layers: [1]}}]", "[{fp8: {}}]"])
def test_other_caches_are_refused(passes: str, tmp_path: Path) -> None:
    found = read_artifact(artifact("llama", passes, HALF, tmp_path))
    with pytest.raises(PlanError, match=r"layer 0: GroupQueryAttention keeps 8 bits under static scales"):
        write_onnx(found, tmp_path / "out", attention="gqa")
