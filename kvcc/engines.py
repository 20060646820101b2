"""Which engines can run what an artifact holds, and why others cannot."""

from collections.abc import Mapping, Sequence
from typing import Any

from kvcc.exchange.onnx_support import why_not
from kvcc.runtime.graph import Program
from kvcc.runtime.plan import Plan


def engines(
    passes: Sequence[Mapping[str, Any]], folded: Mapping[str, str] | None, plan: Plan, graph: Program
) -> dict[str, str | None]:
    """By engine: None where it can, else the reason in one line.

    passes: a recipe's, as the manifest has them ({name: parameters} each); folded: the manifest's.
    "torch" is kvcc's own runtime; "transformers" runs the artifact by kvcc.integrations.transformers; "vllm" would run
    the same recipe exported with --format compressed-tensors, "onnxruntime" the artifact with --format onnx.
    """
    return {
        "torch": None,
        "transformers": _transformers(folded),
        "vllm": _vllm(passes),
        "onnxruntime": why_not(plan, graph),
    }


def _transformers(folded: Mapping[str, str] | None) -> str | None:
    if folded is None:
        return "the artifact does not say what its recipe folds into weights; export it again"
    if any(not parameter for parameter in folded.values()):
        return "the recipe changes shapes of weights, which a stock model cannot hold"
    return None


def _vllm(passes: Sequence[Mapping[str, Any]]) -> str | None:
    names = [name for entry in passes for name in entry]
    if names not in (["fp8"], ["int8"]):
        return f"its caches of 8 bits have static scales (fp8, int8); this is {', '.join(names) or 'exact'}"
    (parameters,) = passes[0].values()
    if parameters.get("layers") is not None:
        return f"{names[0]} is for some layers only"
    if parameters.get("scales") == "channel":
        return "int8 has a scale a channel; with scales: head it could"
    return None
