"""Imports run one way: kernels <- runtime <- nothing of the compiler; calibration_data stands alone."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINKED = ("passes", "runtime", "kernels", "calibration_data")  # imported through links inside kvcc/
# Besides itself, what each folder may import of kvcc.
ALLOWED = {
    "kernels": ("kvcc.errors",),
    "runtime": ("kvcc.errors", "kvcc._version", "kvcc.kernels"),
    "calibration_data": ("kvcc.errors",),
}
TRANSFORMERS_AT = ("kvcc/frontend/", "kvcc/integrations/transformers.py")  # loading; caching


def sources() -> Iterator[Path]:
    """Every Python file of the package, once, relative to the root."""
    for folder in ("kvcc", *LINKED):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if not (folder == "kvcc" and path.relative_to(ROOT).parts[1] in LINKED):
                yield path.relative_to(ROOT)


def imported(source: str) -> Iterator[str]:
    """Dotted names that a source imports anywhere in it: statements, and importlib with a literal name.

    `from a import b` counts as a.b, and an f-string as its literal beginning.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and "import" in ast.unparse(node.func):
            first = node.args[0]
            if isinstance(first, ast.JoinedStr):
                first = first.values[0]
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield first.value


def inside(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def faults(path: str, source: str) -> list[str]:
    """What a file imports and may not. `path` is relative to the root, with slashes."""
    folder = Path(path).parts[0]
    allowed = (f"kvcc.{folder}", *ALLOWED.get(folder, ()))
    found = []
    for name in imported(source):
        if name.startswith("."):
            found.append(f"{path}: relative import {name}; write the absolute name")
        elif inside(name, LINKED):
            found.append(f"{path}: {name}; import kvcc.{name}, or the module exists twice")
        elif inside(name, ("transformers",)) and not path.startswith(TRANSFORMERS_AT):
            found.append(f"{path}: {name}; only {' and '.join(TRANSFORMERS_AT)} may import transformers")
        elif folder in ALLOWED and inside(name, ("kvcc",)) and not inside(name, allowed):
            found.append(f"{path}: {name}; {folder} may import only {', '.join(allowed)}")
    return found


def test_the_package_keeps_the_rules() -> None:
    paths = list(sources())
    assert {p.parts[0] for p in paths} == {"kvcc", *LINKED}
    assert [f for p in paths for f in faults(p.as_posix(), (ROOT / p).read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("runtime/cache.py", "from kvcc.profile import Profile"),
        ("runtime/cache.py", "from kvcc import profile"),
        ("runtime/cache.py", "def f():\n    import kvcc.frontend"),
        ("runtime/cache.py", "import importlib\nimportlib.import_module('kvcc.passes.kivi')"),
        ("runtime/cache.py", "import_module(f'kvcc.cli.{name}')"),
        ("runtime/tokenizer.py", "from transformers import AutoTokenizer"),
        ("runtime/tokenizer.py", "from .plan import Plan"),
        ("kernels/cpu.py", "from kvcc.runtime.plan import Plan"),
        ("calibration_data/prose.py", "from kvcc.runtime.tokenizer import Tokenizer"),
        ("kvcc/calibration.py", "import transformers"),
        ("passes/kivi.py", "import transformers.utils"),
        ("kvcc/compile.py", "from runtime.plan import Plan"),
        ("passes/kivi.py", "import kernels"),
    ],
)
def test_a_forbidden_import_is_found(path: str, source: str) -> None:
    assert len(faults(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("runtime/cache.py", "from kvcc.kernels import backend\nfrom kvcc.errors import KvccError"),
        ("runtime/cache.py", "from kvcc.runtime.plan import Plan\nimport torch, kvcc._version"),
        ("kernels/triton.py", "from kvcc.kernels.layout import Plane"),
        ("kvcc/frontend/loading.py", "import transformers"),
        ("passes/think.py", "from kvcc.profile import Profile\nfrom kvcc.runtime.plan import Plan"),
    ],
)
def test_a_permitted_import_is_not(path: str, source: str) -> None:
    assert faults(path, source) == []


_ALONE = f"""
import importlib, pkgutil, sys

ALLOWED = {("kvcc.runtime", *ALLOWED["runtime"])!r}


class Refuse:
    def find_spec(self, name, path=None, target=None):
        foreign = name.startswith("kvcc.") and not name.startswith(ALLOWED)
        if name.split(".")[0] in ("transformers", "huggingface_hub", "cryptography") or foreign:
            raise ImportError("the runtime imported " + name)


sys.meta_path.insert(0, Refuse())
for name in sys.argv[1:]:
    importlib.import_module(name)
import kvcc.runtime
for name in kvcc.runtime.__all__:
    getattr(kvcc.runtime, name)
assert not {{"transformers", "huggingface_hub"}} & set(sys.modules)
print("imported", len(sys.argv) - 1)
"""


def test_the_runtime_imports_without_transformers_cryptography_and_compiler() -> None:
    files = sorted((ROOT / "runtime").glob("*.py"))
    modules = [f"kvcc.runtime.{p.stem}".removesuffix(".__init__") for p in files]
    assert {"kvcc.runtime", "kvcc.runtime.loading", "kvcc.runtime.generation"} <= set(modules)
    command = [sys.executable, "-c", _ALONE, *modules]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == (f"imported {len(modules)}\n", 0), done.stderr
