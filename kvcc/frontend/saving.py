"""What others take of a loaded model: its checkpoint, and the tokenizer that artifacts run with."""

import json
import tempfile
from pathlib import Path
from typing import Any, cast

from kvcc.errors import UnsupportedModel
from kvcc.frontend.identity import tokenizer_json
from kvcc.frontend.loading import LoadedModel
from kvcc.runtime.tokenizer import Tokenizer

_GENERATION_DEFAULTS = ("do_sample", "temperature", "top_k", "top_p")


def save_checkpoint(loaded: LoadedModel, folder: Path) -> None:
    """Write the model and its tokenizer as transformers does; a GGUF's model becomes a plain one."""
    model: Any = loaded.model
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    if loaded.tokenizer is not None:
        loaded.tokenizer.save_pretrained(folder)


def save_tokenizer(loaded: LoadedModel, folder: str | Path) -> None:
    """Write what kvcc.runtime.tokenizer loads: tokenizer.json, tokenizer_settings.json, chat_template.jinja.

    The settings hold special tokens and generation defaults; the chat template is written when there is one.
    Raises UnsupportedModel when the model has no tokenizer.
    """
    if loaded.tokenizer is None:
        raise UnsupportedModel(f"{loaded.identity.name}: the model comes without a tokenizer")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer_json(loaded.tokenizer), encoding="utf-8", newline="")
    settings = json.dumps(_tokenizer_settings(loaded), ensure_ascii=False, indent=2, sort_keys=True)
    (folder / "tokenizer_settings.json").write_text(settings + "\n", encoding="utf-8", newline="")
    template = loaded.tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if template:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8", newline="")


def runtime_tokenizer(loaded: LoadedModel) -> Tokenizer:
    """The tokenizer that the artifact will run with. Raises UnsupportedModel for a model without one."""
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(loaded, folder)
        return Tokenizer.load(folder)


def _tokenizer_settings(loaded: LoadedModel) -> dict[str, Any]:
    tokenizer = cast(Any, loaded.tokenizer)
    generation = getattr(loaded.model, "generation_config", None)
    defaults = {key: getattr(generation, key, None) for key in _GENERATION_DEFAULTS}
    eos = loaded.identity.eos_token_ids
    if not eos and tokenizer.eos_token_id is not None:
        eos = (tokenizer.eos_token_id,)
    return {
        "special_tokens": {k: str(v) for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)},
        "eos_token_ids": list(eos),
        "generation": {key: value for key, value in defaults.items() if value is not None},
    }
