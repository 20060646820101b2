"""The planner: what it measures, what it chooses, and what it refuses."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from click.testing import CliRunner

from kvcc.calibration import PromptSet, TokenPrompt, calibrate
from kvcc.cli import cli
from kvcc.cli._console import out
from kvcc.cli.plan import show
from kvcc.errors import ArtifactUnwritable, DataError, ProfileError
from kvcc.graph import Graph
from kvcc.pipeline import run_passes
from kvcc.planner import Goal, Search, candidates, pareto, search, widest_group
from kvcc.profile import Profile
from kvcc.recipe import parse_recipe
from kvcc.runtime import CompiledModel
from kvcc.shared_prefill import Filler, Prompt, filler
from kvcc.trials import Measured, Trials
from kvcc.uncompressed import opened
from tests.saved import save_tiny_llama

SMALL = {"texts": 1, "context": 96, "tokens": 32}
WINDOWS = "windows: {sinks: 2, recent: 8, page: 8}\n"
RECIPES = [
    f"{WINDOWS}passes:\n  - kivi: {{k_bits: {bits}, v_bits: {bits}, group_size: 8}}\n" for bits in (2, 4, 8)
]
Opened = tuple[Graph, CompiledModel]
PROFILE = cast(Profile, object())  # candidates only ask whether there is one
BROKEN = f"{WINDOWS}passes:\n  - kivi: {{group_size: 48}}\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder: Path) -> Opened:
    return opened(str(folder))


def measured(bits: float, kl: float) -> Measured:
    return Measured(f"{bits} {kl}", bits, 0.0, kl, {})


def test_the_front_is_what_nothing_beats() -> None:
    points = [measured(*p) for p in ((2, 0.5), (3, 0.1), (3, 0.2), (4, 0.1), (5, 0.01), (2.5, 0.6))]
    assert [(m.bits, m.kl) for m in pareto(points)] == [(5, 0.01), (3, 0.1), (2, 0.5)]


def test_candidates_follow_the_goal() -> None:
    assert not any("transform" in c for c in candidates(Goal(bits=4), None))
    assert candidates(Goal(bits=4), None) == candidates(Goal(bits=4), None)


@pytest.mark.parametrize("head_dim", [48, 64, 80, 96, 192])
def test_candidates_fit_heads_of_any_size(head_dim: int, tmp_path: Path) -> None:
    graph, reference = opened(str(save_tiny_llama(tmp_path, layers=1, head_dim=head_dim)))
    assert reference.tokenizer is not None
    ids = tuple(reference.tokenizer.encode("Words of a text that is counted.") * 9)
    profile = calibrate(graph, [PromptSet("text", "", 0, (TokenPrompt(ids, "0"),))], gradients=True)
    tried = candidates(Goal(bits=3), profile, group_size=widest_group(graph))
    assert len(tried) > 20
    for each in tried:
        run_passes(graph, profile, parse_recipe(each, "test"))


def test_a_budget_takes_the_least_divergence(model: Opened, tmp_path: Path) -> None:
    state = tmp_path / "state"
    found = search(*model, None, Goal(bits=8.5), recipes=[*RECIPES, BROKEN], state=state, **SMALL)
    assert {round(m.bits) for m in found.measured} == {6, 8}  # groups of 8 cost four bits; 12 are too many
    assert found.winner.bits <= 8.5
    assert found.winner.recipe == min(found.measured, key=lambda m: m.kl).recipe
    assert "k_bits: 4" in found.winner.recipe
    assert found.winner.attention_ms is None
    (reason,) = found.refused.values()
    assert "48" in reason
    again = search(*model, None, Goal(bits=8.5), recipes=RECIPES, state=state, **SMALL)
    assert again.winner == found.winner
    kept = json.loads(state.read_text())
    kept["measured"] = {k: v | {"kl": 7.0} for k, v in kept["measured"].items()}
    state.write_text(json.dumps(kept))
    assert search(*model, None, Goal(bits=8.5), recipes=RECIPES, state=state, **SMALL).winner.kl == 7.0


def test_measurements_are_those_of_forward_passes(model: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """Off a shared prefill, unless a recipe changes what prompts compute."""
    (graph, reference), shared = model, list[bool]()
    ids = torch.arange(300) % 250
    profile = calibrate(graph, [PromptSet("counting", "", 0, (TokenPrompt(tuple(ids.tolist()), "0"),))])
    trials = Trials(graph, reference, profile, *SMALL.values(), 0, None)

    def told(compressed: CompiledModel, prompt: Prompt) -> Filler | None:
        shared.append(True)
        return filler(compressed, prompt)

    monkeypatch.setattr("kvcc.trials.filler", told)
    narrow = f"{WINDOWS}passes:\n  - think: {{keep_ratio: 0.5, value_keep_ratio: 0.5}}\n"
    for recipe, exact in ((RECIPES[1], True), (narrow, False)):
        shared.clear()
        trials.known.clear()
        found = trials.measure(recipe, None)
        assert bool(shared) == exact
        monkeypatch.setattr(trials, "tolerance", -1.0)
        trials.known.clear()
        own = trials.measure(recipe, None)
        monkeypatch.undo()
        monkeypatch.setattr("kvcc.trials.filler", told)
        assert found is not None
        assert own is not None
        assert found.kl == pytest.approx(own.kl, rel=1e-3)
        assert found.bits == own.bits


def test_what_diverges_without_bound_never_wins(
    model: Opened, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = Trials.measure

    def broken(trials: Trials, recipe: str, *more: Any, **options: Any) -> Measured | None:
        found = measure(trials, recipe, *more, **options)
        return replace(found, kl=float("nan")) if found is not None and recipe == RECIPES[0] else found

    monkeypatch.setattr(Trials, "measure", broken)
    found = search(*model, None, Goal(bits=20), recipes=RECIPES, **SMALL)
    assert RECIPES[0] not in {m.recipe for m in (*found.measured, *found.front, found.winner)}
    assert found.refused == {RECIPES[0]: "its predictions diverge by nan nats"}
    with out.capture() as shown:
        show(found, "tiny")
    words = " ".join(shown.get().split())
    assert "left out: 1 that this model does not take, such as kivi: {k_bits: 2" in words
    assert "its predictions diverge by nan nats" in words


def test_texts_fit_the_model_s_context(model: Opened) -> None:
    some = {"recipes": RECIPES[2:], "texts": 1}
    assert search(*model, None, Goal(bits=20), **some, context=4000, tokens=32).winner.kl > 0
    with pytest.raises(
        DataError, match="has a context of 2048 tokens; planning takes 2020 predictions behind 32"
    ):
        search(*model, None, Goal(bits=20), **some, context=64, tokens=2020)


def test_a_divergence_takes_the_fewest_bits(model: Opened) -> None:
    everything = search(*model, None, Goal(bits=20), recipes=RECIPES, **SMALL)
    by_bits = sorted(everything.measured, key=lambda m: m.bits)
    bound = (by_bits[0].kl + by_bits[1].kl) / 2
    found = search(*model, None, Goal(kl=bound), recipes=RECIPES, **SMALL)
    assert (
        found.winner.recipe == min((m for m in found.measured if m.kl <= bound), key=lambda m: m.bits).recipe
    )
    assert found.winner.recipe != by_bits[0].recipe


def test_a_bound_of_time_rules_out_what_is_slower(model: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wide bases are tried only where time is bounded; the times themselves are the kernels'."""
    assert not any("joint_heads" in c for c in candidates(Goal(bits=4), PROFILE, 6))
    tried = candidates(Goal(bits=4, attention_ms=9), PROFILE, 6)
    assert [n for n in range(9) if any(f"joint_heads: {n}}}" in c for c in tried)] == [2, 3, 6]
    free = search(*model, None, Goal(bits=20, attention_ms=1e9), recipes=RECIPES, **SMALL)
    assert all(m.attention_ms is not None and m.attention_ms > 0 for m in free.measured)
    times = iter([1.0, 3.0, 9.0, 1.0, 3.0, 9.0])
    monkeypatch.setattr("kvcc.trials.attention_ms", lambda *_: next(times))
    assert "k_bits: 8" in free.winner.recipe
    assert "k_bits: 4" in search(*model, None, Goal(20, None, 5), recipes=RECIPES, **SMALL).winner.recipe


def test_goals_that_nothing_meets_say_what_came_closest(model: Opened) -> None:
    with pytest.raises(DataError, match="no recipe meets the goal"):
        search(*model, None, Goal(bits=1), recipes=RECIPES, **SMALL)
    with pytest.raises(DataError, match=r"smallest that was measured has 6\.00 bits"):
        search(*model, None, Goal(kl=1e-9), recipes=RECIPES[:1], **SMALL)


class Verified:
    """Trials in which KL by bits is as given, and on other texts as given there."""

    def __init__(self, kl: dict[float, tuple[float, float]]) -> None:
        self.kl, self.verified = kl, list[float]()

    def measure(
        self, recipe: str, bits: float | None, *, timed: bool = False, again: bool = False
    ) -> Measured:
        at = float(recipe)
        self.verified += [at] if again else []
        return replace(measured(at, self.kl[at][again]), recipe=recipe)


def planned(monkeypatch: pytest.MonkeyPatch, kl: dict[float, tuple[float, float]]) -> tuple[Search, Verified]:
    trials = Verified(kl)
    monkeypatch.setattr("kvcc.planner.Trials", lambda *_: trials)
    nothing = cast(Graph, None), cast(CompiledModel, None), None
    return search(*nothing, Goal(kl=0.1), recipes=[str(bits) for bits in kl]), trials


def test_a_winner_meets_the_goal_on_other_texts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    close = dict.fromkeys((1.0, 2.0, 3.0), (0.1, 0.2))
    found, trials = planned(monkeypatch, close | {4.0: (0.01, 0.01), 5.0: (0.01, 0.01)})
    assert found.winner.bits == 4
    assert trials.verified == [1, 2, 3, 4]
    found, trials = planned(monkeypatch, {2.0: (0.1, 0.2), 3.0: (0.1, 0.1), 4.0: (0.0, 0.0), 5.0: (0.0, 0.0)})
    assert found.winner.bits == 3
    assert trials.verified == [2, 3, 4]
    with pytest.raises(DataError, match="none of the 3 recipes that met the goal meets it on other texts"):
        planned(monkeypatch, close)


def test_measurements_of_another_profile_are_none(model: Opened, tmp_path: Path) -> None:
    (graph, reference), ids = model, tuple(i % 250 for i in range(300))
    prompts = [PromptSet("counting", "", 0, (TokenPrompt(ids, "0"),))]
    keys = {
        Trials(graph, reference, profile, *SMALL.values(), 0, None).key
        for profile in (None, *(calibrate(graph, prompts, gradients=g) for g in (False, True, True)))
    }
    assert len(keys) == 3
    other = calibrate(graph, prompts)
    other = replace(other, model=other.model.model_copy(update={"digest": "sha256:other"}))
    with pytest.raises(ProfileError, match="calibrate this model"):
        search(graph, reference, other, Goal(bits=8.5), recipes=RECIPES, **SMALL)
    broken = tmp_path / "plan.json.partial"
    broken.write_text("{")
    with pytest.raises(DataError, match="without --resume"):
        Trials(graph, reference, None, *SMALL.values(), 0, broken)


def test_a_state_that_cannot_be_written_is_no_fault_of_a_recipe(model: Opened, tmp_path: Path) -> None:
    with pytest.raises(ArtifactUnwritable, match="cannot write"):
        search(*model, None, Goal(bits=8.5), recipes=RECIPES, state=tmp_path / "no" / "state", **SMALL)


def test_the_command_writes_plan_recipe_and_plot(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvcc.planner.candidates", lambda *_: RECIPES)
    files = {name: tmp_path / name for name in ("plan.json", "best.yaml", "plan.svg")}
    command = ["plan", str(folder), "--budget", "1.9x", "-o", str(files["plan.json"]), "--json"]
    command += ["--recipe", str(files["best.yaml"]), "--plot", str(files["plan.svg"])]
    done = CliRunner().invoke(cli, [*command, "--texts", "1", "--context", "96", "--tokens", "32"])
    assert done.exit_code == 0, done.output
    assert "without --profile only passes that need none are measured" in done.stderr
    plan = json.loads(files["plan.json"].read_text())
    assert plan["goal"]["bits"] == pytest.approx(16 / 1.9)
    assert files["plan.svg"].read_text().startswith("<svg")
    assert not (tmp_path / "plan.json.partial").exists()
    made = CliRunner().invoke(
        cli, ["export", str(folder), "-r", str(files["best.yaml"]), "-o", str(tmp_path / "a.kvcc"), "--json"]
    )
    assert made.exit_code == 0, made.output
    assert json.loads(made.stdout)["bits_per_element"] == pytest.approx(plan["winner"]["bits"])


def test_a_captured_graph_is_planned_as_its_model(model: Opened, folder: Path, tmp_path: Path) -> None:
    """And what passes have changed is refused, in one line."""
    exact, kivi, small = (str(tmp_path / name) for name in ("exact.kvcc", "kivi.kvcc", "small.yaml"))
    Path(small).write_text(RECIPES[0])
    for recipe, path in (("exact", exact), (small, kivi)):
        done = CliRunner().invoke(cli, ["export", str(folder), "-r", recipe, "-o", path])
        assert done.exit_code == 0, done.output
    found = search(*opened(exact), None, Goal(bits=20), recipes=RECIPES, **SMALL)
    wanted = search(*model, None, Goal(bits=20), recipes=RECIPES, **SMALL)
    assert [(m.recipe, m.bits) for m in found.measured] == [(m.recipe, m.bits) for m in wanted.measured]
    assert [m.kl for m in found.measured] == pytest.approx([m.kl for m in wanted.measured], rel=1e-3)
    with pytest.raises(DataError, match="was compiled with kivi; give the model, or its artifact"):
        opened(kivi)


@pytest.mark.parametrize("options", [[], ["--budget", "fast"], ["--budget", "4x", "--max-kl", "0.1"]])
def test_unclear_goals_are_refused(options: list[str], tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, ["plan", "nowhere", "-o", str(tmp_path / "p.json"), *options])
    assert done.exit_code == 2


def test_searches_are_plain_data() -> None:
    found = Search(Goal(bits=4), measured(2, 0.5), (measured(2, 0.5),), (), {"a": "b"})
    data = json.loads(json.dumps(found.as_dict()))
    assert data["winner"] == data["front"][0] == asdict(measured(2, 0.5))
