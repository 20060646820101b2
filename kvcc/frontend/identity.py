"""What identifies a model: its sizes and special tokens, and digests of its weights and tokenizer."""

import hashlib
import json
from typing import Any, cast

import torch
import transformers

from kvcc.errors import UnsupportedModel
from kvcc.runtime.identity import DType, ModelIdentity


def identity_of(model: transformers.PreTrainedModel, tokenizer: Any | None, name: str) -> ModelIdentity:
    """Of a loaded model. Raises UnsupportedModel when it does not state its context length."""
    config = model.config.get_text_config()
    q_heads = config.num_attention_heads
    generation = model.generation_config or transformers.GenerationConfig()
    # An id of -1 is how some configs say "none".
    bos, eos, pad = (
        [i for i in _ids(getattr(generation, key, None), getattr(config, key, None)) if i >= 0]
        for key in ("bos_token_id", "eos_token_id", "pad_token_id")
    )
    context = getattr(config, "max_position_embeddings", None)
    if not context:
        raise UnsupportedModel(f"{name}: model type {config.model_type} does not state its context length")
    return ModelIdentity(
        name=name,
        model_type=config.model_type,
        layers=config.num_hidden_layers,
        q_heads=q_heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or q_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // q_heads,
        hidden_size=config.hidden_size,
        vocab_size=model.get_output_embeddings().weight.shape[0],
        context_length=context,
        dtype=cast(DType, str(next(model.parameters()).dtype).removeprefix("torch.")),
        digest=_model_digest(model),
        tokenizer_digest=_digest(tokenizer_json(tokenizer).encode()) if tokenizer is not None else "",
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=tuple(eos),
        pad_token_id=pad[0] if pad else None,
    )


def _ids(*candidates: Any) -> list[int]:
    """The first of the candidates (an id, a list of ids, or None) that is there, as a list."""
    for candidate in candidates:
        if candidate is not None:
            return list(candidate) if isinstance(candidate, (list, tuple)) else [int(candidate)]
    return []


def _digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def _model_digest(model: transformers.PreTrainedModel) -> str:
    """sha256 over the config, and the names, types, shapes and bytes of parameters and saved buffers."""
    digest = hashlib.sha256(json.dumps(_stable(model.config.to_dict()), sort_keys=True, default=str).encode())
    seen: set[tuple[Any, ...]] = set()
    for name, tensor in sorted(model.state_dict().items()):
        storage = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if storage in seen:  # tied to one already there
            continue
        seen.add(storage)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy())
    return "sha256:" + digest.hexdigest()


def _stable(value: Any) -> Any:
    """A config without what says how or by whom it was loaded."""
    if isinstance(value, dict):
        drop = {"transformers_version", "quantization_config", "use_cache"}
        return {str(k): _stable(v) for k, v in value.items() if not str(k).startswith("_") and k not in drop}
    return [_stable(v) for v in value] if isinstance(value, (list, tuple)) else value


def tokenizer_json(tokenizer: Any) -> str:
    """The text of a tokenizer's tokenizer.json. Raises UnsupportedModel for one written in Python."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UnsupportedModel(
            f"tokenizer {type(tokenizer).__name__} has no tokenizer.json form; kvcc needs a fast tokenizer"
        )
    # Calls with padding or truncation leave their settings in the backend.
    settings = json.loads(backend.to_str())
    settings["padding"] = settings["truncation"] = None
    return json.dumps(settings, ensure_ascii=False)
