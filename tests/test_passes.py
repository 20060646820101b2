"""Every registered pass on every architecture, and each pass against an independent computation."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kvcc.errors import PassError
from kvcc.graph import attention_nodes, attention_spec
from kvcc.passes import REGISTRY, pass_class
from kvcc.pipeline import run_passes
from kvcc.surgery import attribute, input_projection, output_projection
from kvcc.transform_coding import hadamard
from tests.compiled import (
    WINDOWS,
    compiled,
    recipe,
    runnable,
    running,
    stepwise,
    tiny_profile,
    tokens,
    transformers_logits,
)
from tests.tiny import ARCHITECTURES, tiny_graph

# Parameters that fit head_dim 16 and pages of 8 tokens; a pass that is not listed is run with its defaults.
SETTINGS = {
    "kivi": ["{group_size: 8}", "{k_bits: 8, v_bits: 3, group_size: 8, residual: 0}"],
    "think": [
        "{keep_ratio: 0.5}",
        "{keep_ratio: 0.7, mode: request}",
        "{keep_ratio: 0.5, mode: fold, score: centred}",
        "{keep_ratio: 0.6, score: centred, allocation: global}",
        "{keep_ratio: 0.6, value_keep_ratio: 0.5}",
    ],
    "kitty": ["{group_size: 8}"],
    "hadamard": ["{group_size: 16}", "{k_bits: 8, v_bits: 8, group_size: 8}"],
    "transform": [
        "{bits: 3}",
        "{bits: 2, k_basis: dual, v_basis: dual, token_scales: false}",
        "{bits: 8.5, k_basis: hadamard, v_basis: native}",
    ],
    "cskv": ["{group_size: 8}", "{k_rank: 1, v_rank: 0.5, bits: 16, group_size: 8}"],
    "zipcache": ["{}", "{salient: 0.3, salient_bits: 8, other_bits: 3, separable: false}"],
    "nvfp4": ["{}", "{group_size: 8}"],
    "int8": ["{}", "{scales: head, margin: 1.2}"],
    "fp8": ["{}", "{scale: one}"],
    "turboquant": [
        "{}",
        "{k_bits: 3, v_bits: 2, v_levels: uniform}",
        "{k_bits: 1, v_bits: 3, exact_layers: 1}",
    ],
    "oscar": ["{}", "{k_bits: 4, group_size: 8, k_clip: 100}"],
    "fold-values": ["{}", "{mean: false, basis: hadamard}", "{basis: pca}"],
}
PAGES = {"zipcache": "windows: {sinks: 2, recent: 4, page: 16}\n"}  # where a page of 8 is too small
# What a pass must refuse, by (pass, setting, architecture), with the reason it must give.
REFUSALS = {
    ("think", 2, "qwen3"): "QK-norm",
    ("think", 2, "gemma3"): "QK-norm",
    ("think", 2, "gpt_neox"): "partial rotation",
    ("think", 2, "gpt_oss"): "",
    ("fold-values", 0, "gpt_oss"): "attention sinks",
    ("fold-values", 2, "gpt_oss"): "attention sinks",
}
CASES = [(p, i, a) for p in REGISTRY for i in range(len(SETTINGS.get(p, ["{}"]))) for a in ARCHITECTURES]


def test_settings_are_of_passes_there_are() -> None:
    assert set(SETTINGS) <= set(REGISTRY)


@pytest.mark.parametrize(("name", "setting", "architecture"), CASES)
def test_every_pass_on_every_architecture(name: str, setting: int, architecture: str) -> None:
    chosen = recipe(f"\n  - {name}: {SETTINGS.get(name, ['{}'])[setting]}", PAGES.get(name, WINDOWS))
    refusal = REFUSALS.get((name, setting, architecture))
    if refusal is not None:
        with pytest.raises(PassError, match=rf"layer \d.*{refusal}"):
            compiled(architecture, chosen)
        return
    found = compiled(architecture, chosen)
    found.module.graph.lint()
    assert {n.layer for n in found.reports[0].notes} == set(range(len(found.plan.layers))) or name == "think"
    model = running(architecture, found)
    row = tokens(30)[0]
    logits = stepwise(model, [row], [24])[0]
    assert logits.isfinite().all()
    cache = model.new_cache(1)
    model.forward([row], cache)
    assert cache.nbytes == model.plan.cache_bytes(30)


def test_passes_explain_themselves() -> None:
    for name in REGISTRY:
        found = pass_class(name)
        assert found.name == name
        assert "arXiv" in (found.__doc__ or "")


# fold-values


@pytest.mark.parametrize(
    "setting", ["{}", "{basis: pca}", "{basis: hadamard}", "{mean: false, basis: hadamard}"]
)
@pytest.mark.parametrize("architecture", sorted(set(ARCHITECTURES) - {"gpt_oss"}))
def test_fold_values_is_exact(architecture: str, setting: str) -> None:
    row = tokens(30)[0]
    logits = stepwise(runnable(architecture, recipe(f"\n  - fold-values: {setting}")), [row], [20, 21])[0]
    torch.testing.assert_close(logits, transformers_logits(architecture, row), atol=2e-4, rtol=1e-3)


def test_fold_values_centres_and_decorrelates_v() -> None:
    found = compiled("llama", recipe("\n  - fold-values: {basis: pca}"))
    profile = tiny_profile("llama")
    before = profile.v_cov(0)
    assert found.reports[0].notes[0].text == "V mean and pca basis folded into W_v, W_o and b_o"
    values = torch.linalg.eigvalsh(before).flip(-1)
    assert (values[:, 0] > values[:, -1]).all()


@pytest.mark.parametrize("size", [1, 2, 3, 16, 48, 80, 96])
def test_hadamard_is_orthogonal(size: int) -> None:
    h = hadamard(size, 3)
    torch.testing.assert_close(h @ h.T, torch.eye(size, dtype=torch.float64))


# projections


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_projections_are_found_by_moving_row_numbers(architecture: str) -> None:
    """v, rebuilt from the rows found, equals the v that reaches attention; the same for the output columns."""
    graph = tiny_graph(architecture)
    node = attention_nodes(graph.module)[0]
    spec = attention_spec(node)
    v = input_projection(graph.module, node.args[2])
    out = output_projection(graph.module, node, spec.q_heads, spec.v_dim)
    assert v is not None
    assert out is not None
    assert v.index.shape == (spec.kv_heads, spec.v_dim)
    assert sorted(out.index.flatten().tolist()) == list(range(spec.q_heads * spec.v_dim))
    seen: dict[str, Tensor] = {}

    class Spy(torch.fx.Interpreter):
        def run_node(self, n):  # type: ignore[no-untyped-def]
            value = super().run_node(n)
            if n in (node.args[2], v.linear):
                seen["v" if n is node.args[2] else "flat"] = value
            return value

    ids = torch.tensor(tokens(5))
    Spy(graph.module).run(ids, torch.arange(5)[None], torch.ones_like(ids), torch.arange(5))
    torch.testing.assert_close(seen["flat"][0][:, v.index].permute(1, 0, 2), seen["v"][0])


# think


@pytest.mark.parametrize("mode", ["slice", "fold", "request"])
def test_keeping_everything_changes_nothing(mode: str) -> None:
    row = tokens(40)[0]
    logits = stepwise(
        runnable("qwen2", recipe(f"\n  - think: {{keep_ratio: 1.0, mode: {mode}}}")), [row], [25, 26]
    )[0]
    torch.testing.assert_close(logits, transformers_logits("qwen2", row), atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2", "phi3", "opt", "mixtral"])
def test_folding_pairs_equals_masking_them_after_rope(architecture: str) -> None:
    """Dropping RoPE pairs from the weights is the same as zeroing their channels in q and k behind RoPE."""
    chosen = recipe("\n  - think: {keep_ratio: 0.5, mode: fold}")
    found = compiled(architecture, chosen)
    row = tokens(30)[0]
    folded = stepwise(runnable(architecture, chosen), [row], [])[0]

    graph, profile = tiny_graph(architecture), tiny_profile(architecture)
    for index, node in enumerate(attention_nodes(graph.module)):
        if not found.plan.layers[index].page:
            continue
        score = profile.think_score(index)
        heads, size = score.shape
        if architecture == "opt":
            keep = score >= score.sort(-1).values[:, size // 2 :][:, :1]
        else:
            pairs = score[:, : size // 2] + score[:, size // 2 :]
            best = pairs >= pairs.sort(-1).values[:, pairs.shape[1] // 2 :][:, :1]
            keep = torch.cat([best, best], -1)
        spec = attention_spec(node)
        for position, mask in ((0, keep.repeat_interleave(spec.q_heads // heads, 0)), (1, keep)):
            with graph.module.graph.inserting_before(node):
                masked = graph.module.graph.call_function(
                    torch.ops.aten.mul.Tensor, (node.args[position], mask.float()[None, :, None])
                )
            node.update_arg(position, masked)
    ids = torch.tensor([row])
    interpreter = torch.fx.Interpreter(graph.module)
    expected = interpreter.run(ids, torch.arange(30)[None], torch.ones_like(ids), torch.arange(30))[0]
    torch.testing.assert_close(folded, expected, atol=2e-4, rtol=1e-3)


def _attention_by_hand(
    q: Tensor, k: Tensor, v: Tensor, plan, keep: Tensor, mean: Tensor | None, prefill: int, scale: float
) -> Tensor:
    """What slice mode must give: exact in the first `prefill` tokens; later queries see sealed K pruned to `keep`."""
    group = q.shape[0] // k.shape[0]
    out = torch.zeros(q.shape[1], q.shape[0], v.shape[-1])
    for t in range(q.shape[1]):
        sealed = 0 if t < prefill else plan.sealed(t)
        for head in range(q.shape[0]):
            h = head // group
            logits = []
            for j in range(t + 1):
                if plan.sinks <= j < plan.sinks + sealed:
                    logit = scale * (q[head, t] * k[h, j] * keep[h]).sum()
                    if mean is not None:
                        logit = logit + scale * (q[head, t] * mean[h] * ~keep[h]).sum()
                else:
                    logit = scale * (q[head, t] * k[h, j]).sum()
                logits.append(logit)
            out[t, head] = torch.stack(logits).softmax(0) @ v[h, : t + 1]
    return out


@pytest.mark.parametrize("mean_correction", [True, False])
def test_slice_mode_by_hand(mean_correction: bool) -> None:
    from kvcc.runtime.attention import cached_attention

    text = f"{{keep_ratio: 0.5, mean_correction: {str(mean_correction).lower()}}}"
    model = runnable("llama", recipe(f"\n  - think: {text}"))
    profile, plan = tiny_profile("llama"), model.plan.layers[0]
    score = profile.think_score(0)
    keep = score >= score.sort(-1).values[:, 8:][:, :1]
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, h, 36, 16, generator=generator) for h in (4, 2, 2))
    cache, outs = model.new_cache(1), []
    for first, last in [(0, 24), *((t, t + 1) for t in range(24, 36))]:
        cache.begin([last - first])
        part = (x[:, :, first:last] for x in (q, k, v))
        outs.append(cached_attention(cache, *part, None, layer=0, scale=0.25, window=0, softcap=0.0)[0])
        cache.commit()
    mean = profile.k_mean(0).float() if mean_correction else None
    expected = _attention_by_hand(q[0], k[0], v[0], plan, keep, mean, 24, 0.25)
    torch.testing.assert_close(torch.cat(outs), expected, atol=1e-4, rtol=1e-4)


def test_request_mode_scores_the_prompt() -> None:
    model = runnable("llama", recipe("\n  - think: {keep_ratio: 0.5, mode: request}"))
    from kvcc.runtime.attention import cached_attention

    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(1, h, 50, 16, generator=generator) for h in (4, 2, 2))
    cache = model.new_cache(1)
    cache.begin([50])
    cached_attention(cache, q, k, v, None, layer=0, scale=0.25, window=0, softcap=0.0)
    for head in range(2):
        queries = torch.cat([q[0, 2 * head, -32:], q[0, 2 * head + 1, -32:]])
        score = queries.square().mean(0) * k[0, head].square().mean(0)
        assert cache.layers[0].channels[0, head].tolist() == sorted(score.argsort()[-8:].tolist())
    assert cache.layers[0].layout.k_channels == 8


def test_values_are_pruned_through_the_weights() -> None:
    """Half of V's channels: the same as replacing the dropped ones by their calibrated mean."""
    chosen = recipe("\n  - think: {keep_ratio: 1.0, mode: fold, value_keep_ratio: 0.5}")
    model = runnable("llama", chosen)
    assert model.plan.layers[0].v_dim == 8
    row = tokens(30)[0]
    pruned = stepwise(model, [row], [])[0]
    graph, profile = tiny_graph("llama"), tiny_profile("llama")
    for index, node in enumerate(attention_nodes(graph.module)):
        out = output_projection(graph.module, node, 4, 16)

        gain = (
            attribute(graph.module, out.weight).double()[:, out.index].square().sum(0).view(2, 2, 16).sum(1)
        )
        score = profile.v_cov(index).diagonal(dim1=1, dim2=2) * gain
        keep = score >= score.sort(-1).values[:, 8:][:, :1]
        mean = (profile.v_mean(index) * ~keep).float()[None, :, None]
        with graph.module.graph.inserting_before(node):
            kept = graph.module.graph.call_function(
                torch.ops.aten.mul.Tensor, (node.args[2], keep.float()[None, :, None])
            )
            filled = graph.module.graph.call_function(torch.ops.aten.add.Tensor, (kept, mean))
        node.update_arg(2, filled)
    ids = torch.tensor([row])
    inputs = (ids, torch.arange(30)[None], torch.ones_like(ids), torch.arange(30))
    torch.testing.assert_close(
        pruned, torch.fx.Interpreter(graph.module).run(*inputs)[0], atol=2e-4, rtol=1e-3
    )


@pytest.mark.parametrize("architecture", ["llama", "gpt_oss"])
@pytest.mark.parametrize("basis", ["pca", "hadamard"])
def test_values_are_pruned_in_the_basis_they_were_folded_into(architecture: str, basis: str) -> None:
    """Half of V's principal channels: the same as projecting V onto them, around its mean unless there are sinks."""
    sinks = architecture == "gpt_oss"
    fold = f"\n  - fold-values: {{mean: {str(not sinks).lower()}, basis: {basis}}}"
    model = runnable(
        architecture, recipe(f"{fold}\n  - think: {{keep_ratio: 1.0, mode: slice, value_keep_ratio: 0.5}}")
    )
    row = tokens(30)[0]
    pruned = stepwise(model, [row], [])[0]
    graph, profile = tiny_graph(architecture), tiny_profile(architecture)
    for index, node in enumerate(attention_nodes(graph.module)):
        if not model.plan.layers[index].page:
            continue
        shape = profile.shapes[index]
        out = output_projection(graph.module, node, shape.q_heads, shape.v_head_dim)
        assert out is not None
        moment = profile.vv(index) if sinks else profile.v_cov(index)
        axes = torch.linalg.eigh(profile.v_cov(index)).eigenvectors
        if basis == "hadamard":
            axes = hadamard(shape.v_head_dim, index).expand(shape.kv_heads, -1, -1)
        weight = attribute(graph.module, out.weight).double()[:, out.index]
        heads = weight.unflatten(1, (shape.kv_heads, -1))
        gain = torch.einsum("ohgd,hde->ohge", heads, axes).square().sum((0, 2))
        score = torch.einsum("hde,hdf,hfe->he", axes, moment, axes) * gain
        kept = score >= score.sort(-1).values[:, shape.v_head_dim // 2 :][:, :1]
        projector = ((axes * kept[:, None]) @ axes.mT).float()
        mean = profile.v_mean(index).float() * (not sinks)
        offset = (mean - torch.einsum("hd,hde->he", mean, projector))[None, :, None]
        with graph.module.graph.inserting_before(node):
            matmul, add = torch.ops.aten.matmul.default, torch.ops.aten.add.Tensor
            projected = graph.module.graph.call_function(matmul, (node.args[2], projector))
            node.update_arg(2, graph.module.graph.call_function(add, (projected, offset)))
    ids = torch.tensor([row])
    inputs = (ids, torch.arange(30)[None], torch.ones_like(ids), torch.arange(30))
    torch.testing.assert_close(
        pruned, torch.fx.Interpreter(graph.module).run(*inputs)[0], atol=5e-4, rtol=1e-3
    )


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("think: {}", "kitty: {group_size: 8}"),
        ("think: {}", "transform: {}"),
        ("think: {mode: fold}", "int8: {}"),
        ("fold-values: {basis: pca}", "cskv: {group_size: 8}"),
        ("transform: {}", "kivi: {group_size: 8}"),
    ],
)
def test_passes_refuse_layers_that_others_changed(first: str, second: str) -> None:
    name, before = second.split(":", maxsplit=1)[0], first.split(":", maxsplit=1)[0]
    with pytest.raises(PassError, match=rf"layer 0: {name} cannot follow {before}.*different layers"):
        compiled("llama", recipe(f"\n  - {first}\n  - {second}"))
    options = "layers: [0]}" if first.endswith("{}") else ", layers: [0]}"
    apart = (
        f"\n  - {first[:-1]}{options}\n  - {second[:-1]}{'' if second.endswith('{}') else ', '}layers: [1]}}"
    )
    assert compiled("llama", recipe(apart)).plan.bytes_per_token() > 0


def test_scores_that_no_request_has_are_refused() -> None:
    with pytest.raises(PassError, match="use score: think"):
        compiled("llama", recipe("\n  - think: {mode: request, score: centred}"))


def test_fewer_channels_cost_fewer_bytes() -> None:
    sizes = [
        compiled("llama", recipe(f"\n  - think: {{keep_ratio: {r}}}")).plan.bytes_per_token()
        for r in (1, 0.75, 0.5)
    ]
    assert sizes == sorted(sizes, reverse=True)
    both = compiled("llama", recipe("\n  - think: {keep_ratio: 0.5}\n  - kivi: {group_size: 8}")).plan
    k = both.layers[0].heads[0].k
    assert [(p.bits, p.channels) for p in k.planes] == [(2, 8)]


# kivi


def test_kivi_refuses_groups_that_do_not_divide() -> None:
    with pytest.raises(PassError, match="layer 0: group_size 24 does not divide the page of 8 tokens; use 8"):
        compiled("llama", recipe("\n  - kivi: {group_size: 24}"))
    wide = "windows: {sinks: 2, recent: 4, page: 48}\n"
    with pytest.raises(PassError, match="layer 0: group_size 48 does not divide head_dim 16; use 8 or 16"):
        compiled("llama", recipe("\n  - kivi: {group_size: 48}", wide))


def test_kivi_residual_overrides_the_window() -> None:
    plan = compiled("llama", recipe("\n  - kivi: {group_size: 8, residual: 32}")).plan
    assert {layer.recent for layer in plan.layers} == {32}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_kivi_error_shrinks_with_bits(bits: int) -> None:
    """Logit error through the cache stays within what the step size allows, and falls with the width."""
    rows = tokens(60)
    exact = transformers_logits("llama", rows[0])
    model = runnable("llama", recipe(f"\n  - kivi: {{k_bits: {bits}, v_bits: {bits}, group_size: 8}}"))
    logits = stepwise(model, rows, range(30, 60))[0]
    error = F.mse_loss(logits[30:], exact[30:]).sqrt() / exact[30:].std()
    assert 0 < error < 2.0 * math.pow(2, 1 - bits)


def test_a_pass_that_needs_statistics_says_so() -> None:
    with pytest.raises(PassError, match="think needs calibration statistics; give --profile"):
        run_passes(tiny_graph("llama"), None, recipe("\n  - think: {}"))
    run_passes(tiny_graph("llama"), None, recipe("\n  - think: {mode: request}"))


def test_the_graph_given_is_left_alone() -> None:
    graph = tiny_graph("llama")
    before = copy.deepcopy(graph.module.state_dict())
    run_passes(graph, tiny_profile("llama"), recipe("\n  - fold-values: {}\n  - think: {mode: fold}"))
    assert all(torch.equal(before[k], v) for k, v in graph.module.state_dict().items())
    assert len(attention_nodes(graph.module)) == 2
