"""What a report shows where the data exists, and which command it names where it does not."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from kvcc.checking import CheckSize, check, store_accuracy
from kvcc.cli.report import command
from kvcc.compile import compile_model
from kvcc.errors import ArtifactError, ArtifactManifest, DataError
from kvcc.frontend import LoadedModel, load_model
from kvcc.fronts import Front, Point, drawn, marked, read_front
from kvcc.key_energy import calibrated
from kvcc.layer_errors import layer_errors, only
from kvcc.measure import expected_logits
from kvcc.recipe import parse_recipe
from kvcc.report import Extras, report_facts, report_figures, report_html, stored_facts
from kvcc.report.sections import report_sections
from kvcc.report.verdict import read_verdict
from kvcc.runtime.artifact import read_artifact
from kvcc.runtime.calibrated import Calibrated, CalibrationSource, KeyEnergy
from kvcc.runtime.plan import Plan
from tests.compiled import compiled, recipe, runnable, tiny_profile, tokens
from tests.saved import save_tiny_llama
from tests.test_report import HOSTILE, PLANS, PROVENANCE, RECIPE, Page, identity, plan, ring, verdict

KEYS = KeyEnergy(kept=(0.99, 0.5, 1.0), ranks=((3.0, 1.0), (1.0, 0.5), (0.0, 0.0)))
CALIBRATED = Calibrated(
    prompts=3,
    tokens=1234,
    gradients=True,
    sources=(CalibrationSource(name="mixed", digest="sha256:77", seed=4, samples=3, tokens=1234),),
    keys=(KEYS,) * 30,
)
FRONT = Front("kvcc plan", marked([Point("a", 2, 0.5), Point("b", 3, 0.1, mine=True), Point("c", 3.5, 0.2)]))


def text_of(first: int, kl: float) -> dict[str, Any]:
    base: dict[str, Any] = verdict()["texts"][0]
    edges = [first + 128 * i for i in range(len(base["buckets"]))]
    buckets = [b | {"first": e, "last": e + 128, "kl": kl} for b, e in zip(base["buckets"], edges)]
    return base | {"buckets": buckets}


def full() -> dict[str, Any]:
    """A verdict of everything that can be measured."""
    measured = verdict(
        other_contexts=[text_of(256, 0.125)], layers=[{"layer": i, "kl": 0.001 * i} for i in range(30)]
    )
    for score in measured["retrieval"]:
        score["answers"] = [
            {"depth": d, "found": d != 0.1, "found_uncompressed": True} for d in (0.1, 0.5, 0.99, 1.0)
        ]
    return measured


def page_of(measured: dict[str, Any] | None, **extras: Any) -> str:
    return report_html(
        report_facts(PLANS["thirty layers"], identity(), RECIPE, PROVENANCE, measured, **extras)
    )


def test_a_full_report_misses_nothing() -> None:
    page = Page(page_of(full(), calibration=CALIBRATED, front=FRONT))
    assert "Not measured." not in page.words
    assert not [a for _, a in page.seen if a.get("class") == "missing"]
    figures = {a.get("id") for tag, a in page.seen if tag == "figure"}
    assert figures == {
        "cache", "layers", "k-bits", "v-bits", "channel-energy", "lost-variance", "kl", "layer-errors",
        "retrieval-depth-hidden", "retrieval-depth-visible", "retrieval-1024", "front",
    }  # fmt: skip
    assert page.charts == len(figures)
    assert "3 prompts, 1,234 tokens, with gradients" in page.words
    assert "mixed: 3 prompts, 1,234 tokens, seed 4, sha256:77" in page.words


def test_an_empty_report_names_the_commands_that_fill_it() -> None:
    words = Page(page_of(None)).words
    for wanted in (
        "kvcc report model.kvcc --profile model.profile -o report.html",
        "--against MODEL --store",
        "--layers --store",
        "--retrieval 512,1024",
        "kvcc compare model.kvcc other.kvcc --against MODEL -o compare.json",
        "kvcc report model.kvcc --front compare.json",
    ):
        assert wanted in words
    assert "calibration not recorded" in words


def test_the_numbers_behind_the_plots() -> None:
    words = Page(page_of(full(), calibration=CALIBRATED, front=FRONT)).words
    assert (
        "1 75.00 % 75.00 % 2 25.00 % 12.50 % 3 0.00 % 0.00 %" in words
    )  # energy by rank, and what is stored
    assert "0 0 1.000 % 0 1 50.000 % 0 2 0.000 %" in words  # lost variance of layer 0
    assert "0-20 % 1,024 0 % 100 % 3 40-60 % 1,024 100 % 100 % 3 80-100 % 1,024 100 % 100 % 6" in words
    assert "29 0.029000" in words  # error of the last layer
    assert "prose 256 to 383 0.12500" in words
    assert "b (this artifact) 3.00 0.10000 yes c 3.50 0.20000" in words


def test_an_artifact_outside_the_comparison_is_placed_by_its_own_check() -> None:
    others = Front("kvcc compare", marked([Point("a", 2, 0.5)]))
    words = Page(page_of(full(), front=others)).words
    assert "this artifact as kvcc check measured it, on texts of its own" in words
    assert "this artifact (this artifact)" in words
    assert "its own divergence is not known" in Page(page_of(None, front=others)).words


def test_calibration_that_says_nothing_of_channels_says_why() -> None:
    silent = CALIBRATED.model_copy(update={"keys": (None,) * 30})
    assert "is not fixed by the artifact's tables" in Page(page_of(None, calibration=silent)).words


def test_hostile_names_from_calibration_and_fronts_are_text() -> None:
    source = CalibrationSource(name=HOSTILE, digest=HOSTILE, seed=0, samples=1, tokens=1)
    odd = CALIBRATED.model_copy(update={"sources": (source,)})
    html = page_of(full(), calibration=odd, front=Front(HOSTILE, (Point(HOSTILE, 2, 0.5, True),)))
    assert not {tag for tag, _ in Page(html).seen} & {"script", "img", "link", "iframe"}
    assert "\u202e" not in html


@pytest.mark.parametrize("field", ["layers", "other_contexts"])
def test_malformed_measurements_are_refused(field: str) -> None:
    with pytest.raises(ArtifactError, match=rf"accuracy\.json: {field}\.0"):
        read_verdict(verdict(**{field: [{"nothing": 1}]}))


def test_windows_only_models_have_every_section() -> None:
    facts: dict[str, Any] = {"smaller_from_tokens": None, "layers": [], "cache": [], "bits_per_element": None}
    facts["model"] = {"context_length": 10}
    sections = report_sections(facts, read_verdict(full()), None, None)
    assert [s.id for s in sections] == ["memory", "channels", "accuracy", "by-layer", "retrieval", "front"]
    assert "never smaller" in sections[0].text[1]
    html = report_html(report_facts(plan(ring()), identity(), RECIPE, PROVENANCE, None))
    assert Page(html).charts == 1


# ------------------------------------------------------------------------------ energy of channels


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_all_channels_keep_all_variance(architecture: str) -> None:
    made = compiled(architecture, recipe())
    found = calibrated(tiny_profile(architecture), made.plan, made.tables)
    for layer, keys in zip(made.plan.layers, found.keys):
        assert (keys is None) == (not layer.page)
        if keys:
            assert keys.kept == (1.0,) * layer.kv_heads
            assert all(share == 1.0 for _, share in keys.ranks)
            assert [e for e, _ in keys.ranks] == sorted((e for e, _ in keys.ranks), reverse=True)


def test_lost_variance_is_that_of_the_logits() -> None:
    """Against logits of sampled queries and keys, in which the pruned channels are left out by hand."""
    made = compiled("llama", recipe("[{think: {keep_ratio: 0.5, score: centred}}]"))
    profile = tiny_profile("llama")
    found = calibrated(profile, made.plan, made.tables)
    head = 1
    keys, _ = profile.samples(0)
    cov = torch.cov(keys[head].double().T, correction=0)
    factor = torch.linalg.cholesky(profile.qq(0)[head])  # queries with this second moment
    pruned = made.tables["layers.0.k_channels"][head, made.plan.layers[0].heads[head].k.channels :]
    lost = (factor[pruned].T @ cov[pruned][:, pruned] @ factor[pruned]).trace()
    whole = (factor.T @ cov @ factor).trace()
    kept = found.keys[0]
    assert kept is not None
    assert kept.kept[head] == pytest.approx(float(1 - lost / whole), abs=0.02)
    assert kept.kept[head] < 1
    assert any(share < 1 for _, share in kept.ranks)


def test_a_calibrated_basis_keeps_more_than_pruning_as_many_channels() -> None:
    profile = tiny_profile("llama")
    pruned = compiled("llama", recipe("[{think: {keep_ratio: 0.5, score: think}}]"))
    turned = compiled("llama", recipe("[{transform: {bits: 1.5, token_scales: false}}]"))
    shares = []
    for made in (pruned, turned):
        keys = calibrated(profile, made.plan, made.tables).keys[0]
        assert keys is not None
        shares.append(sum(keys.kept) / len(keys.kept))
        total = sum(e for e, _ in keys.ranks)
        assert total > 0
    stored = [h.k.channels for h in turned.plan.layers[0].heads]
    assert max(stored) <= 16
    assert shares[1] > shares[0] - 0.05


def test_channels_of_which_pages_have_means_only_are_not_stored() -> None:
    profile = tiny_profile("llama")
    made = compiled("llama", recipe("[{transform: {bits: 1.2}}]"))
    first = made.plan.layers[0]
    stored = [sum(p.channels for p in head.k.planes) for head in first.heads]
    assert {head.k.page_means for head in first.heads} == {16}
    keys, queries = (made.tables[f"layers.0.{name}_basis"].double() for name in "kq")
    expected = []
    for head, count in enumerate(stored):
        rest = torch.eye(16, dtype=torch.float64) - keys[head, :, :count] @ queries[head, :, :count].mT
        cov, q = profile.k_cov(0)[head], profile.qq(0)[head]
        expected.append(1 - float((q * (rest.mT @ cov @ rest)).sum() / (q * cov).sum()))
    found = calibrated(profile, made.plan, made.tables).keys[0]
    assert found is not None
    assert min(stored) < 16
    assert found.kept == pytest.approx(expected, abs=1e-4)
    bare = tuple(h.model_copy(update={"k": replace(h.k, planes=())}) for h in first.heads)
    plan = made.plan.model_copy(update={"layers": (first.model_copy(update={"heads": bare}),)})
    found = calibrated(profile, plan, made.tables).keys[0]
    assert found is not None
    assert found.kept == (0.0, 0.0)
    assert {share for _, share in found.ranks} == {0.0}


@pytest.mark.parametrize(
    "passes",
    ["[{think: {mode: request}}]", "[{think: {keep_ratio: 0.5, mode: fold}}]"],
    ids=["request", "fold"],
)
def test_what_tables_do_not_fix_is_not_guessed(passes: str) -> None:
    made = compiled("llama", recipe(passes))
    assert set(calibrated(tiny_profile("llama"), made.plan, made.tables).keys) == {None}


# ------------------------------------------------------------------------------ error by layer


def test_layers_by_themselves() -> None:
    """Nothing is lost where nothing is compressed, and something is where one layer is."""
    exact = runnable("llama", recipe())
    lossy = runnable("llama", recipe("[{kivi: {k_bits: 2, v_bits: 2, group_size: 8}}]"))
    texts = tokens(60, 60, seed=3)
    expected = [expected_logits(exact, text, 40) for text in texts]
    assert all(e.kl < 1e-6 for e in layer_errors(exact, texts, expected, 40))
    steps: list[tuple[int, int]] = []
    found = layer_errors(lossy, texts, expected, 40, lambda done, total: steps.append((done, total)))
    assert [e.layer for e in found] == [0, 1]
    assert all(e.kl > 1e-4 for e in found)
    assert steps == [(1, 2), (2, 2)]


def test_a_plan_of_one_compressed_layer() -> None:
    whole: Plan = compiled("gemma3", recipe("[{kivi: {group_size: 8}}]")).plan
    paged = [i for i, layer in enumerate(whole.layers) if layer.page]
    alone = only(whole, paged[0], 500)
    assert alone.layers[paged[0]] == whole.layers[paged[0]]
    assert all(layer.sealed(500) == 0 for i, layer in enumerate(alone.layers) if i != paged[0] and layer.page)
    assert [layer.window for layer in alone.layers] == [layer.window for layer in whole.layers]


# ------------------------------------------------------------------------------ fronts


def test_marked_points_are_beaten_by_none() -> None:
    found = marked([Point("a", 2, 0.5), Point("b", 3, 0.5), Point("c", 3, 0.1), Point("d", 2, 0.6)])
    assert {p.name for p in found if p.on_front} == {"a", "c"}


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=12))
def test_every_point_is_on_the_front_or_beaten_by_one_that_is(points: list[tuple[int, int]]) -> None:
    found = marked([Point("", bits, kl) for bits, kl in points])
    front = [p for p in found if p.on_front]
    for p in found:
        beaten = any(q.bits <= p.bits and q.kl <= p.kl and (q.bits, q.kl) != (p.bits, p.kl) for q in front)
        assert beaten != p.on_front


def test_a_front_of_many_names_only_what_matters() -> None:
    points = [Point(f"r{i}", 2 + i, 0.5 if i % 4 else 0.4 / (1 + i)) for i in range(12)]
    mine = Point("mine", 3.5, 0.2)
    root = ElementTree.fromstring(drawn(Front("kvcc plan", marked(points)), mine))
    texts = [t for t in root.iter("text") if t.get("class") == "name"]
    assert {t.text for t in texts} == {"r0", "r4", "r8", "this artifact"}
    assert len([c for c in root.iter("circle") if c.get("class") != "fq"]) == 1
    few = drawn(Front("kvcc plan", marked(points[:3])), None)
    assert len([t for t in ElementTree.fromstring(few).iter("text") if t.get("class") == "name"]) == 3


def test_front_of_a_comparison_and_of_a_search(tmp_path: Path) -> None:
    file = tmp_path / "f.json"
    entry = {"name": "small", "bits_per_element": 3.0, "mean_kl": 0.1, "bytes_per_token": 1}
    file.write_text(json.dumps({"artifacts": [entry, entry | {"name": "/x/other.kvcc", "mean_kl": 0.2}]}))
    found = read_front(file, {"name": "small"}, 3.0)
    assert [(p.name, p.mine, p.on_front) for p in found.points] == [
        ("small", True, True),
        ("other.kvcc", False, False),
    ]
    assert not read_front(file, {"name": "small"}, 3.5).has_mine
    text = "windows: {dtype: half}\npasses:\n  - kivi: {k_bits: 4, v_bits: 4}\n"
    row = {"recipe": text, "bits": 4.5, "bytes_per_token": 1, "kl": 0.01, "by_kind": {}}
    unknown = row | {"recipe": "passes:\n  - magic: {}\n", "bits": 2, "kl": 1}
    file.write_text(json.dumps({"measured": [row, unknown], "winner": row, "goal": {}}))
    passes = parse_recipe(text, "x").as_dict()["passes"]
    found = read_front(file, {"passes": passes}, 4.5)
    assert [(p.name, p.mine) for p in found.points] == [
        ("magic: {}", False),
        ("kivi: {k_bits: 4, v_bits: 4}", True),
    ]
    assert found.command == "kvcc plan"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("{}", "neither of kvcc compare nor of kvcc plan"),
        ("[1]", "neither"),
        ('{"artifacts": []}', "artifacts"),
        (
            '{"artifacts": [{"name": "a", "bits_per_element": 0, "mean_kl": 1}]}',
            r"artifacts\.0\.bits_per_element",
        ),
        ('{"measured": [{"recipe": "a", "bits": 1, "kl": NaN}]}', r"measured\.0\.kl"),
    ],
)
def test_other_files_are_refused(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "f.json"
    file.write_text(text)
    with pytest.raises(DataError, match=message):
        read_front(file, {}, 1.0)
    with pytest.raises(DataError, match="cannot be read"):
        read_front(tmp_path / "none.json", {}, 1.0)


# ------------------------------------------------------------------------------ of a real artifact


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(str(save_tiny_llama(tmp_path_factory.mktemp("model"))), "float32")


@pytest.fixture(scope="module")
def artifact(model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checked with everything on, and stored."""
    folder = tmp_path_factory.mktemp("artifacts")
    text = (
        "name: small\nwindows: {sinks: 2, recent: 8, page: 8}\npasses:\n"
        "  - kivi: {k_bits: 2, v_bits: 2, group_size: 8}\n"
    )
    path = folder / "small.kvcc"
    compile_model(model, None, parse_recipe(text, "test"), path)
    size = CheckSize(2, 120, 96, (40, 60), 2, greedy_prompts=0, other_contexts=(24, 48), layers=True)
    store_accuracy(path, check(path, model, data=("prose", "code"), size=size))
    return path


def test_a_check_with_everything_fills_the_report(artifact: Path) -> None:
    measured = stored_facts(artifact)["accuracy"]
    kinds = [
        (t["kind"], t["buckets"][0]["first"], t["buckets"][-1]["last"]) for t in measured["other_contexts"]
    ]
    assert kinds == [("prose", 24, 48), ("code", 24, 48), ("prose", 48, 72), ("code", 48, 72)]
    assert [e["layer"] for e in measured["layers"]] == [0, 1]
    assert all(e["kl"] > 0 for e in measured["layers"])
    assert {len(s["answers"]) for s in measured["retrieval"]} == {2}
    for score in measured["retrieval"]:
        assert score["score"] == 50 * sum(a["found"] for a in score["answers"])
    names = [f.name for f in report_figures(artifact)]
    assert names[4:] == [
        "kl", "layer-errors", "retrieval-depth-hidden", "retrieval-depth-visible", "retrieval-40", "retrieval-60",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"other_contexts": (97,)}, "context 97 must lie between 1 and 96"),
        ({"context": 120}, "context 120 must lie between 1 and the text length 120"),
        ({"length": 2049}, "texts of 2049 tokens: .* has a context of 2048"),
        (
            {"retrieval_lengths": (2040,)},
            r"retrieval in 2040 tokens takes up to 2\d+ with question and answer",
        ),
    ],
)
def test_what_no_context_holds_is_refused_first(
    change: dict[str, Any], message: str, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvcc.checking.load_model", None)
    size = replace(CheckSize(1, 120, 96, (), 1, greedy_prompts=0), **change)
    with pytest.raises(DataError, match=message):
        check(artifact, "the model", size=size)


def test_options_of_plots_want_plots(artifact: Path, tmp_path: Path) -> None:
    for option in (["--format", "png"], ["--theme", "dark"]):
        result = CliRunner().invoke(command, [str(artifact), "-o", str(tmp_path / "r.html"), *option])
        assert result.exit_code == 2
        assert "give --plots FOLDER" in result.output


@pytest.mark.parametrize("theme", ["light", "dark", "auto"])
def test_plots_are_files(artifact: Path, tmp_path: Path, theme: str) -> None:
    arguments = [
        str(artifact),
        "--plots",
        str(tmp_path),
        "--format",
        "svg",
        "--format",
        "png",
        "--theme",
        theme,
    ]
    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    names = {f.name for f in report_figures(artifact)}
    assert {p.name for p in tmp_path.iterdir()} == {f"{n}.{kind}" for n in names for kind in ("svg", "png")}
    svg, png = (tmp_path / "kl.svg").read_text(), (tmp_path / "kl.png").read_bytes()
    assert ("var(--" in svg) == ("prefers-color-scheme" in svg) == (theme == "auto")
    assert ('class="tip"' in svg) == (theme == "auto")
    assert png.startswith(b"\x89PNG")
    width, height = (int.from_bytes(png[i : i + 4], "big") for i in (16, 20))
    assert 1300 < width < 1500
    assert height > 400


def test_plots_without_their_package_say_so(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "resvg_py", None)
    result = CliRunner().invoke(command, [str(artifact), "--plots", str(tmp_path), "--format", "png"])
    assert isinstance(result.exception, DataError)
    assert "kvcc[plots]" in str(result.exception)


def test_plots_are_not_written_into_the_artifact(artifact: Path) -> None:
    result = CliRunner().invoke(command, [str(artifact), "--plots", str(artifact / "plots")])
    assert isinstance(result.exception, ArtifactError)


def test_a_profile_fills_what_the_artifact_did_not_record(artifact: Path, tmp_path: Path) -> None:
    tiny_profile("llama").save(tmp_path / "p")
    with pytest.raises(Exception, match="profile was taken on"):
        report_figures(artifact, Extras(profile=tmp_path / "p"))


def test_an_artifact_records_its_calibration(tmp_path: Path, model: LoadedModel) -> None:
    from kvcc.calibration import calibrate_model

    profile = calibrate_model(str(model.identity.name), "prose", tmp_path / "p", samples=2, length=80)
    text = "windows: {sinks: 2, recent: 8, page: 8}\npasses:\n  - think: {keep_ratio: 0.5}\n"
    path = tmp_path / "a.kvcc"
    made = compile_model(model, profile, parse_recipe(text, "test"), path)
    found = read_artifact(path).manifest.calibration
    assert found == calibrated(profile, made.plan, made.tables)
    assert found is not None
    assert [s.name for s in found.sources] == ["prose"]
    assert any(share < 1 for share in (found.keys[0] or KEYS).kept)
    figures = {f.name: f.table.rows for f in report_figures(path)}
    assert figures == {f.name: f.table.rows for f in report_figures(path, Extras(profile=tmp_path / "p"))}
    assert {"channel-energy", "lost-variance"} <= set(figures)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["calibration"]["keys"].append(None)
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactManifest, match=r"calibration\.keys"):
        read_artifact(path, verify=False)
