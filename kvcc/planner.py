"""The planner: which recipe loses least within a budget of bytes, found by measuring through the real cache.

Two additive solvers give bits where they gain most: the transform pass, to channels, by what their errors cost (see
kvcc.transform_coding), and `kvcc.mixing`, to K and V of layers, by short measurements of each. What is left is a choice
between a few dozen recipes, too unlike each other for a formula: they are compiled in memory and measured, and the
best ones again on other texts.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvcc.calibration import calibrate, encode_sets
from kvcc.calibration_data import load_prompts
from kvcc.errors import ArtifactUnwritable, DataError, KvccError
from kvcc.graph import Graph, attention_nodes, attention_spec
from kvcc.mixing import least, mixed_recipe, single_side
from kvcc.profile import Profile
from kvcc.progress import OnProgress, unseen
from kvcc.runtime import CompiledModel
from kvcc.runtime.tokenizer import Tokenizer
from kvcc.trials import DATA, Measured, Trials

CALIBRATION = f"{DATA},retrieval"  # long contexts are asked for facts in them
CALIBRATION_PROMPTS, CALIBRATION_LENGTH = 15, 1024
FINALISTS = 3
GROUP = 64  # tokens of a page, and channels, that share a scale; as many of these as divide a head's channels
DATA_FREE = (
    "kivi: {k_bits: 2, v_bits: 2, group_size: WIDE}",
    "kivi: {k_bits: 2, v_bits: 2, group_size: NARROW}",
    "kivi: {k_bits: 3, v_bits: 3, group_size: WIDE}",
    "kivi: {k_bits: 4, v_bits: 4, group_size: WIDE}",
    "kivi: {k_bits: 4, v_bits: 4, group_size: NARROW}",
    "kivi: {k_bits: 8, v_bits: 8, group_size: WIDE}",
    "hadamard: {k_bits: 3, v_bits: 3, group_size: WIDE}",
    "hadamard: {k_bits: 4, v_bits: 4, group_size: WIDE}",
    "turboquant: {k_bits: 3, v_bits: 3}",
    "turboquant: {k_bits: 4, v_bits: 4}",
)
TRANSFORMS = (("dual", "true"), ("dual", "false"), ("pca", "true"), ("native", "true"))
CALIBRATED = (
    "kitty: {boosted: 0.125, group_size: WIDE}",
    "kitty: {boosted: 0.25, group_size: WIDE}",
    "oscar: {k_bits: 2, v_bits: 2}",
    "oscar: {k_bits: 4, v_bits: 4}",
    "zipcache: {}",
    "cskv: {}",
    "nvfp4: {}",
    "int8: {}",
    "fp8: {}",
)
WINDOWS = "windows: {dtype: half}\n"


@dataclass(frozen=True)
class Goal:
    """What to look for: the least divergence within `bits` per element, or the least bits within `kl` nats.

    With `attention_ms`, recipes that trade time for bytes are tried, too, and no recipe may take longer than that.
    """

    bits: float | None = None  # metadata included, windows not
    kl: float | None = None
    attention_ms: float | None = None  # see kvcc.attention_time, at TIMED tokens


@dataclass(frozen=True)
class Search:
    """What was found. `front`: measured recipes that no other beats in bits and KL, by falling bits."""

    goal: Goal
    winner: Measured
    front: tuple[Measured, ...]
    measured: tuple[Measured, ...]
    refused: dict[str, str]  # recipes that do not apply to this model, and why

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


def candidates(goal: Goal, profile: Profile | None, kv_heads: int = 1, group_size: int = GROUP) -> list[str]:
    """Recipes worth measuring, as YAML, in a fixed order: published methods, and transforms at the goal's bits.

    Bases of several of the model's `kv_heads` are among them where the goal bounds the time that they take. Groups
    are of `group_size` and, where that is smaller, of GROUP / 2.
    """
    budgets = [goal.bits] if goal.bits is not None else [1.5, 2.0, 2.5, 3.0, 3.5, 4.25, 5.25, 6.25]
    fixed = list(DATA_FREE)
    if profile is not None:
        fixed += CALIBRATED
        for bits in budgets:
            for basis, scales in TRANSFORMS:
                options = f"bits: {bits:g}, k_basis: {basis}, v_basis: {basis}, token_scales: {scales}"
                fixed.append(f"transform: {{{options}}}")
            if goal.attention_ms is not None:
                for joint in (n for n in range(2, kv_heads + 1) if kv_heads % n == 0):
                    fixed.append(f"transform: {{bits: {bits:g}, joint_heads: {joint}}}")
    narrow = min(GROUP // 2, group_size)
    lines = (line.replace("WIDE", f"{group_size}").replace("NARROW", f"{narrow}") for line in fixed)
    return [f"{WINDOWS}passes:\n  - {line}\n" for line in dict.fromkeys(lines)]


def widest_group(graph: Graph) -> int:
    """The largest group of GROUP's divisors that K and V of every layer can be cut into."""
    specs = [attention_spec(node) for node in attention_nodes(graph.module)]
    return math.gcd(GROUP, *(size for spec in specs for size in (spec.k_dim, spec.v_dim)))


def calibrated(
    graph: Graph, tokenizer: Tokenizer, seed: int = 0, on_progress: OnProgress | None = None
) -> Profile:
    """A profile with gradients, of CALIBRATION, for searching without one that was made before."""
    report = on_progress or unseen
    length = min(CALIBRATION_LENGTH, graph.model.context_length)
    prompts = load_prompts(CALIBRATION, samples=CALIBRATION_PROMPTS, length=length, seed=seed)
    sets = encode_sets(prompts, tokenizer, seed=seed, length=length)
    return calibrate(
        graph,
        sets,
        gradients=True,
        progress=lambda p: report("calibrating", p.prompts, p.total_prompts),
    )


def search(
    graph: Graph,
    reference: CompiledModel,
    profile: Profile | None,
    goal: Goal,
    *,
    recipes: Iterable[str] | None = None,
    texts: int = 2,
    context: int = 1024,
    tokens: int = 256,
    seed: int = 0,
    state: Path | None = None,
    on_progress: OnProgress | None = None,
) -> Search:
    """Measure candidates (`recipes`, or those of `candidates`) for the model in `graph`, and choose.

    `reference` is that model uncompressed, with its tokenizer (kvcc.uncompressed), which all are compared with.
    `texts` of each kind of DATA, predictions of `tokens` tokens after `context` ones; finalists are measured on as
    many others. With `state`, measurements are kept in that file and taken from it. Deterministic for a seed. Raises
    DataError when nothing meets the goal, on both kinds of texts.
    """
    report = on_progress or unseen
    trials = Trials(graph, reference, profile, texts, context, tokens, seed, state)
    timed = goal.attention_ms is not None
    wanted = list(
        candidates(goal, profile, graph.model.kv_heads, widest_group(graph)) if recipes is None else recipes
    )
    measured, refused = [], {}
    if recipes is None and goal.bits is not None:
        wanted += _mixed(trials, goal.bits, report)
    for number, recipe in enumerate(wanted):
        report("measuring recipes", number, len(wanted))
        try:
            found = trials.measure(recipe, goal.bits, timed=timed)
        except ArtifactUnwritable:  # of what is measured; it says nothing of the recipe
            raise
        except KvccError as error:
            refused[recipe] = str(error)
            continue
        if found is not None and math.isfinite(found.kl):
            measured.append(found)
        elif found is not None:
            refused[recipe] = f"its predictions diverge by {found.kl} nats"
    report("measuring recipes", len(wanted), len(wanted))
    fitting = sorted((m for m in measured if _fits(m, goal)), key=lambda m: _rank(m, goal))
    if not fitting:
        least = min(measured, key=lambda m: (m.bits, m.kl), default=None)
        closest = (
            f"; the smallest that was measured has {least.bits:.2f} bits and KL {least.kl:.3g}"
            if least
            else ""
        )
        raise DataError(f"no recipe meets the goal{closest}; allow more bytes or a larger KL")
    winner = min(_verified(trials, fitting, goal, report), key=lambda m: _rank(m, goal))
    return Search(goal, winner, pareto(measured), tuple(measured), refused)


def _verified(trials: Trials, fitting: Sequence[Measured], goal: Goal, report: OnProgress) -> list[Measured]:
    """The first FINALISTS measured on other texts, those that meet the goal there, too; else the first that does.

    Raises DataError when none does: texts differ, and recipes chosen by the bits lie next to a limit of KL.
    """
    held: list[Measured] = []
    for number, each in enumerate(fitting, 1):
        report("verifying", number - 1, max(number, min(FINALISTS, len(fitting))))
        again = trials.measure(each.recipe, goal.bits, timed=goal.attention_ms is not None, again=True)
        assert again is not None
        if _fits(again, goal):
            held.append(again)
        if held and number >= FINALISTS:
            break
    report("verifying", number, number)
    if not held:
        raise DataError(
            f"none of the {len(fitting)} recipes that met the goal meets it on other texts, too; allow a larger KL"
        )
    return held


def pareto(measured: Sequence[Measured]) -> tuple[Measured, ...]:
    """Those that no other beats in one of bits and KL without losing in the other, by falling bits."""
    front: list[Measured] = []
    for each in sorted(measured, key=lambda m: (m.bits, m.kl)):
        if not front or each.kl < front[-1].kl:
            front.append(each)
    return tuple(reversed(front))


def _fits(found: Measured, goal: Goal) -> bool:
    return (
        (goal.bits is None or found.bits <= goal.bits + 1e-9)
        and (goal.kl is None or found.kl <= goal.kl)
        and (goal.attention_ms is None or (found.attention_ms or 0.0) <= goal.attention_ms)
    )


def _rank(found: Measured, goal: Goal) -> tuple[float, float]:
    return (found.kl, found.bits) if goal.bits is not None else (found.bits, found.kl)


def _mixed(trials: Trials, bits: float, report: OnProgress) -> list[str]:
    """The recipe that gives K and V of every layer a width of its own; none where layers cannot be quantised so."""
    module, group = trials.graph.module, widest_group(trials.graph)
    if bits < least(group):
        return []
    layers = [i for i, node in enumerate(attention_nodes(module)) if not attention_spec(node).window]
    costs: dict[tuple[int, str], float] = {}
    for number, (layer, side) in enumerate((i, s) for i in layers for s in "kv"):
        report("measuring layers", number, 2 * len(layers))
        try:
            found = trials.measure(f"{WINDOWS}{single_side(layer, side, group)}", None, short=True)
        except ArtifactUnwritable:
            raise
        except KvccError:
            return []
        if found is None or not math.isfinite(found.kl):
            return []
        costs[layer, side] = found.kl
    report("measuring layers", 2 * len(layers), 2 * len(layers))
    recipe = mixed_recipe(costs, bits, group)
    return [] if recipe is None else [f"{WINDOWS}{recipe}"]
