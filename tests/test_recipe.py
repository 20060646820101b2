"""Recipes: what ships, and what is refused with the line it stands on."""

from pathlib import Path

import pytest

from kvcc.errors import RecipeError
from kvcc.recipe import load_recipe, parse_recipe, shipped

REFUSED = {
    "typo in a pass": ("passes:\n  - kivvi: {}\n", r"r.yaml:2: unknown pass 'kivvi'; known passes: .*kivi"),
    "unknown parameter": (
        "passes:\n  - kivi: {bits: 4}\n",
        r"r.yaml:2: kivi: bits: .*parameters: layers, k_bits",
    ),
    "value out of range": (
        "passes:\n  - kivi: {k_bits: 5}\n",
        r"r.yaml:2: kivi: k_bits: Input should be 2, 3, 4 or 8",
    ),
    "wrong type": ("passes:\n  - think:\n      keep_ratio: many\n", r"r.yaml:2: think: keep_ratio: .*number"),
    "ratio above one": (
        "passes:\n  - think: {keep_ratio: 1.5}\n",
        r"r.yaml:2: think: keep_ratio: .*less than or equal",
    ),
    "impossible order": (
        "passes:\n  - kivi: {}\n  - think: {}\n",
        r"r.yaml:2: kivi must come after think; swap them",
    ),
    "twice": ("passes:\n  - kivi: {}\n  - kivi: {}\n", r"r.yaml:3: kivi appears twice"),
    "no passes": ("name: x\n", r"r.yaml:1: a recipe needs `passes`"),
    "passes not a list": ("passes: {kivi: {}}\n", r"r.yaml:1: `passes` must be a list"),
    "two passes in one entry": ("passes:\n  - kivi: {}\n    think: {}\n", r"r.yaml:2: a pass is one"),
    "unknown field": ("recipe: 1\npasses: []\n", r"r.yaml:1: unknown field 'recipe'"),
    "not YAML": ("passes: [\n", r"r.yaml:\d: not YAML"),
    "empty": ("", r"r.yaml:1: a recipe must be"),
    "bad window": ("windows: {page: 12}\npasses: []\n", r"r.yaml:1: windows: page: .*multiple of 8"),
    "a Python object": ("passes: !!python/object/apply:os.system ['true']\n", r"r.yaml:1: "),
    "an object as parameter": (
        "passes:\n  - kivi: {k_bits: !!python/name:os.system }\n",
        r"r.yaml:2: not plain data",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_the_line(case: str) -> None:
    text, message = REFUSED[case]
    with pytest.raises(RecipeError, match=message):
        parse_recipe(text, "r.yaml")


def test_shipped_recipes_load_and_explain_themselves() -> None:
    assert {"exact", "kivi-2", "kivi-4", "think-40", "think-40-kivi-2", "think-40-kivi-4"} <= set(shipped())
    for name in shipped():
        recipe = load_recipe(name)
        assert recipe.name == name
        assert recipe.summary


def test_a_recipe_survives_its_own_dictionary() -> None:
    import yaml

    recipe = load_recipe("think-40-kivi-2")
    again = parse_recipe(yaml.safe_dump(recipe.as_dict()), "again.yaml")
    assert again.as_dict() == recipe.as_dict()


def test_a_file_and_a_missing_one(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("passes: [kivi]\n")
    assert load_recipe(str(file)).passes[0].name == "kivi"
    with pytest.raises(RecipeError, match=r"no recipe 'kivi-5'; shipped recipes: .*kivi-4"):
        load_recipe("kivi-5")
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(str(tmp_path / "absent.yaml"))
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(str(tmp_path / "bytes.yaml"))
