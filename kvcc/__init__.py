"""kvcc: a compiler for KV caches.

calibrate(model, prompts) -> Profile · compile_model(model, profile, recipe) -> Artifact
load(artifact) -> CompiledModel · check(artifact, gates) -> Verdict
"""

from importlib import import_module
from typing import Any

from kvcc._version import __version__

# Imported on first use, so that `import kvcc.runtime` pulls in neither the compiler nor transformers.
_PUBLIC = {
    "calibrate": "kvcc.calibration",
    "compile_model": "kvcc.compile",
    "load": "kvcc.runtime",
    "check": "kvcc.checking",
    "Profile": "kvcc.profile",
    "Recipe": "kvcc.recipe",
    "Plan": "kvcc.runtime.plan",
    "KvccError": "kvcc.errors",
}

__all__ = [
    "KvccError",
    "Plan",
    "Profile",
    "Recipe",
    "__version__",
    "calibrate",
    "check",
    "compile_model",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'kvcc' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
