"""A verdict read back from plain data, as a report needs it: checked, and judged anew."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, NonNegativeInt, ValidationError, model_validator

from kvcc.errors import ArtifactError
from kvcc.gates import GateResult
from kvcc.layer_errors import LayerError
from kvcc.measure import GreedyAgreement, RetrievalScore, TextAgreement
from kvcc.runtime.strict_json import first_fault

LARGEST_LOSS = 500.0  # nats per token; beyond it a perplexity overflows


class Measured(BaseModel):
    """A verdict; `overall`, `holds` and `passed` are computed anew."""

    against: str
    recipe: str
    seed: int
    size: dict[str, Any]
    texts: tuple[TextAgreement, ...]
    retrieval: tuple[RetrievalScore, ...]
    greedy: GreedyAgreement | None
    bits_per_element: float
    uncompressed_bytes_per_token: NonNegativeInt
    gates: tuple[GateResult, ...]
    other_contexts: tuple[TextAgreement, ...] = ()
    layers: tuple[LayerError, ...] = ()

    @model_validator(mode="after")
    def _has_numbers(self) -> "Measured":
        for text in (*self.texts, *self.other_contexts):
            if not text.buckets or min(b.tokens for b in text.buckets) < 1 or text.formula_bytes < 1:
                raise ValueError(f"text {text.kind!r} measures no tokens or no bytes")
            if any(max(abs(b.nll), abs(b.nll_reference)) > LARGEST_LOSS for b in text.buckets):
                raise ValueError(f"text {text.kind!r} has a loss beyond {LARGEST_LOSS:g} nats per token")
        return self

    @property
    def passed(self) -> bool:
        return all(g.holds for g in self.gates)

    @property
    def mean_kl(self) -> float | None:
        """Mean over kinds of text, as `kvcc compare` and `kvcc plan` take it; None without texts."""
        kls = [text.overall.kl for text in self.texts]
        return sum(kls) / len(kls) if kls else None


def read_verdict(verdict: Mapping[str, Any]) -> Measured:
    """Raises ArtifactError for what is no verdict."""
    try:
        return Measured.model_validate(dict(verdict))
    except ValidationError as error:
        raise ArtifactError(
            f"accuracy.json: {first_fault(error)}; measure again: kvcc check --store"
        ) from error
