"""What model an artifact or a profile belongs to."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt

DType = Literal["float32", "bfloat16", "float16"]


class ModelIdentity(BaseModel):
    """The facts about a model that a profile, a plan and an artifact must agree on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str  # how the user named it, for people
    model_type: str  # transformers' model_type
    layers: PositiveInt
    q_heads: PositiveInt
    kv_heads: PositiveInt
    head_dim: PositiveInt
    hidden_size: PositiveInt
    vocab_size: PositiveInt
    context_length: PositiveInt  # tokens
    dtype: DType  # of weights and activations
    digest: str  # sha256 over config and weights, "sha256:…"
    tokenizer_digest: str  # sha256 over tokenizer.json, "sha256:…"; "" when the model has no tokenizer
    bos_token_id: NonNegativeInt | None = None
    eos_token_ids: tuple[NonNegativeInt, ...] = ()
    pad_token_id: NonNegativeInt | None = None
