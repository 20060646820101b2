"""Widths for K and V of layers: the best of their price, as recipes that can be compiled."""

import itertools

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcc.errors import PassError, RecipeError
from kvcc.mixing import PROBE, WIDTHS, metadata, mixed_recipe, single_side
from kvcc.recipe import parse_recipe
from tests.compiled import compiled, recipe


def widths_of(text: str) -> dict[tuple[int, str], int]:
    entries = [entry["kivi"] for entry in yaml.safe_load(text)["passes"]]
    return {(layer, side): e[f"{side}_bits"] for e in entries for layer in e["layers"] for side in "kv"}


@given(st.lists(st.floats(1e-6, 1.0), min_size=2, max_size=4), st.floats(2.5, 8.6), st.sampled_from([16, 64]))
@settings(deadline=None)
def test_no_other_widths_lose_less(costs: list[float], bits: float, group: int) -> None:
    """Up to the last jump, which may not fit; losses are convex in bits, so greedy choice is exact otherwise."""
    costs = costs[: len(costs) // 2 * 2]
    places = [(layer, side) for layer in range(len(costs) // 2) for side in "kv"]
    given_costs = dict(zip(places, costs))
    found = mixed_recipe(given_costs, bits, group)
    assert (found is None) == (bits < 2 + metadata(group))
    if found is None:
        return
    widths = widths_of(found)

    def loss(chosen: dict[tuple[int, str], int]) -> float:
        return sum(cost * 4.0 ** (PROBE - chosen[place]) for place, cost in given_costs.items())

    allowed = len(places) * (bits - metadata(group))
    assert sum(widths.values()) <= allowed + 1e-9
    for other in itertools.product(WIDTHS, repeat=len(places)):
        if sum(other) <= allowed - (WIDTHS[-1] - WIDTHS[-2]):
            assert loss(widths) <= loss(dict(zip(places, other))) * (1 + 1e-9)


def test_too_few_bits_for_any_widths() -> None:
    assert mixed_recipe({(0, "k"): 1.0, (0, "v"): 1.0}, 2.4, 64) is None


def test_one_layer_is_quantised_coarsely() -> None:
    (entry,) = yaml.safe_load(single_side(3, "k", 64))["passes"]
    assert entry["kivi"] == {"k_bits": PROBE, "v_bits": 8, "group_size": 64, "layers": [3]}


def test_passes_leave_other_layers_alone() -> None:
    passes = "\n  - kivi: {k_bits: 2, group_size: 8, layers: [1]}\n  - kivi: {k_bits: 8, group_size: 8, layers: [0]}"
    plan = compiled("llama", recipe(passes)).plan
    assert [layer.heads[0].k.planes[0].bits for layer in plan.layers] == [8, 2]


def test_layers_that_overlap_or_are_missing_are_refused() -> None:
    with pytest.raises(RecipeError, match="appears twice; keep one, or give each layers of its own"):
        parse_recipe("passes:\n  - kivi: {layers: [0, 1]}\n  - kivi: {layers: [1]}\n", "x")
    with pytest.raises(PassError, match="layers 0 to 1, not 7"):
        compiled("llama", recipe("\n  - kivi: {group_size: 8, layers: [7]}"))
