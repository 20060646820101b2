"""Models in: loading through transformers, and capture of the whole model as a Graph.

The only part of kvcc that imports transformers, but for `kvcc.integrations`. What cannot be compiled is refused here.
"""

from kvcc.frontend.capturing import capture, reference_logits
from kvcc.frontend.identity import tokenizer_json
from kvcc.frontend.loading import LoadedModel, as_loaded, load_model
from kvcc.frontend.refusal import refuse_config
from kvcc.frontend.saving import runtime_tokenizer, save_checkpoint, save_tokenizer

__all__ = [
    "LoadedModel",
    "as_loaded",
    "capture",
    "load_model",
    "reference_logits",
    "refuse_config",
    "runtime_tokenizer",
    "save_checkpoint",
    "save_tokenizer",
    "tokenizer_json",
]
