"""What an artifact keeps of the calibration it was compiled with: its sources, and the energy of K's channels."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt

Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Energy = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CalibrationSource(_Data):
    """One prompt set, as the profile names it."""

    name: str
    digest: str
    seed: NonNegativeInt
    samples: PositiveInt  # prompts
    tokens: PositiveInt


class KeyEnergy(_Data):
    """Of one layer's K channels, as sealed pages store them, before quantisation.

    A channel's energy is E[q²] Var(k): the variance that it adds to attention logits.
    """

    kept: tuple[Share, ...]  # by KV head: share of the logits' variance that the stored channels give
    ranks: tuple[tuple[Energy, Share], ...]  # by rank of energy: energy, and the share of it that is stored


class Calibrated(_Data):
    """What the manifest says of the profile. `keys` has an entry a layer, None where pages say nothing of K."""

    prompts: PositiveInt
    tokens: PositiveInt
    gradients: bool
    sources: tuple[CalibrationSource, ...]
    keys: tuple[KeyEnergy | None, ...]
