"""Statistics against naive float64 loops; the profile's files, merging and derived quantities."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcc import sketch, statistics
from kvcc.cli.profile import command
from kvcc.errors import ProfileError
from kvcc.profile import Profile, Source, merge, sorted_sources, summarize
from kvcc.runtime.identity import ModelIdentity
from kvcc.statistics import LayerShape, LayerStatistics

SKIP = 16
GQA = LayerShape(q_heads=6, kv_heads=2, head_dim=8, v_head_dim=6, scale=0.3)
MHA = LayerShape(q_heads=3, kv_heads=3, head_dim=8, v_head_dim=8, scale=0.35)
MODEL = ModelIdentity(
    name="tiny", model_type="llama", layers=2, q_heads=6, kv_heads=2, head_dim=8, hidden_size=48,
    vocab_size=64, context_length=512, dtype="float32", digest="sha256:aa", tokenizer_digest="sha256:bb",
)  # fmt: skip

Prompt = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def prompt(shape: LayerShape, length: int, seed: int, dtype: torch.dtype = torch.float32) -> Prompt:
    """Random q, k, v with a different mean and spread in every channel."""
    random = torch.Generator().manual_seed(seed)

    def draw(heads: int, dim: int) -> torch.Tensor:
        spread, mean = torch.rand(2, heads, 1, dim, generator=random) * 3
        return (torch.randn(heads, length, dim, generator=random) * spread + mean - 1).to(dtype)

    kv = draw(shape.kv_heads, shape.head_dim), draw(shape.kv_heads, shape.v_head_dim)
    return draw(shape.q_heads, shape.head_dim), *kv


def name_of(k: torch.Tensor) -> str:
    """Another one for every prompt: samples are drawn by it."""
    return repr(k.double().flatten()[:8].tolist())


def measured(shape: LayerShape, prompts: list[Prompt], **options: torch.Tensor | None) -> LayerStatistics:
    """Statistics of prompts whose probe rows are drawn by their index."""
    held = statistics.empty(shape)
    for i, (q, k, v) in enumerate(prompts):
        probes = torch.tensor(statistics.probe_rows(q.shape[1], f"prompt {i}"))
        extra = {"visible": None, "sinks": None} | options
        draws = statistics.token_draws(q.shape[1], name_of(k))
        statistics.add_prompt(held, shape, q, k, v, probes=probes, draws=draws, skip_first=SKIP, **extra)
    return held


def naive(
    shape: LayerShape, prompts: list[Prompt], sinks: torch.Tensor | None = None
) -> dict[str, np.ndarray]:
    """What the fields mean, one token at a time."""
    H, D, E, G = shape.kv_heads, shape.head_dim, shape.v_head_dim, shape.group
    out = {
        name: np.zeros([int(n) for n in size])
        for name, (_, size) in statistics.layout(shape).items()
        if not name.endswith(("sketch", "sample", "draws", "grad", "grad_rows", "cost_sum", "races"))
        and "_won" not in name
    }
    for name in ("k_min", "v_min"):
        out[name][:] = np.inf
    for name in ("k_max", "v_max"):
        out[name][:] = -np.inf
    assert out["vv_sum"].shape == (H, E, E)
    for i, each in enumerate(prompts):
        q, k, v = (x.double().numpy() for x in each)
        T = q.shape[1]
        out["prompts"] += 1
        for t in range(SKIP, T):
            out["tokens"] += 1
            for h in range(H):
                for g in range(G):
                    out["q_sum"][h] += q[h * G + g, t]
                    out["qq_sum"][h] += np.outer(q[h * G + g, t], q[h * G + g, t])
                for name, x in (("k", k[h, t]), ("v", v[h, t])):
                    out[f"{name}_sum"][h] += x
                    out[f"{name}{name}_sum"][h] += np.outer(x, x)
                    out[f"{name}_min"][h] = np.minimum(out[f"{name}_min"][h], x)
                    out[f"{name}_max"][h] = np.maximum(out[f"{name}_max"][h], x)
        for first in range(SKIP, T, statistics.PAGE):
            page = k[:, first : first + statistics.PAGE]
            for h in range(H):
                mean = page[h].sum(0) / page.shape[1]
                out["k_page_sum"][h] += page.shape[1] * np.outer(mean, mean)
        for h in range(H):
            for d in range(D):
                last = q[h * G : (h + 1) * G, max(0, T - 32) :, d]
                out["think_sum"][h, d] += np.mean(last**2) * np.mean(k[h, :, d] ** 2)
        _naive_attention(out, shape, (q, k), statistics.probe_rows(T, f"prompt {i}"), sinks)
    return out


def _naive_attention(
    out: dict[str, np.ndarray],
    shape: LayerShape,
    heads: tuple[np.ndarray, np.ndarray],
    probes: list[int],
    sinks: torch.Tensor | None,
) -> None:
    q, k = heads
    T = q.shape[1]
    window = shape.window or T
    saliency, looks = np.zeros((shape.kv_heads, T)), np.zeros(T)
    for m in probes:
        out["rows"] += 1
        keys = range(max(0, m - window + 1), m + 1)
        looks[list(keys)] += 1
        for n in keys:
            out["uniform_sum"][_class(n, m)] += 1 / len(keys)
        for h in range(shape.kv_heads):
            mass = np.zeros(3)
            for g in range(h * shape.group, (h + 1) * shape.group):
                logits = np.array([q[g, m] @ k[h, n] * shape.scale for n in keys])
                if shape.softcap:
                    logits = shape.softcap * np.tanh(logits / shape.softcap)
                total = np.exp(logits).sum() + (0 if sinks is None else math.exp(sinks[g]))
                for n, weight in zip(keys, np.exp(logits) / total, strict=True):
                    mass[_class(n, m)] += weight / shape.group
                    saliency[h, n] += weight / shape.group
            out["mass_sum"][h] += mass
            out["mass_sq_sum"][h] += mass**2
    for n in range(T):
        if looks[n]:
            out["saliency_keys"][_class(n, T - 1)] += 1
            out["saliency_sum"][:, _class(n, T - 1)] += saliency[:, n] / looks[n]
            out["saliency_sq_sum"][:, _class(n, T - 1)] += (saliency[:, n] / looks[n]) ** 2


def _class(key: int, query: int) -> int:
    if key < 16:
        return 0
    return 2 if query - key < 64 else 1


def agree(held: LayerStatistics, expected: dict[str, np.ndarray], rtol: float = 1e-12) -> None:
    for name, want in expected.items():
        got = held.tensors()[name].double().numpy()
        if name.startswith(("mass", "saliency_s")):  # attention is computed in float32, the sums are not
            np.testing.assert_allclose(got, want, rtol=max(rtol, 2e-5), atol=1e-11, err_msg=name)
        else:
            np.testing.assert_allclose(got, want, rtol=rtol, atol=rtol * 10, err_msg=name)


LENGTHS = [1, SKIP - 1, SKIP, SKIP + 1, 33, 130]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape", [GQA, MHA, replace(GQA, kv_heads=1, window=37)], ids=["gqa", "mha", "mqa-window"]
)
def test_statistics_equal_naive_loops(shape: LayerShape, dtype: torch.dtype) -> None:
    prompts = [prompt(shape, length, seed, dtype) for seed, length in enumerate(LENGTHS)]
    agree(measured(shape, prompts), naive(shape, prompts))


def test_statistics_with_softcap_and_attention_sinks_equal_naive_loops() -> None:
    shape = replace(GQA, softcap=4.0)
    prompts = [prompt(shape, length, length) for length in (3, 90)]
    sinks = torch.linspace(-1, 2, shape.q_heads)
    agree(measured(shape, prompts, sinks=sinks), naive(shape, prompts, sinks))


def test_statistics_take_visibility_from_the_mask_when_there_is_one() -> None:
    shape = replace(GQA, window=20)
    one = prompt(shape, 70, 1)
    row = torch.arange(70)
    visible = (row[:, None] >= row) & (row[:, None] - row < 20)
    agree(measured(replace(shape, window=None), [one], visible=visible), naive(shape, [one]))


def test_sketch_counts_every_body_value_once() -> None:
    held = measured(GQA, [prompt(GQA, length, length) for length in LENGTHS])
    body = sum(max(0, length - SKIP) for length in LENGTHS)
    assert held.k_sketch.sum(-1).unique().tolist() == [body]
    assert held.v_sketch.sum(-1).unique().tolist() == [body]


def test_covariance_survives_a_mean_far_from_zero() -> None:
    q, k, v = prompt(GQA, 400, 3)
    k = k + 700.0  # Qwen2's key biases are of this size
    profile = replace(tiny_profile([]), shapes=(GQA,) * 2, layers=(measured(GQA, [(q, k, v)]),) * 2)
    want = np.stack([np.cov(head.double().numpy().T, bias=True) for head in k[:, SKIP:]])
    np.testing.assert_allclose(profile.k_cov(0).numpy(), want, rtol=1e-8, atol=1e-8)


VALUES = (
    st.floats(-4000, 4000, width=32) | st.floats(-(2.0**-10), 2.0**-10, width=32) | st.floats(-2, 2, width=16)
)


@given(st.lists(VALUES, min_size=1, max_size=200), st.floats(0, 1))
def test_sketch_error_is_within_what_it_states(values: list[float], p: float) -> None:
    counts = torch.zeros(1, 1, sketch.BUCKETS, dtype=torch.int32)
    sketch.add(counts, torch.tensor(values).view(1, -1, 1))
    exact = sorted(values)[math.floor(p * (len(values) - 1))]
    allowed = max(sketch.RELATIVE_ERROR * abs(exact), sketch.ABSOLUTE_ERROR)
    assert abs(float(sketch.quantile(counts, p)[0, 0]) - exact) <= allowed * (1 + 1e-6)


def test_sketch_edges() -> None:
    counts = torch.zeros(1, 2, sketch.BUCKETS, dtype=torch.int32)
    assert sketch.quantile(counts, 0.5).isnan().all()
    edge = torch.tensor([-1e30, -4096.0, -(2.0**-12), -0.0, 0.0, 2.0**-12, 4095.9, 1e30])
    sketch.add(counts, edge.view(1, -1, 1).expand(1, -1, 2))
    assert counts[0].sum(-1).tolist() == [8, 8]
    assert counts[0, 0, [0, 1, sketch.BUCKETS // 2, sketch.BUCKETS - 1]].tolist() == [2, 0, 2, 2]
    assert sketch.representatives().diff().min() > 0
    with pytest.raises(ValueError, match=r"1\.5 is not between"):
        sketch.quantile(counts, 1.5)


def test_quantiles_of_a_profile_stay_inside_the_exact_range() -> None:
    profile = tiny_profile([(0, 90)])
    low, high = profile.k_range(0)
    assert torch.equal(profile.k_quantile(0, 0).maximum(low), profile.k_quantile(0, 0))
    exact = np.sort(prompt(GQA, 90, 0)[1][:, SKIP:].double().numpy(), axis=1)[:, math.floor(0.9 * 73)]
    np.testing.assert_allclose(
        profile.k_quantile(0, 0.9).numpy(), exact, rtol=0.0304, atol=sketch.ABSOLUTE_ERROR
    )
    assert (profile.v_quantile(1, 1.0) <= profile.v_range(1)[1]).all()
    assert (profile.k_quantile(0, 1.0) <= high).all()


def test_probe_rows_are_the_last_and_some_earlier_ones_drawn_by_the_prompt() -> None:
    assert statistics.probe_rows(1, "a") == [0]
    assert statistics.probe_rows(20, "a") == list(range(20))
    rows = statistics.probe_rows(1000, "a")
    assert len(rows) == 32
    assert rows[-16:] == list(range(984, 1000))
    assert sorted(set(rows)) == rows
    assert rows == statistics.probe_rows(1000, "a") != statistics.probe_rows(1000, "b")


def tiny_profile(prompts: list[tuple[int, int]], name: str = "set") -> Profile:
    """A two-layer profile of random prompts given by (seed, length)."""
    data = [prompt(GQA, length, seed) for seed, length in prompts]
    layers = measured(GQA, data), measured(GQA, [(q * 2, k + 1, v) for q, k, v in data])
    tokens = sum(length for _, length in prompts)
    source = Source(
        name=name, digest=f"sha256:{prompts}", seed=0, samples=len(prompts) or 1, tokens=tokens or 1
    )
    ids = tuple(sorted(f"{seed:016x}" for seed, _ in prompts))
    return Profile(MODEL, SKIP, (source,), ids, (GQA, GQA), layers)


def same(a: Profile, b: Profile, rtol: float = 0.0, atol: float | None = None, sketches: bool = True) -> None:
    assert replace(a, layers=()) == replace(b, layers=())
    atol = (1e-12 if rtol else 0.0) if atol is None else atol
    for x, y in zip(a.layers, b.layers, strict=True):
        for name, tensor in x.tensors().items():
            other = y.tensors()[name]
            assert tensor.dtype == other.dtype
            if sketches or "sketch" not in name:
                assert torch.allclose(tensor, other, rtol=rtol, atol=atol, equal_nan=True), name


LENGTH_LISTS = st.lists(st.sampled_from([1, 5, SKIP, SKIP + 1, 40]), min_size=1, max_size=3)


@settings(max_examples=20, deadline=None)
@given(st.tuples(LENGTH_LISTS, LENGTH_LISTS, LENGTH_LISTS))
def test_merging_is_commutative_and_associative(lengths: tuple[list[int], ...]) -> None:
    sets = [[(100 * i + j, n) for j, n in enumerate(each)] for i, each in enumerate(lengths)]
    a, b, c = (tiny_profile(each, f"set {i}") for i, each in enumerate(sets))
    same(merge([a, b]), merge([b, a]))
    same(merge([merge([a, b]), c]), merge([a, merge([c, b])]), rtol=1e-9)


def test_merging_equals_one_measurement_of_both() -> None:
    # Probe rows depend on the prompt; these prompts are short enough to have every row probed.
    first, second = [(1, 30), (2, 17)], [(3, 3), (4, 32)]
    a, b, both = tiny_profile(first, "a"), tiny_profile(second, "b"), tiny_profile(first + second)
    same(merge([b, a]), replace(both, sources=sorted_sources(b.sources + a.sources)), rtol=1e-9)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {"model": MODEL.model_copy(update={"digest": "sha256:other"})},
            "model differs: sha256:aa and sha256:other",
        ),
        ({"model": MODEL.model_copy(update={"tokenizer_digest": "sha256:x"})}, "tokenizer differs"),
        ({"model": MODEL.model_copy(update={"dtype": "float16"})}, "dtype differs: float32 and float16"),
        ({"statistics_version": 4}, "statistics version differs: 5 and 4"),
        ({"positions": 512}, "positions differs: 0 and 512"),
        ({"skip_first": 4}, "skip_first differs: 16 and 4"),
        ({"shapes": (GQA, replace(GQA, scale=1.0))}, "layer shapes differ"),
        ({"prompts": ("0000000000000001",)}, "1 prompts are in both and would count twice"),
    ],
)
def test_profiles_that_do_not_belong_together_refuse_to_merge(change: dict, reason: str) -> None:
    a, b = tiny_profile([(1, 20)]), tiny_profile([(2, 20)])
    with pytest.raises(ProfileError, match=reason):
        merge([a, replace(b, **change)])


def test_merging_nothing_or_too_much_is_refused() -> None:
    with pytest.raises(ProfileError, match="at least one"):
        merge([])
    a, b = tiny_profile([(1, 20)]), tiny_profile([(2, 20)])
    huge = Source(name="huge", digest="", seed=0, samples=1, tokens=2**31 - 5)
    with pytest.raises(ProfileError, match="more than 2147483647 tokens"):
        merge([a, replace(b, sources=(huge,))])


def test_derived_quantities_equal_numpy() -> None:
    profile = tiny_profile([(5, 60), (6, 50)])
    data = [[x[:, SKIP:].double().numpy() for x in prompt(GQA, n, s)] for s, n in ((5, 60), (6, 50))]
    q, k, v = (np.concatenate(each, axis=1) for each in zip(*data, strict=True))
    for h in range(2):
        group = q[3 * h : 3 * h + 3].reshape(-1, 8)
        close = {
            "k_mean": k[h].mean(0), "v_mean": v[h].mean(0), "q_mean": group.mean(0),
            "qq": group.T @ group / len(group),
            "k_cov": np.cov(k[h].T, bias=True), "v_cov": np.cov(v[h].T, bias=True),
            "kk": k[h].T @ k[h] / len(k[h]), "vv": v[h].T @ v[h] / len(v[h]),
        }  # fmt: skip
        for name, want in close.items():
            np.testing.assert_allclose(getattr(profile, name)(0)[h].numpy(), want, rtol=1e-9, atol=1e-11)
    assert profile.body_tokens(1) == k.shape[1] == 78
    assert profile.tokens == 110


def test_gamma_is_the_logit_error_of_dropping_channels() -> None:
    profile = tiny_profile([(7, 80)])
    q, k, _ = (x[:, SKIP:].double().numpy() for x in prompt(GQA, 80, 7))
    dropped = [0, 3, 4]
    for h in range(2):
        queries = q[3 * h : 3 * h + 3].reshape(-1, 8)[:, dropped]
        lost = GQA.scale * queries @ k[h][:, dropped].T
        want = ((lost - lost.mean(1, keepdims=True)) ** 2).mean()
        got = profile.channel_gamma(0)[h][dropped][:, dropped].sum()
        assert float(got) == pytest.approx(want, rel=1e-9)


def test_think_score_mass_and_saliency_are_means() -> None:
    profile = tiny_profile([(1, 40), (2, 20)])
    held = profile.layers[0]
    assert torch.equal(profile.think_score(0), held.think_sum / 2)
    mass, square = profile.attention_mass(0)
    assert torch.allclose(mass.sum(1), torch.ones(2, dtype=torch.float64), atol=1e-6)
    assert (square <= mass + 1e-9).all()
    mean, _ = profile.saliency(0)
    assert mean[:, 1].isnan().all()  # no prompt is long enough for middle keys
    assert mean[:, [0, 2]].isfinite().all()


def test_a_profile_without_body_tokens_and_an_unknown_layer_say_so() -> None:
    profile = tiny_profile([(1, SKIP - 1)])
    for call in (profile.k_mean, profile.k_cov, profile.qq, profile.v_range, profile.channel_gamma):
        with pytest.raises(ProfileError, match="no token after the first 16"):
            call(0)
    with pytest.raises(ProfileError, match="layers 0 to 1, not 2"):
        profile.k_mean(2)
    with pytest.raises(ProfileError, match="layers 0 to 1, not -1"):
        profile.think_score(-1)


def test_a_profile_belongs_to_one_model() -> None:
    profile = tiny_profile([(1, 20)])
    profile.require_model(MODEL.model_copy(update={"name": "the same, elsewhere"}))
    with pytest.raises(ProfileError, match=r"taken on tiny \(sha256:aa\), not on other \(sha256:zz\)"):
        profile.require_model(MODEL.model_copy(update={"name": "other", "digest": "sha256:zz"}))


def test_saving_and_loading_keeps_every_bit(tmp_path: Path) -> None:
    profile = tiny_profile([(1, 40), (2, 3)])
    profile.save(tmp_path / "deep" / "p")
    same(Profile.load(tmp_path / "deep" / "p"), profile)
    empty = tiny_profile([(1, 3)])  # minima of no token are infinite
    (tmp_path / "deep" / "p" / "statistics-mine.txt").touch()
    (tmp_path / "deep" / "p" / "statistics-0123456789abcdef.safetensors.tmp").touch()  # of a killed write
    empty.save(tmp_path / "deep" / "p")
    same(Profile.load(tmp_path / "deep" / "p"), empty)
    kept = {path.name for path in (tmp_path / "deep" / "p").iterdir()}
    assert len(kept) == 3
    assert "statistics-mine.txt" in kept


@pytest.mark.parametrize("fail_at", [0, 1])
@pytest.mark.parametrize("older", [False, True])
def test_a_write_that_stops_leaves_the_old_profile_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail_at: int, older: bool
) -> None:
    old, new = tiny_profile([(1, 30)]), tiny_profile([(2, 40)])
    if older:
        old.save(tmp_path)
    renames, rename = [], Path.replace

    def stops(self: Path, target: Path) -> Path:
        renames.append(target)
        if len(renames) > fail_at:
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", stops)
    with pytest.raises(ProfileError, match=r"cannot write profile .*: No space left on device"):
        new.save(tmp_path)
    monkeypatch.undo()
    if older:
        same(Profile.load(tmp_path), old)
    else:
        with pytest.raises(ProfileError, match="no profile at"):
            Profile.load(tmp_path)
    new.save(tmp_path)
    same(Profile.load(tmp_path), new)
    assert len(list(tmp_path.iterdir())) == 2


def edit(folder: Path, **changes: object) -> None:
    document = json.loads((folder / "profile.json").read_text())
    (folder / "profile.json").write_text(json.dumps(document | changes))


def test_damaged_profiles_are_refused_with_one_line(tmp_path: Path) -> None:
    def damaged(reason: str, **changes: object) -> None:
        tiny_profile([(1, 20)]).save(tmp_path)
        edit(tmp_path, **changes)
        with pytest.raises(ProfileError, match=reason):
            Profile.load(tmp_path)

    tensors = {"file": "statistics-0123456789abcdef.safetensors", "sha256": "0" * 64}
    damaged("schema 2 with statistics 5; this kvcc reads schema 1", schema_version=2, novelty=1)
    damaged("schema 1 with statistics 9.*calibrate again", statistics_version=9)
    damaged("novelty: Extra inputs are not permitted", novelty=1)
    damaged("skip_first: Input should be greater than or equal to 0", skip_first=-1)
    damaged(r"tensors\.file: String should match", tensors=tensors | {"file": "../statistics.safetensors"})
    damaged("statistics-0123456789abcdef.safetensors is missing", tensors=tensors)
    damaged("1 layers described, but the model has 2", layers=[GQA_LAYER])
    damaged(
        r"layer 0: statistic q_sum is torch.float64 \(2, 8\), not torch.float64 \(2, 7\)",
        layers=[GQA_LAYER | {"head_dim": 7}] * 2,
    )


GQA_LAYER = dict(vars(GQA))


def test_damaged_files_are_refused_with_one_line(tmp_path: Path) -> None:
    tiny_profile([(1, 20)]).save(tmp_path)
    (file,) = tmp_path.glob("statistics-*")
    content = file.read_bytes()
    for broken in (content[:-1], content[:-9] + b"\x01" + content[-8:], b""):
        file.write_bytes(broken)
        with pytest.raises(ProfileError, match="truncated or altered"):
            Profile.load(tmp_path)
    for text in ("", "[1]", '{"schema_version": 1}', '{"a": '):
        (tmp_path / "profile.json").write_text(text)
        with pytest.raises(ProfileError, match="not a kvcc profile"):
            Profile.load(tmp_path)
    for absent in (tmp_path / "nowhere", file):
        with pytest.raises(ProfileError, match="no profile at"):
            Profile.load(absent)


def test_fields_of_other_names_dtypes_or_shapes_are_refused() -> None:
    tensors = tiny_profile([(1, 20)]).layers[0].tensors()
    for changed, reason in (
        ({"k_sum": tensors["k_sum"].float()}, "here: statistic k_sum is torch.float32"),
        (
            {"rows": torch.zeros(1, dtype=torch.int64)},
            r"statistic rows is torch.int64 \(1,\), not torch.int64 \(\)",
        ),
        ({"novel": tensors["k_sum"]}, "missing or unknown statistics: novel"),
    ):
        with pytest.raises(ProfileError, match=reason):
            statistics.from_tensors(GQA, tensors | changed, "here")


def test_summary_and_commands(tmp_path: Path) -> None:
    a, b = tiny_profile([(1, 40)], "a"), tiny_profile([(2, 90)], "b")
    a.save(tmp_path / "a")
    b.save(tmp_path / "b")
    run = CliRunner()
    done = run.invoke(command, ["merge", *(str(tmp_path / n) for n in "ba"), "-o", str(tmp_path / "c")])
    assert done.exit_code == 0, done.output
    same(Profile.load(tmp_path / "c"), merge([a, b]))

    shown = json.loads(run.invoke(command, ["show", str(tmp_path / "c"), "--json"]).output)
    assert shown["model"]["name"] == "tiny"
    assert shown["prompts"] == 2
    assert [row["tokens"] for row in shown["layers"]] == [98, 98]
    assert shown["layers"] == summarize(Profile.load(tmp_path / "c"))
    table = run.invoke(command, ["show", str(tmp_path / "c")]).output
    assert "think" in table
    assert table.count("\n") > 5

    refused = run.invoke(command, ["merge", *[str(tmp_path / "a")] * 2, "-o", str(tmp_path / "d")])
    assert isinstance(refused.exception, ProfileError)
    assert not (tmp_path / "d").exists()


def test_summary_measures_what_it_says() -> None:
    shape = LayerShape(1, 1, 20, 20, 1.0)
    q, k, v = torch.ones(1, 100, 20), torch.ones(1, 100, 20), torch.ones(1, 100, 20)
    k[..., 7] = 9.0
    profile = replace(tiny_profile([]), shapes=(shape,), layers=(measured(shape, [(q, k, v)]),))
    (row,) = summarize(profile)
    assert row["k_outliers"] == 1
    assert row["k_energy_top10"] == pytest.approx(82 / 100)
    assert row["think_top_half"] == pytest.approx(90 / 100)
    assert row["k_max_abs"] == 9
    assert row["mass_sinks"] + row["mass_middle"] + row["mass_recent"] == pytest.approx(1)


# ---------------------------------------------------------------------------- sampled tokens


def test_samples_are_the_tokens_that_drew_least(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever order prompts and parts come in, and with their keys and values."""
    monkeypatch.setattr(statistics, "SAMPLED", 8)
    prompts = [prompt(GQA, length, seed) for seed, length in enumerate((5, 30, 17, 9))]
    whole = measured(GQA, prompts)
    drawn = []
    for _, k, v in prompts:
        draws = statistics.token_draws(k.shape[1], name_of(k))
        drawn += [(int(draws[t]), k[:, t], v[:, t]) for t in range(SKIP, k.shape[1])]
    drawn.sort(key=lambda one: one[0])
    assert whole.sample_draws.tolist() == [draw for draw, _, _ in drawn[:8]]
    assert torch.equal(whole.k_sample, torch.stack([k for _, k, _ in drawn[:8]]))
    assert torch.equal(whole.v_sample, torch.stack([v for _, _, v in drawn[:8]]))
    parts = []
    for each in prompts:
        held = statistics.empty(GQA)
        draws = statistics.token_draws(each[1].shape[1], name_of(each[1]))
        body_k, body_v = each[1][:, SKIP:], each[2][:, SKIP:]
        statistics._add_samples(held, draws[SKIP:], body_k, statistics.page_means(body_k), body_v)
        parts.append(held)
    for order in ((0, 1, 2, 3), (3, 1, 0, 2)):
        found = statistics.empty(GQA)
        for i in order:
            found = statistics.merged(found, parts[i])
        for name in ("sample_draws", "k_sample", "k_page_sample", "v_sample"):
            assert torch.equal(getattr(found, name), getattr(whole, name))


@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 200])
def test_means_of_pages(length: int) -> None:
    """Of runs of 64 keys, the last of which may be shorter."""
    k = torch.randn(2, length, 3, generator=torch.Generator().manual_seed(length)) + 7
    expected = [part.double().mean(1, keepdim=True).expand_as(part) for part in k.split(64, 1) if length]
    torch.testing.assert_close(statistics.page_means(k), torch.cat([k[:, :0].double(), *expected], 1))


def test_covariance_within_pages_is_that_of_what_is_left() -> None:
    prompts = [prompt(GQA, length, seed) for seed, length in enumerate((SKIP + 64, SKIP + 130, SKIP + 3))]
    layer = measured(GQA, prompts)
    profile = replace(tiny_profile([]), shapes=(GQA,), layers=(layer,))
    parts = [part.double() for _, k, _ in prompts for part in k[:, SKIP:].split(64, 1)]
    left = torch.cat([part - part.mean(1, keepdim=True) for part in parts], 1)
    torch.testing.assert_close(profile.k_page_cov(0), left.mT @ left / left.shape[1])
    samples, around = profile.samples(0)[0], profile.page_samples(0)
    torch.testing.assert_close((samples - around).double().var(1), left.var(1), atol=1e-5, rtol=1e-5)


def test_few_tokens_are_all_sampled() -> None:
    held = measured(GQA, [prompt(GQA, SKIP + 3, 0)])
    assert (held.sample_draws < 2**63 - 1).sum() == 3
