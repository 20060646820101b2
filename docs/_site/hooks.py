"""What mkdocs calls while it builds: navigation, generated pages, and links that lead out of docs/."""

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(Path(__file__).parent))
from commands import commands_page  # noqa: E402

ADOPTED = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md", "security.md": "SECURITY.md"}
_LINK = re.compile(r"(!?\[([^\]]*)\])\(([^)#\s]+)(#[^)\s]*)?\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The navigation: methods are listed by themselves, so that a new page needs no line here."""
    methods = sorted(path.name for path in (ROOT / "docs" / "methods").glob("*.md"))
    nav: list[Any] = [
        {"Home": "index.md"},
        {"Five-minute tour": "tour.md"},
        {"How it works": "how-it-works.md"},
        {"Commands": "commands.md"},
        {"Recipes": "recipes.md"},
        {"Methods": [{name.removesuffix(".md"): f"methods/{name}"} for name in methods]},
        {"Reports": "reports.md"},
        {"Artifact format": "format.md"},
        {"Performance": ["performance.md", "kernels.md"]},
        {"Gates in CI": "ci.md"},
        {"Troubleshooting": "troubleshooting.md"},
        {"Development": ["architecture.md", *ADOPTED]},
    ]
    listed = {page for entry in nav for page in _pages(entry)}
    rest = sorted(p.name for p in (ROOT / "docs").glob("*.md") if p.name not in listed)
    config.nav = [*nav, *([{"More": rest}] if rest else [])]
    return config


def _pages(entry: Any) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    parts = entry.values() if isinstance(entry, dict) else entry
    return [page for part in parts for page in _pages(part)]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Pages that are made here: every command, and those that stand at the repository's root."""
    made = {"commands.md": commands_page()}
    made |= {name: (ROOT / source).read_text(encoding="utf-8") for name, source in ADOPTED.items()}
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Links to adopted pages lead to them; links to other files of the repository become their names."""
    at = page.file.src_uri
    folder = ROOT if at in ADOPTED else (ROOT / "docs" / at).parent
    return _LINK.sub(lambda found: _lead(found, folder, at.count("/")), markdown)


def _lead(found: re.Match[str], folder: Path, depth: int) -> str:
    shown, text, target, anchor = found[1], found[2], found[3], found[4] or ""
    if "://" in target or shown.startswith("!"):
        return found[0]
    path = (folder / target).resolve()
    if not path.is_relative_to(ROOT):
        return found[0]
    name = path.relative_to(ROOT).as_posix()
    back = {source: page for page, source in ADOPTED.items()}
    if name in back:
        return f"{shown}({'../' * depth}{back[name]}{anchor})"
    if name.startswith("docs/"):
        inside = name.removeprefix("docs/")
        return f"{shown}({'../' * depth}{inside}{anchor})"
    return text if text in (f"`{name}`", name) else f"{text} (`{name}`)"
