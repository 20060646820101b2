"""The runtime: loads an artifact and runs it. Imports neither transformers nor the compiler."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvcc.runtime.generation import Generation, Piece, Timing, generate, stream
    from kvcc.runtime.loading import load
    from kvcc.runtime.model import CompiledModel
    from kvcc.runtime.plan import Plan
    from kvcc.runtime.sampling import Sampling

_PUBLIC = {
    "CompiledModel": "model",
    "Generation": "generation",
    "Piece": "generation",
    "Plan": "plan",
    "Sampling": "sampling",
    "Timing": "generation",
    "generate": "generation",
    "load": "loading",
    "stream": "generation",
}

__all__ = ["CompiledModel", "Generation", "Piece", "Plan", "Sampling", "Timing", "generate", "load", "stream"]


def __getattr__(name: str) -> Any:  # imported on first use: the plan's schema alone needs no kernels
    if name not in _PUBLIC:
        raise AttributeError(f"module 'kvcc.runtime' has no attribute {name!r}")
    return getattr(import_module(f"kvcc.runtime.{_PUBLIC[name]}"), name)
