"""Accuracy gates: what must hold for a check to pass."""

from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kvcc.errors import RecipeError


class Gates(BaseModel):
    """Limits on measurements; a gate left out is not checked. Shipped defaults suit a 4-bit cache."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ppl_increase_percent: float | None = Field(
        None, description="perplexity on held-out text, at most this much up"
    )
    kl: float | None = Field(None, ge=0, description="mean KL(uncompressed || compressed), nats, at most")
    top1: float | None = Field(None, ge=0, le=1, description="agreement of the most likely token, at least")
    needle_drop_points: float | None = Field(
        None, description="needle retrieval, at most this many points lost"
    )
    key_value_drop_points: float | None = Field(None, description="key-value retrieval, at most points lost")
    variable_tracking_drop_points: float | None = Field(
        None, description="variable tracking, at most points lost"
    )
    greedy_agreement: float | None = Field(
        None, ge=0, le=1, description="same token in greedy text, at least"
    )
    bytes_per_token_max: float | None = Field(
        None, gt=0, description="bytes of a sealed token, all layers, at most"
    )
    cache_error_percent: float | None = Field(
        2.0, description="allocated against planned cache bytes, at most apart"
    )


AT_LEAST = frozenset({"top1", "greedy_agreement"})


@dataclass(frozen=True)
class GateResult:
    """One gate: the limit, what was measured (None: the measurement was not made), and whether it holds."""

    name: str
    limit: float
    measured: float | None

    @property
    def holds(self) -> bool:
        """A gate whose measurement is missing does not hold."""
        if self.measured is None:
            return False
        return self.measured >= self.limit if self.name in AT_LEAST else self.measured <= self.limit

    @property
    def sign(self) -> str:
        return ">=" if self.name in AT_LEAST else "<="


def load_gates(path: Path) -> Gates:
    """Gates from a YAML file. Raises RecipeError naming the field."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"gates {path}: {' '.join(str(error).split())}") from error
    try:
        return Gates.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise RecipeError(
            f"gates {path}: {field}: {first['msg']}; gates: {', '.join(Gates.model_fields)}"
        ) from error


def judge(gates: Gates, measured: dict[str, float | None]) -> tuple[GateResult, ...]:
    """The result of every gate that is set."""
    limits = gates.model_dump(exclude_none=True)
    return tuple(GateResult(name, limit, measured.get(name)) for name, limit in limits.items())
