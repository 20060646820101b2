"""A recipe: an ordered list of passes with parameters, and the windows they share. A short YAML file."""

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from kvcc.errors import RecipeError
from kvcc.passes import Pass, Windows, pass_class

T = TypeVar("T", bound=BaseModel)
SHIPPED = files("kvcc") / "recipes"


@dataclass(frozen=True)
class Recipe:
    """What to compile. `lines` are the YAML lines of the passes, for messages."""

    name: str
    summary: str
    windows: Windows
    passes: tuple[Pass, ...]
    lines: tuple[int, ...]

    def requires_profile(self) -> bool:
        """Whether any pass needs calibration statistics."""
        return any(p.requires_profile() for p in self.passes)

    def as_dict(self) -> dict[str, Any]:
        """The recipe as plain data, as the artifact's manifest keeps it."""
        return {
            "name": self.name,
            "summary": self.summary,
            "windows": self.windows.model_dump(),
            "passes": [{p.name: p.model_dump()} for p in self.passes],
        }


def shipped() -> list[str]:
    """Names of the recipes that come with kvcc."""
    return sorted(f.name.removesuffix(".yaml") for f in SHIPPED.iterdir() if f.name.endswith(".yaml"))


def load_recipe(source: str) -> Recipe:
    """A shipped recipe by name, or a recipe file by path.

    Raises RecipeError `file:line: …` for YAML that does not parse, an unknown pass, a bad parameter or an
    impossible order: all before any model is loaded.
    """
    path = Path(source)
    if source in shipped():
        text, origin = (SHIPPED / f"{source}.yaml").read_text(), f"{source}.yaml"
    elif path.suffix in (".yaml", ".yml") or path.is_file():
        try:
            text, origin = path.read_text(encoding="utf-8"), source
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"recipe {source} cannot be read: {error}") from error
    else:
        raise RecipeError(
            f"no recipe {source!r}; shipped recipes: {', '.join(shipped())}; or give a .yaml file"
        )
    return parse_recipe(text, origin)


def parse_recipe(text: str, origin: str) -> Recipe:
    """A Recipe from YAML text; `origin` names it in messages."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        raise RecipeError(f"{origin}:{line}: not YAML: {getattr(error, 'problem', error)}") from error
    fields = _mapping(root, origin, "a recipe")
    for key, (node, _) in fields.items():
        if key not in ("name", "summary", "windows", "passes"):
            raise RecipeError(
                f"{origin}:{_line(node)}: unknown field {key!r}; use name, summary, windows, passes"
            )
    if "passes" not in fields:
        raise RecipeError(f"{origin}:1: a recipe needs `passes`, a list (it may be empty)")
    windows = Windows()
    if "windows" in fields:
        node, value = fields["windows"]
        windows = _validated(Windows, _plain(value, origin), origin, _line(node), "windows")
    passes, lines = _passes(fields["passes"][1], origin)
    _check_order(passes, lines, origin)
    name = str(_plain(fields["name"][1], origin)) if "name" in fields else Path(origin).stem
    summary = str(_plain(fields["summary"][1], origin)) if "summary" in fields else ""
    return Recipe(name, summary, windows, tuple(passes), tuple(lines))


def _passes(node: yaml.Node, origin: str) -> tuple[list[Pass], list[int]]:
    if not isinstance(node, yaml.SequenceNode):
        raise RecipeError(
            f"{origin}:{_line(node)}: `passes` must be a list, each entry `name: {{parameters}}`"
        )
    passes, lines = [], []
    for entry in node.value:
        line = _line(entry)
        if isinstance(entry, yaml.ScalarNode):
            name = str(entry.value)
            parameters: Any = {}
        else:
            fields = _mapping(entry, origin, "a pass")
            if len(fields) != 1:
                raise RecipeError(
                    f"{origin}:{line}: a pass is one `name: {{parameters}}`, found {', '.join(fields)}"
                )
            name, (_, value) = next(iter(fields.items()))
            parameters = _plain(value, origin) or {}
        try:
            found = pass_class(name)
        except RecipeError as error:
            raise RecipeError(f"{origin}:{line}: {error}") from error
        passes.append(_validated(found, parameters, origin, line, name))
        lines.append(line)
    return passes, lines


def _check_order(passes: list[Pass], lines: list[int], origin: str) -> None:
    for at, (later, line) in enumerate(zip(passes, lines)):
        for earlier in passes[at + 1 :]:
            if earlier.name in later.after:
                raise RecipeError(f"{origin}:{line}: {later.name} must come after {earlier.name}; swap them")
        if later.once and any(p.name == later.name and _overlap(p, later) for p in passes[:at]):
            raise RecipeError(
                f"{origin}:{line}: {later.name} appears twice; keep one, or give each layers of its own"
            )


def _overlap(a: Pass, b: Pass) -> bool:
    return a.layers is None or b.layers is None or bool(set(a.layers) & set(b.layers))


def _validated(cls: type[T], data: Any, origin: str, line: int, what: str) -> T:
    try:
        return cls.model_validate(data, strict=False)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        known = ", ".join(cls.model_fields)
        hint = f"; parameters: {known}" if first["type"] == "extra_forbidden" else ""
        raise RecipeError(f"{origin}:{line}: {what}: {field}: {first['msg']}{hint}") from error


def _mapping(node: yaml.Node | None, origin: str, what: str) -> dict[str, tuple[yaml.Node, yaml.Node]]:
    if not isinstance(node, yaml.MappingNode):
        raise RecipeError(f"{origin}:{_line(node) if node else 1}: {what} must be `key: value` lines")
    return {str(key.value): (key, value) for key, value in node.value}


def _plain(node: yaml.Node, origin: str) -> Any:
    try:
        return yaml.safe_load(yaml.serialize(node))
    except yaml.YAMLError as error:
        raise RecipeError(
            f"{origin}:{_line(node)}: not plain data: {getattr(error, 'problem', error)}"
        ) from error


def _line(node: yaml.Node) -> int:
    line: int = node.start_mark.line + 1
    return line
