"""The report: sections, escaping, degenerate plans and verdicts; the charts it is drawn with."""

import json
import math
import re
from html import unescape
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from kvcc import charts
from kvcc.charts import Line, Mark
from kvcc.cli.report import command
from kvcc.errors import ArtifactError, ArtifactUnwritable
from kvcc.kernels.layout import Plane, Side
from kvcc.report import render_report, report_facts, report_html
from kvcc.runtime import artifact as stored
from kvcc.runtime.identity import ModelIdentity
from kvcc.runtime.plan import HeadPlan, LayerPlan, Plan

HOSTILE = "<script>alert(1)</script>\"'&\x00\u202e</title><img src=https://evil.example/x>"
VOID = {"meta", "br", "img", "link", "input", "hr"}
RECIPE: dict[str, Any] = {
    "name": "think-40-kivi-4",
    "summary": "40 % of K channels dropped",
    "windows": {"sinks": 16, "recent": 64, "page": 64},
    "passes": [{"think": {"keep_ratio": 0.6}}, {"kivi": {"k_bits": 4}}],
}
SECTIONS = ["memory", "channels", "accuracy", "by-layer", "retrieval", "front"]
PROVENANCE = {"kvcc": "0.1.0", "torch": "2.13.0", "files": {"plan.json": "ab" * 32}}


def identity(**changes: Any) -> ModelIdentity:
    facts: dict[str, Any] = {
        "name": "SmolLM2-135M", "model_type": "llama",
        "layers": 30, "q_heads": 9, "kv_heads": 3, "head_dim": 64,
        "hidden_size": 576, "vocab_size": 49152, "context_length": 8192, "dtype": "float32",
        "digest": "sha256:" + "1f" * 32, "tokenizer_digest": "sha256:" + "2e" * 32,
    }  # fmt: skip
    return ModelIdentity(**(facts | changes))


def head(k_planes: tuple[tuple[int, int], ...], v_bits: int = 4, dim: int = 64) -> HeadPlan:
    """A KV head whose K planes are (bits, channels)."""
    planes = tuple(Plane(bits, channels) for bits, channels in k_planes)
    return HeadPlan(k=Side(planes, "tokens", 64), v=Side((Plane(v_bits, dim),), "channels", dim))


def layer(*heads: HeadPlan, dim: int = 64, **changes: Any) -> LayerPlan:
    facts: dict[str, Any] = {
        "q_heads": 3 * len(heads), "kv_heads": len(heads), "k_dim": dim, "v_dim": dim,
        "sinks": 16, "recent": 64, "page": 64, "heads": heads, "select": "static",
    }  # fmt: skip
    return LayerPlan(**(facts | changes))


def ring(window: int = 128) -> LayerPlan:
    return LayerPlan(q_heads=9, kv_heads=3, k_dim=64, v_dim=64, sinks=0, recent=0, page=0, window=window)


def plan(*layers: LayerPlan) -> Plan:
    return Plan(dtype="float32", layers=layers)


def mean_head(means: int, *k_planes: tuple[int, int]) -> HeadPlan:
    """A KV head of unit steps with page means of K; planes are (bits, channels)."""
    planes = tuple(Plane(bits, channels) for bits, channels in k_planes)
    k = Side(planes, "tokens", steps="unit", token_scales=bool(planes), page_means=means)
    return HeadPlan(k=k, v=Side((Plane(2, 64),), "channels", steps="unit", token_scales=True))


PLANS = {
    "thirty layers": plan(
        *(layer(head(((4, 40),)), head(((8, 8), (4, 24))), head(((2, 40),), 2)) for _ in range(30))
    ),
    "one layer": plan(layer(head(((4, 64),)), select="all")),
    "sliding windows only": plan(ring(), ring(4096)),
    "alternating": plan(ring(), layer(head(((4, 40),)), head(((3, 40),)), head(((4, 40),))), ring()),
    "a head without K": plan(layer(head(()), head(((16, 8), (2, 56))), select="static")),
    "page means": plan(layer(mean_head(64), mean_head(40, (4, 8), (2, 24)), head(((4, 40),)))),
    "different head counts": plan(layer(head(((4, 40),))), layer(head(((4, 40),)), head(((2, 16),)))),
}


def verdict(**changes: Any) -> dict[str, Any]:
    """What `Verdict.as_dict` gives, with made-up numbers."""

    def text(kind: str, more: float) -> dict[str, Any]:
        buckets = [
            {"first": 1024 + 128 * i, "last": 1152 + 128 * i, "tokens": 512, "kl": 0.01 * more + 0.001 * i,
             "top1": 0.95, "nll": 2.61, "nll_reference": 2.6}
            for i in range(4)
        ]  # fmt: skip
        return {"kind": kind, "buckets": buckets, "sequences": 4, "cache_tokens": 1535,
                "cache_bytes": 10_400_000,
                "formula_bytes": 10_396_800, "overall": {}}  # fmt: skip

    retrieval = [
        {
            "kind": kind,
            "tokens": 1024,
            "question_visible": visible,
            "tasks": 4,
            "score": 75.0,
            "reference": 100.0,
        }
        for kind in ("needle", "key_value", "variable_tracking")
        for visible in (True, False)
    ]
    gates = [
        {"name": "kl", "limit": 0.02, "measured": 0.0115, "holds": True},
        {"name": "top1", "limit": 0.97, "measured": 0.95, "holds": False},
        {"name": "needle_drop_points", "limit": 2, "measured": None, "holds": False},
    ]
    return {
        "artifact": "model.kvcc", "against": "SmolLM2-135M", "recipe": "think-40-kivi-4", "seed": 5,
        "size": {"texts": 4, "length": 1536, "context": 1024, "retrieval_lengths": [1024]},
        "texts": [text("prose", 1), text("code", 2)], "retrieval": retrieval,
        "greedy": {"prompts": 4, "tokens": 64, "same": 0.8125, "first_difference": 31.5},
        "bytes_per_token": 5000.0, "bits_per_element": 3.5, "uncompressed_bytes_per_token": 23040,
        "gates": gates, "passed": False,
    } | changes  # fmt: skip


class Page(HTMLParser):
    """Checks nesting and gathers tags, attributes and visible text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())

    @property
    def sections(self) -> list[str | None]:
        return [attributes.get("id") for tag, attributes in self.seen if tag == "section"]

    @property
    def ids(self) -> set[str | None]:
        return {attributes["id"] for _, attributes in self.seen if "id" in attributes}

    @property
    def targets(self) -> set[str | None]:
        """What links lead to."""
        return {str(attributes["href"])[1:] for _, attributes in self.seen if "href" in attributes}

    @property
    def charts(self) -> int:
        return sum(tag == "svg" for tag, _ in self.seen)


def render(which: Plan, measured: dict[str, Any] | None = None, **changes: Any) -> str:
    return report_html(report_facts(which, identity(**changes), RECIPE, PROVENANCE, measured))


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("measured", [None, verdict()], ids=["unmeasured", "measured"])
def test_page_is_whole_and_loads_nothing(name: str, measured: dict[str, Any] | None) -> None:
    html = render(PLANS[name], measured)
    page = Page(html)
    assert not re.search(
        r"https?:|//[a-z]|url\(|@import|<script|<link|<img|<iframe| src=| href=(?!\"#)", html
    )
    assert page.targets <= page.ids
    assert not re.search(r"\b(nan|inf|None|undefined)\b", page.words)
    assert page.sections == [*SECTIONS, *(["gates"] if measured else []), "provenance"]
    assert page.charts == (1 if name == "sliding windows only" else 4) + (2 if measured else 0)
    assert "think-40-kivi-4" in page.words
    assert "sha256:1f1f" in page.words
    assert "ab" * 32 in page.words


def test_without_a_verdict_it_says_so_and_how_to_measure() -> None:
    words = Page(render(PLANS["one layer"])).words
    assert "Accuracy was not measured." in words
    assert "kvcc check model.kvcc --against MODEL --store" in words


def test_verdict_is_shown_in_words() -> None:
    words = Page(render(PLANS["thirty layers"], verdict())).words
    assert f"{100 * math.expm1(0.01):+.2f} %" in words  # perplexity
    assert f"{math.exp(2.61):,.3f}" in words
    assert "0.01150" in words  # mean KL of prose over four equal buckets
    assert "variable tracking 1,024 hidden 75 % 100 % 4" in words
    assert "kl ≤ 0.02 0.0115 ✓ pass" in words
    assert "top1 ≥ 0.97 0.95 ✗ fail" in words
    assert "needle drop points ≤ 2 not measured ✗ fail" in words
    assert "1 of 3 gates hold" in words
    assert "seed of the check 5" in words
    assert "81.2 % the same token" in words


def test_bits_are_of_the_original_model_when_measured() -> None:
    words = Page(render(PLANS["thirty layers"], verdict(uncompressed_bytes_per_token=30_000))).words
    assert "3.50 bits per element" in words
    assert "bytes a token, fp16 30,000" in words
    assert "bytes a token, fp16 23,040" in Page(render(PLANS["thirty layers"])).words


def test_what_the_verdict_claims_to_have_computed_is_not_believed() -> None:
    lying = verdict(passed=True)
    for gate in lying["gates"]:
        gate["holds"] = True
    assert render(PLANS["one layer"], lying) == render(PLANS["one layer"], verdict())


def test_json_and_verdict_give_the_same_page_every_time() -> None:
    first = render(PLANS["thirty layers"], verdict())
    assert first == render(PLANS["thirty layers"], json.loads(json.dumps(verdict())))


def test_hostile_names_are_text() -> None:
    measured = verdict(against=HOSTILE, size={HOSTILE: HOSTILE})
    measured["texts"][0]["kind"] = HOSTILE
    measured["retrieval"][0]["kind"] = HOSTILE
    measured["gates"][0]["name"] = HOSTILE
    recipe = {"name": HOSTILE, "summary": HOSTILE, "passes": [{HOSTILE: {HOSTILE: [HOSTILE]}}]}
    provenance = {HOSTILE: HOSTILE, "files": {HOSTILE: HOSTILE}}
    names = identity(name=HOSTILE, model_type=HOSTILE, digest=HOSTILE, tokenizer_digest=HOSTILE)
    html = report_html(report_facts(PLANS["alternating"], names, recipe, provenance, measured))
    page = Page(html)
    assert not {tag for tag, _ in page.seen} & {"script", "img", "link", "iframe"}
    assert not [a for _, attributes in page.seen for a in attributes if a.startswith("on") or a == "src"]
    assert page.targets <= page.ids
    assert "\x00" not in html
    assert "\u202e" not in html
    assert html.encode()
    assert "<script>alert(1)</script>" in page.words  # shown, not run


def test_the_recipe_reads_as_yaml() -> None:
    html = render(PLANS["one layer"])
    shown = re.search(r"<h3>Recipe</h3>\s*<pre>(.*?)</pre>", html, re.DOTALL)
    assert shown
    assert yaml.safe_load(unescape(shown[1])) == RECIPE


@pytest.mark.parametrize("recipe", [{}, {"name": None}, {"passes": "none"}, {"a": {"b": [None, 1.5, True]}}])
def test_any_recipe_mapping_can_be_shown(recipe: dict[str, Any]) -> None:
    Page(report_html(report_facts(PLANS["one layer"], identity(), recipe, {}, None)))


def test_verdict_of_one_bucket_and_nothing_else() -> None:
    measured = verdict(retrieval=[], greedy=None, gates=[])
    measured["texts"] = measured["texts"][:1]
    measured["texts"][0]["buckets"] = measured["texts"][0]["buckets"][:1]
    page = Page(render(PLANS["one layer"], measured))
    assert page.sections == [*SECTIONS, "provenance"]
    assert page.charts == 5


def test_measurements_that_are_not_numbers_do_not_break_the_page() -> None:
    measured = verdict()
    measured["texts"][0]["buckets"][1] |= {"kl": math.inf, "nll": math.nan}
    assert "nan" in Page(render(PLANS["one layer"], measured)).words


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"texts": None}, "texts"),
        ({"seed": "x"}, "seed"),
        ({"gates": [{"name": "kl"}]}, r"gates\.0"),
        ({"texts": [verdict()["texts"][0] | {"buckets": []}]}, "measures no tokens"),
        ({"texts": [verdict()["texts"][0] | {"formula_bytes": 0}]}, "no bytes"),
        (
            {
                "texts": [
                    verdict()["texts"][0]
                    | {"buckets": [verdict()["texts"][0]["buckets"][0] | {"tokens": -1}]}
                ]
            },
            "measures no tokens",
        ),
        (
            {
                "texts": [
                    verdict()["texts"][0] | {"buckets": [verdict()["texts"][0]["buckets"][0] | {"nll": 1e4}]}
                ]
            },
            "loss beyond 500 nats",
        ),
    ],
)
def test_a_malformed_verdict_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ArtifactError, match=rf"accuracy\.json.*{message}"):
        render(PLANS["one layer"], verdict(**change))


@pytest.mark.parametrize("name", PLANS)
def test_facts_agree_with_the_plan(name: str) -> None:
    which = PLANS[name]
    facts = report_facts(which, identity(), RECIPE, PROVENANCE, verdict())
    json.dumps(facts)
    for index, found in enumerate(facts["layers"]):
        stored = found.get("k_bytes", 0) + found.get("v_bytes", 0)
        assert stored == pytest.approx(which.layer_bytes_per_token(index))
        bits = sum(h["k_bits"] + h["v_bits"] for h in found["heads"]) * 64  # of k_dim and v_dim channels
        assert bits == pytest.approx(8 * stored)
    assert facts["cache"][-1]["tokens"] == 8192
    for row in facts["cache"]:
        assert row["bytes"] == which.cache_bytes(row["tokens"])
        assert row["fp16_bytes"] == which.uncompressed_bytes(row["tokens"])
    assert facts["accuracy"]["seed"] == 5


def test_bits_of_one_head_by_hand() -> None:
    """40 of 64 K channels at 4 bits, and a float16 scale and zero for 64 tokens: 4.5 bits of 40/64."""
    facts = report_facts(plan(layer(head(((4, 40),)))), identity(), RECIPE, {}, None)
    (found,) = facts["layers"][0]["heads"]
    assert found["k_bits"] == pytest.approx(4.5 * 40 / 64)
    assert found["v_bits"] == pytest.approx(4.5)
    assert facts["smaller_from_tokens"] == plan(layer(head(((4, 40),)))).break_even()


def test_page_means_count_as_k() -> None:
    """A byte a page and channel, in whole runs of 16; token scales are 32 bytes a page of 64 tokens."""
    (found,) = report_facts(PLANS["page means"], identity(), RECIPE, {}, None)["layers"]
    assert found["stored"] == (
        "K 40 × 4 bit / 64 page means / 8 × 4 bit + 24 × 2 bit + 40 page means; V 64 × 2 bit / 64 × 4 bit"
    )
    planes = 8 * (8 * 4 + 24 * 2) + 32
    assert [h["k_bits"] * 64 * 64 / 8 for h in found["heads"][:2]] == [64, planes + 48]
    assert [h["v_bits"] * 64 * 64 / 8 for h in found["heads"][:2]] == [64 * 16 + 32] * 2


@pytest.mark.parametrize("context", [1, 2, 33, 100, 10**9])
def test_any_context_length_has_a_curve(context: int) -> None:
    which = PLANS["one layer"]
    facts = report_facts(which, identity(context_length=context), RECIPE, PROVENANCE, None)
    lengths = [row["tokens"] for row in facts["cache"]]
    assert lengths == sorted(set(lengths))
    assert lengths[-1] == min(context, 1 << 20)
    assert len(lengths) < 50
    page = Page(render(which, context_length=context))
    even = which.break_even()
    assert even is not None
    assert (f"break-even: {even:,} tokens" in page.words) == (32 < even <= context)


def test_a_cache_that_never_pays_says_so() -> None:
    words = Page(render(plan(layer(head(((32, 64),), 32), select="all")))).words
    assert "never smaller than an fp16 one" in words


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What reading an artifact gives, without the weights; `path` is what was asked for."""
    entry = {"size": 1, "sha256": "cd" * 32}
    manifest = stored.Manifest(
        kvcc_version="9.8.7", torch_version="2.99", model=identity(),
        recipe_name="think-40-kivi-4", recipe=RECIPE,
        passes=(), licence="Apache-2.0", runtimes=("torch",),
        files={"plan.json": entry, "report.html": entry | {"sha256": "ef" * 32}},
    )  # fmt: skip
    found = SimpleNamespace(manifest=manifest, plan=PLANS["thirty layers"], accuracy=None, path=None)

    def read(path: Path, **options: Any) -> SimpleNamespace:
        found.path = path
        return found

    monkeypatch.setattr(stored, "read_artifact", read)
    return found


def test_report_of_an_artifact(packed: SimpleNamespace, tmp_path: Path) -> None:
    words = Page(render_report(tmp_path / "model.kvcc", None)).words
    assert packed.path == tmp_path / "model.kvcc"
    assert "kvcc 9.8.7 torch 2.99 licence Apache-2.0" in words
    assert "cd" * 32 in words
    assert "ef" * 32 not in words  # its own digest, which this text would change
    assert "Accuracy was not measured." in words
    packed.accuracy = verdict()
    assert "seed of the check 5" in Page(render_report(tmp_path, None)).words
    fresh: Any = SimpleNamespace(as_dict=lambda: verdict(seed=6))
    assert "seed of the check 6" in Page(render_report(tmp_path, fresh)).words


def test_command_writes_the_page_and_prints_the_numbers(packed: SimpleNamespace, tmp_path: Path) -> None:
    packed.accuracy = verdict()
    artifact, output = tmp_path / "model.kvcc", tmp_path / "report.html"
    result = CliRunner().invoke(command, [str(artifact), "-o", str(output), "--json"], catch_exceptions=False)
    assert result.exit_code == 0
    assert output.read_text(encoding="utf-8") == render_report(artifact, None)
    facts = json.loads(result.output)
    assert facts["bytes_per_token"] == packed.plan.bytes_per_token()
    assert facts["accuracy"]["against"] == "SmolLM2-135M"
    result = CliRunner().invoke(command, [str(artifact), "-o", str(tmp_path / "no" / "r.html")])
    assert isinstance(result.exception, ArtifactUnwritable)
    assert "cannot be written" in str(result.exception)


def test_command_needs_somewhere_to_write(tmp_path: Path) -> None:
    result = CliRunner().invoke(command, [str(tmp_path)])
    assert result.exit_code == 2
    assert "give -o FILE" in result.output


def test_command_does_not_write_into_the_artifact(tmp_path: Path) -> None:
    result = CliRunner().invoke(command, [str(tmp_path), "-o", str(tmp_path / "report.html")])
    assert isinstance(result.exception, ArtifactError)
    assert "inside the artifact" in str(result.exception)
    assert not list(tmp_path.iterdir())


POINTS = [(), ((64.0, 2.0),), ((64.0, 2.0), (128.0, 3.0))]


def marks_of(svg: str, tag: str) -> list[ElementTree.Element]:
    return list(ElementTree.fromstring(svg).iter(tag))


@pytest.mark.parametrize("points", POINTS)
@pytest.mark.parametrize("log", ["", "y", "xy"])
@pytest.mark.parametrize("named", [False, True])
def test_lines_of_few_points(points: tuple[tuple[float, float], ...], log: charts.Log, named: bool) -> None:
    svg = charts.lines(
        [Line("a", points)], title="t", x_label="x", y_label="y", log=log, named=named, marks=[Mark(64, "m")]
    )
    assert len(marks_of(svg, "circle")) == len(points)
    assert len(marks_of(svg, "polyline")) == (len(points) == 2)
    assert ("nothing to show" in svg) == (not points)
    assert (">m<" in svg) == bool(points)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_bars_of_few_categories(count: int) -> None:
    names = ["one", "two"][:count]
    stacked = charts.bars(
        names, [("K", [1.0, 2.0][:count]), ("V", [3.0, 4.0][:count])], ghost=("fp16", [8.0, 8.0][:count]),
        stacked=True, title="t", x_label="x", y_label="y",
    )  # fmt: skip
    legend = 3 if count else 0
    assert len(marks_of(stacked, "rect")) == 3 * count + legend
    assert ("nothing to show" in stacked) == (not count)


def test_bars_stand_on_zero_in_proportion() -> None:
    svg = charts.bars(["a", "b", "c"], [("n", [1.0, -2.0, None])], title="t", x_label="x", y_label="y")
    _, up, down = marks_of(svg, "rect")  # after the legend's
    assert float(down.get("height", "")) == pytest.approx(2 * float(up.get("height", "")), abs=0.02)
    assert float(up.get("y", "")) + float(up.get("height", "")) == pytest.approx(
        float(down.get("y", "")), abs=0.02
    )


@pytest.mark.parametrize("count", [0, 1, 2])
def test_heat_map_of_few_cells(count: int) -> None:
    grid = [[2.0, None][:count] for _ in range(count)]
    names = ["0", "1"][:count]
    svg = charts.heat_map(names, names, grid, title="t", x_label="x", y_label="y")
    assert len(marks_of(svg, "rect")) == (count * count + 5 if count else 0)
    assert svg.count('class="empty"') == (2 if count == 2 else 0)


def test_values_that_cannot_be_drawn_leave_gaps() -> None:
    curve = Line("a", ((1.0, 1.0), (2.0, math.nan), (4.0, 2.0), (8.0, 0.0), (16.0, 4.0)))
    assert len(marks_of(charts.lines([curve], title="", x_label="", y_label=""), "circle")) == 4
    for log in ("y", "xy"):
        svg = charts.lines([curve], title="", x_label="", y_label="", log=log)
        assert len(marks_of(svg, "circle")) == 3
    bars = charts.bars(["a"], [("b", [math.inf])], title="", x_label="", y_label="")
    assert "nothing to show" in bars
    assert "nothing to show" in charts.heat_map(["a"], ["b"], [[None]], title="", x_label="", y_label="")


def test_names_of_near_points_do_not_overlap() -> None:
    series = [Line(f"recipe {i}", ((100.0, 1.0 + i / 1000),)) for i in range(5)]
    svg = charts.lines(series, title="t", x_label="x", y_label="y", named=True)
    heights = sorted(float(t.get("y", "")) for t in marks_of(svg, "text") if t.get("class") == "name")
    assert len(heights) == 5
    assert all(b - a >= 12 for a, b in pairwise(heights))


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9), st.integers(2, 10))
def test_nice_ticks_are_round_and_enclose(low: float, span: float, count: int) -> None:
    ticks = charts.nice_ticks(low, low + span, count)
    assert ticks[0] <= low + 1e-6 * (span + abs(low))
    assert ticks[-1] >= low + span - 1e-6 * (span + abs(low))
    assert 2 <= len(ticks) <= count + 3


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 0.0), (0.0, 1.0), (0.0, 0.0137), (-3.0, 16.2), (0.0, 23040.0)]
)
def test_nice_steps(low: float, high: float) -> None:
    ticks = charts.nice_ticks(low, high)
    step = ticks[1] - ticks[0]
    digits = f"{step:.6e}"
    assert digits[:3] in ("1.0", "2.0", "5.0")
    assert 0 in ticks


@given(st.floats(1e-9, 1e9), st.floats(1.0, 1e12))
def test_decimal_ticks_are_round_and_enclose(low: float, ratio: float) -> None:
    ticks = charts.decimal_ticks(low, low * ratio)
    assert ticks[0] <= low * (1 + 1e-8)
    assert ticks[-1] >= low * ratio * (1 - 1e-8)
    assert 2 <= len(ticks) <= 10
    assert {f"{t:.6e}"[:8] for t in ticks} <= {"1.000000", "2.000000", "5.000000"}


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0002, 0.03, [0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05]),
        (0.001, 0.001, [0.001, 0.002]),
        (1e-7, 0.3, [10.0**p for p in range(-7, 1)]),
    ],
)
def test_decimal_steps(low: float, high: float, expected: list[float]) -> None:
    assert charts.decimal_ticks(low, high) == pytest.approx(expected)


@given(st.floats(1e-3, 1e12), st.floats(1.0, 1e9))
def test_power_ticks_enclose(low: float, ratio: float) -> None:
    ticks = charts.power_ticks(low, low * ratio)
    assert ticks[0] <= low
    assert ticks[-1] >= low * ratio
    assert 2 <= len(ticks) <= 7
    assert {math.log2(t) % 1 for t in ticks} == {0.0}


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (640, "640 B"), (1536, "1.5 KiB"), (2**20, "1 MiB"), (3.7 * 2**40, "3,789 GiB")],
)
def test_sizes_for_people(value: float, text: str) -> None:
    assert charts.binary_size(value) == text


def test_charts_beside_each_other_are_one_svg_document() -> None:
    one = charts.bars(["a"], [(HOSTILE, [1.0])], title=HOSTILE, x_label=HOSTILE, y_label="y")
    two = charts.heat_map(["a"], ["b"], [[1.0]], title="", x_label="", y_label="")
    root = ElementTree.fromstring(charts.beside([one, two], title=HOSTILE))
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert not [e for e in root.iter() if e.tag.endswith(("script", "img", "image"))]
    tall = float(str(root.get("viewBox")).split()[3])
    assert all(
        float(c.get("y", 0)) + float(c.get("height", 0)) <= tall for c in root if c.tag.endswith("svg")
    )
