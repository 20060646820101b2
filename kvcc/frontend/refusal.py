"""Models that cannot be compiled, told by model type and reason; and those whose config says so already."""

from typing import Any

import transformers

from kvcc.errors import UnsupportedModel
from kvcc.runtime.identity import ModelIdentity

_ROPE_WITH_LENGTH = {"dynamic", "longrope"}  # their frequencies change with the sequence's length
_LAYER_TYPES = {"full_attention", "sliding_attention"}


def refusal(identity: ModelIdentity, reason: str) -> UnsupportedModel:
    """To raise for a model that was loaded."""
    return UnsupportedModel(f"{identity.name}: model type {identity.model_type} {reason}")


def refuse_config(config: Any, name: str) -> None:
    """Raise UnsupportedModel when a transformers config tells that the model cannot be compiled."""

    def refuse(reason: str) -> None:
        raise UnsupportedModel(f"{name}: model type {config.model_type} {reason}")

    if getattr(config, "is_encoder_decoder", False):
        refuse("is an encoder-decoder model; kvcc compiles decoder-only language models")
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        refuse("has no causal language model in transformers; kvcc compiles decoder-only language models")
    # is_decoder alone says nothing: some decoders carry it as False.
    if (
        getattr(config, "is_decoder", None) is False
        and type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING
    ):
        refuse("is an encoder; kvcc compiles decoder-only language models")
    text = config.get_text_config()
    if getattr(text, "kv_lora_rank", None):
        refuse("caches a latent instead of keys and values (MLA), which kvcc does not compile yet")
    if getattr(text, "use_bidirectional_attention", None):
        refuse("attends to later tokens (use_bidirectional_attention); kvcc compiles causal models")
    for rope in _rope_types(text):
        if rope in _ROPE_WITH_LENGTH:
            refuse(f"uses rope type {rope}, whose rotation depends on the sequence's length; not supported")
    other = set(getattr(text, "layer_types", None) or ()) - _LAYER_TYPES
    if other:
        refuse(
            f"has layers of type {', '.join(sorted(other))}; kvcc compiles full and sliding attention only"
        )


def _rope_types(config: Any) -> set[str]:
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    groups = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    return {str(group["rope_type"]) for group in groups if "rope_type" in group}
