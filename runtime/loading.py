"""From an artifact folder to a model that runs."""

from pathlib import Path
from typing import Literal

import torch

from kvcc.errors import CapacityError, KernelUnavailable
from kvcc.kernels import backend as kernel_backend
from kvcc.kernels.linear import WeightType, multiplies_bfloat16
from kvcc.runtime.artifact import module, read_artifact
from kvcc.runtime.fuse import fuse
from kvcc.runtime.model import CompiledModel
from kvcc.runtime.precompiled import use_precompiled
from kvcc.runtime.tokenizer import Tokenizer


def load(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    backend: str = "auto",
    weights: WeightType | None = None,
    verify: bool | Literal["sizes"] = True,
    precompiled: bool = False,
    key: str | Path | None = None,
) -> CompiledModel:
    """A compiled model from an artifact folder.

    Weights are memory-mapped on the CPU. `backend` is auto, reference, cpu or triton. `weights` stores those of linear
    layers as bfloat16 or int8 instead, on the CPU: decoding reads fewer bytes, at some accuracy; a prompt's tokens then
    attend to each other in bfloat16, where the processor multiplies matrices of it. `verify` checks every
    file's digest (True), or sizes and structure only ("sizes"). `precompiled` allows the GPU kernels that the artifact
    carries to be used: they are code, so say it of makers you trust only; else kernels are compiled here. `key`, a PEM
    file of Ed25519 public keys (by default the one that KVCC_TRUSTED_KEY in the environment names), refuses what none
    of them signed, and has every digest checked. Raises ArtifactError for what is malformed, altered or not understood,
    KernelUnavailable when `backend` cannot run here, DataError for an unusable key file.
    """
    target = _usable(device)
    if weights is not None and target.type != "cpu":
        raise KernelUnavailable(
            f"weights can be stored as {weights} on the CPU only, not on {target}; leave it out"
        )
    artifact = read_artifact(Path(path), verify=verify, device=target, key=key)
    kernels = kernel_backend(backend, target)
    for index, layout in enumerate(artifact.plan.layouts()):
        reason = layout and kernels.supports(layout, artifact.plan.exact, target)
        if reason:
            raise KernelUnavailable(f"layer {index}: {kernels.name} kernels cannot run this plan: {reason}")
    use_precompiled(artifact, kernels, target, allowed=precompiled)
    folder = Path(path) / "tokenizer"
    try:
        graph = fuse(module(artifact, target), weights)
        tables = {name: table.to(target) for name, table in artifact.tables.items()}
    except torch.OutOfMemoryError as error:
        raise CapacityError(f"{path} does not fit on {target}: {error}") from error
    return CompiledModel(
        artifact.manifest.model,
        artifact.manifest.recipe_name,
        artifact.plan,
        graph,
        tables,
        Tokenizer.load(folder) if folder.is_dir() else None,
        kernels,
        target,
        torch.bfloat16 if weights in ("bfloat16", "int8") and multiplies_bfloat16() else None,
    )


def _usable(device: str | torch.device) -> torch.device:
    """The device, tried out. Raises KernelUnavailable."""
    try:
        return torch.empty(0, device=torch.device(device)).device
    except (RuntimeError, AssertionError) as error:  # what torch raises when built without support for it
        reason = str(error).partition("\n")[0]
        raise KernelUnavailable(f"device {str(device)!r}: torch cannot use it: {reason}") from error
