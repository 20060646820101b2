"""Tiny random models, one of each architecture, for all tests. Milliseconds to build, a second to capture."""

import copy
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from kvcc.frontend import LoadedModel, as_loaded, capture
from kvcc.graph import Graph

VOCABULARY = 128
WINDOW = 8  # tokens, of the sliding layers
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED: dict[str, Any] = _COMMON | {"num_key_value_heads": 2, "head_dim": 16}
_ALTERNATING: dict[str, Any] = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"],
}


def _build(family: str, suffix: str = "ForCausalLM", **settings: Any) -> PreTrainedModel:
    """A model with random weights everywhere: biases, norms and sinks too, so that a lost one shows."""
    name = family.removesuffix("Text")
    config = getattr(transformers, family + "Config")(**settings)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(7)
        model = getattr(transformers, name + suffix)(config)
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape)
            if parameter.dim() > 1:
                parameter.copy_(noise * 0.12)
            else:
                parameter.add_(noise * 0.3)
    return model.eval()


def _gemma3() -> PreTrainedModel:
    return _build("Gemma3Text", **_GROUPED, **_ALTERNATING, query_pre_attn_scalar=24)


def _opt() -> PreTrainedModel:
    settings = {k: v for k, v in _COMMON.items() if k != "intermediate_size"}
    return _build("OPT", **settings, ffn_dim=96, word_embed_proj_dim=64)


ARCHITECTURES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: _build("Llama", **_GROUPED),
    "mistral": lambda: _build("Mistral", **_GROUPED, sliding_window=WINDOW),
    "qwen2": lambda: _build("Qwen2", **(_COMMON | {"num_key_value_heads": 2})),
    "qwen3": lambda: _build("Qwen3", **_GROUPED),
    "gemma2": lambda: _build(
        "Gemma2",
        **_GROUPED,
        **_ALTERNATING,
        query_pre_attn_scalar=24,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=5.0,
    ),
    "gemma3": _gemma3,
    "phi3": lambda: _build("Phi3", **(_COMMON | {"num_key_value_heads": 2})),
    "gpt_neox": lambda: _build("GPTNeoX", **_COMMON, rotary_pct=0.25),
    "opt": _opt,
    "mixtral": lambda: _build("Mixtral", **_GROUPED, num_local_experts=4, num_experts_per_tok=2),
    "gpt_oss": lambda: _build(
        "GptOss",
        **_GROUPED,
        **_ALTERNATING,
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters=_ROPE,
    ),
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def tiny_loaded(name: str, dtype: str = "float32") -> LoadedModel:
    """A fresh model of architecture `name`; the same weights every time."""
    return as_loaded(ARCHITECTURES[name]().to(getattr(torch, dtype)), None, f"tiny-{name}")


@lru_cache
def shared_graph(name: str) -> Graph:
    """The captured Graph of architecture `name`, the same object for all: for what does not change it."""
    return capture(tiny_loaded(name))


def tiny_graph(name: str) -> Graph:
    """A copy of it, so that a test may change it and its weights."""
    return copy.deepcopy(shared_graph(name))
