"""One file per method. The registry maps a name to a class, whose module is imported when it is asked for."""

from importlib import import_module

from kvcc.errors import RecipeError
from kvcc.passes.contract import Compilation, Note, Pass, Windows, start

__all__ = ["REGISTRY", "Compilation", "Note", "Pass", "Windows", "pass_class", "start"]

REGISTRY: dict[str, str] = {  # name -> module:class
    "fold-values": "kvcc.passes.fold_values:FoldValues",
    "think": "kvcc.passes.think:Think",
    "kivi": "kvcc.passes.kivi:Kivi",
    "kitty": "kvcc.passes.kitty:Kitty",
    "hadamard": "kvcc.passes.hadamard:Hadamard",
    "cskv": "kvcc.passes.cskv:Cskv",
    "zipcache": "kvcc.passes.zipcache:ZipCache",
    "int8": "kvcc.passes.int8:Int8",
    "fp8": "kvcc.passes.fp8:Fp8",
    "nvfp4": "kvcc.passes.nvfp4:NvFp4",
    "turboquant": "kvcc.passes.turboquant:TurboQuant",
    "oscar": "kvcc.passes.oscar:Oscar",
    "transform": "kvcc.passes.transform:Transform",
}


def pass_class(name: str) -> type[Pass]:
    """The class of the pass called `name`. Raises RecipeError naming the passes there are."""
    if name not in REGISTRY:
        raise RecipeError(f"unknown pass {name!r}; known passes: {', '.join(sorted(REGISTRY))}")
    module, _, class_name = REGISTRY[name].partition(":")
    found = getattr(import_module(module), class_name)
    assert isinstance(found, type)
    assert issubclass(found, Pass)
    return found
