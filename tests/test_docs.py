"""What the documentation names exists: commands, options, targets, files, names, recipes and their sizes."""

import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import yaml

from kvcc.calibration_data import names as data_sets
from kvcc.cli import cli
from kvcc.gates import Gates
from kvcc.kernels.layout import Plane, Side, page_layout
from kvcc.passes import REGISTRY, pass_class
from kvcc.recipe import load_recipe, parse_recipe, shipped

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def fences(text: str, language: str) -> list[str]:
    """The code blocks of a language in a page."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def shell_lines(text: str) -> Iterator[str]:
    """Command lines in a page: console blocks, and what a job in a YAML block runs."""
    for block in fences(text, "console"):
        yield from block.splitlines()
    for block in fences(text, "yaml"):
        jobs = (yaml.safe_load(block) or {}).get("jobs", {})
        for step in (step for job in jobs.values() for step in job["steps"]):
            yield from step.get("run", "").replace("||\n", "\n").splitlines()


def kvcc_calls(text: str) -> Iterator[list[str]]:
    """Arguments of each call of kvcc in a page's command lines."""
    for line in shell_lines(text):
        words = shlex.split(line, comments=True)
        if words[:1] == ["kvcc"]:
            yield words[1:]


def resolve(arguments: list[str]) -> tuple[click.Command, list[str]]:
    """The command that the arguments name, subcommands followed, and the arguments left over."""
    command: click.Command = cli
    while isinstance(command, click.Group) and arguments and not arguments[0].startswith("-"):
        found = command.get_command(click.Context(command), arguments[0])
        assert found is not None, f"kvcc has no command {arguments[0]!r}"
        command, arguments = found, arguments[1:]
    return command, arguments


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_parse(page: Path) -> None:
    for arguments in kvcc_calls(page.read_text(encoding="utf-8")):
        command, rest = resolve(arguments)
        if not isinstance(command, click.Group):
            command.make_context("kvcc", rest)  # raises UsageError for what the command does not take


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_named_in_the_text_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for words in re.findall(r"`kvcc ((?:[a-z]+ ?)+)", text):
        resolve(words.split()[:2] if words.startswith("profile") else words.split()[:1])
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    lines = [*shell_lines(text), *re.findall(r"`(make [^`]+)`", text)]
    for line in lines:
        words = shlex.split(line, comments=True)
        if words[:1] == ["make"]:
            assert {word for word in words[1:] if "=" not in word} <= targets, line


def test_the_readme_gives_the_main_road() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = {arguments[0] for arguments in kvcc_calls(readme)}
    assert shown >= {"calibrate", "export", "inspect", "check", "run", "recipes"}
    assert {"make demo", "make test"} <= {line.partition("#")[0].strip() for line in shell_lines(readme)}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text)
    links = [link for link in links if link != "commands.md"]  # made when the site is built
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_files_named_in_the_text_exist(page: Path) -> None:
    folders = "kvcc|passes|runtime|kernels|calibration_data|tests|benchmarks|docs|examples"
    kinds = "py|c|yaml|j2|md|svg"  # not JSON: docs/format.md names files inside an artifact
    found = re.findall(
        rf"`(?:python )?((?:{folders})/[\w./-]+\.(?:{kinds}))`", page.read_text(encoding="utf-8")
    )
    invented = {"my_method.py", "test_my_method.py", "my-method.md", "NAME.py"}  # of CONTRIBUTING.md
    assert [name for name in found if Path(name).name not in invented and not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_python_blocks_import_what_exists(page: Path) -> None:
    for block in fences(page.read_text(encoding="utf-8"), "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kvcc"):
                module = importlib.import_module(node.module or "")
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_no_package_index_or_local_path(page: Path) -> None:
    assert not re.search(r"index-url|simple/|/tmp/|/home/|/root/", page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_every_pass_has_a_page_with_its_parameters(name: str) -> None:
    page = (ROOT / "docs" / "methods" / f"{name}.md").read_text(encoding="utf-8")
    assert page.startswith(f"# {name}\n")
    table = {
        word
        for row in re.findall(r"^\| (`.*?) \|", page, re.MULTILINE)
        for word in re.findall(r"`(\w+)`", row)
    }
    assert table == set(pass_class(name).model_fields) - {"layers"}  # which all passes have
    assert f"(methods/{name}.md)" in (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")


def recipe_rows() -> dict[str, list[str]]:
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8").partition("## Writing one")[0]
    rows = [
        [cell.strip() for cell in row.split("|")[1:-1]] for row in text.splitlines() if row.startswith("| `")
    ]
    return {row[0].strip("`"): row[1:] for row in rows}


def test_every_shipped_recipe_has_a_row() -> None:
    assert sorted(recipe_rows()) == shipped()


@pytest.mark.parametrize("name", shipped())
def test_a_recipe_takes_the_bits_its_row_says(name: str) -> None:
    """By the page layout, for one 16-bit head of size 64."""
    recipe, channels, k, v = load_recipe(name), 64, (16, 64), (16, 64)
    for step in (p.model_dump() | {"name": p.name} for p in recipe.passes):
        if step["name"] == "transform":
            assert float(recipe_rows()[name][1]) == step["bits"]
            assert recipe_rows()[name][2] == "yes"
            return
        if step["name"] == "think":
            channels = int(channels * step["keep_ratio"])
        else:
            k, v = (step["k_bits"], step["group_size"]), (step["v_bits"], step["group_size"])
    sides = Side((Plane(k[0], channels),), "tokens", k[1]), Side((Plane(v[0], 64),), "channels", v[1])
    layout = page_layout(recipe.windows.page, *((side,) for side in sides))
    said = recipe_rows()[name]
    assert float(said[1]) == round(8 * layout.nbytes / recipe.windows.page / 128, 2)
    assert said[2] == ("yes" if recipe.requires_profile() else "no")


def test_recipes_in_the_docs_are_valid() -> None:
    blocks = fences((ROOT / "docs" / "recipes.md").read_text(encoding="utf-8"), "yaml")
    assert [len(parse_recipe(block, "docs/recipes.md").passes) for block in blocks] == [3]


def test_the_ci_page_lists_every_gate() -> None:
    text = (ROOT / "docs" / "ci.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`[a-z_`0-9, ]+`) \| holds|^\| (`[a-z_`0-9, ]+`) \|", text, re.MULTILINE)
    listed = {name for row in rows for cell in row for name in re.findall(r"`([a-z_0-9]+)`", cell)}
    assert listed == set(Gates.model_fields)
    gates, job = fences(text, "yaml")
    assert Gates.model_validate(yaml.safe_load(gates)).kl is not None
    (steps,) = (job["steps"] for job in yaml.safe_load(job)["jobs"].values())
    check = next(step["run"] for step in steps if step.get("name") == "check")
    for option in ("--gates", "--junit", '--markdown "$GITHUB_STEP_SUMMARY"'):
        assert option in check


def test_the_readme_names_the_built_in_data_sets() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (listed,) = re.findall(r"Data sets come built in\s+\(([a-z, ]+)\)", readme)
    assert set(listed.split(", ")) <= set(data_sets())
