"""The documentation's site builds without a warning, lists every command, and explains messages that exist."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from kvcc import errors

ROOT = Path(__file__).parents[1]
TROUBLE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("commands", ROOT / "docs" / "_site" / "commands.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_command_and_option_is_on_the_page(generator: ModuleType) -> None:
    page = generator.commands_page()
    found = list(generator.commands())
    assert {"kvcc check", "kvcc report", "kvcc profile merge"} <= {name for name, _ in found}
    for name, command in found:
        section = page.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
        assert command.help.split()[0] in section, name
        for parameter in command.params:
            text = parameter.opts[-1] if parameter.param_type_name == "option" else parameter.make_metavar
            wanted = text if isinstance(text, str) else parameter.human_readable_name
            assert wanted in section, f"{name} {wanted}"


def test_text_is_shown_and_not_read_as_markdown(generator: ModuleType) -> None:
    assert generator.escaped("a|b <c> *d* [e]") == r"a\|b \<c\> \*d\* \[e\]"


@pytest.mark.slow
def test_the_site_builds_with_every_warning_an_error(tmp_path: Path) -> None:
    made = subprocess.run(
        [
            sys.executable,
            "-m",
            "mkdocs",
            "build",
            "--strict",
            "--quiet",
            "--site-dir",
            str(tmp_path / "site"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    pages = {p.relative_to(tmp_path / "site").as_posix() for p in (tmp_path / "site").rglob("*.html")}
    methods = {f"methods/{p.stem}.html" for p in (ROOT / "docs" / "methods").glob("*.md")}
    assert pages >= {"index.html", "tour.html", "commands.html", "troubleshooting.html", *methods}
    home = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    loaded = re.findall(r"""<(?:script|link|img)[^>]+(?:src|href)=["']?(https?://[^"' >]+)""", home)
    assert loaded == []  # nothing is fetched from other hosts
    assert "kvcc check" in (tmp_path / "site" / "commands.html").read_text(encoding="utf-8")
    assert all(name in home for name in methods)  # in the navigation


def messages() -> list[str]:
    """Every text in the package that could be an error's, with \\0 for what is filled in."""
    found = []
    for folder in ("kvcc", "passes", "runtime", "kernels", "calibration_data"):
        for path in (ROOT / folder).glob("*.py" if folder != "kvcc" else "**/*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = [p.value if isinstance(p, ast.Constant) else "\0" for p in node.values]
                    found.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return found


EXPLAINED = re.findall(r"^### `(.+)`$", TROUBLE, re.MULTILINE)


@pytest.fixture(scope="module")
def known() -> list[str]:
    return messages()


@pytest.mark.parametrize("message", EXPLAINED)
def test_explained_messages_exist(message: str, known: list[str]) -> None:
    """Its fixed parts stand in one message of the source, in this order."""
    pattern = ".*".join(re.escape(part) for part in message.split("…"))
    assert any(re.search(pattern, text.replace("\0", " "), re.DOTALL) for text in known), message


def test_many_messages_are_explained() -> None:
    assert len(EXPLAINED) >= 30


def test_every_error_class_is_listed_with_its_code() -> None:
    rows = dict(re.findall(r"^\| (KVCC\d{4}) \| `(\w+)` \|", TROUBLE, re.MULTILINE))
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.KvccError)]
    assert rows == {c.code: c.__name__ for c in classes if c is not errors.KvccError}
