"""Using the GPU kernels that an artifact carries, where its user allows that: they are code, not data."""

import hashlib
import logging
from typing import TYPE_CHECKING

import torch

from kvcc.errors import ArtifactDigest
from kvcc.kernels.protocol import Backend
from kvcc.runtime.artifact import Artifact
from kvcc.runtime.graph import Program
from kvcc.runtime.kernel_files import KernelIndex
from kvcc.runtime.ops import CACHED_ATTENTION
from kvcc.runtime.plan import Plan

if TYPE_CHECKING:
    from kvcc.kernels.layer_launches import LayerShape
    from kvcc.kernels.precompiled import Binary

log = logging.getLogger(__name__)


def layer_shapes(plan: Plan, graph: Program) -> "list[LayerShape]":
    """What of each layer decides which kernels it needs. Needs triton."""
    from kvcc.kernels.layer_launches import LayerShape

    calls = {
        node.kwargs["layer"]: node.kwargs["softcap"] for node in graph.nodes if node.op == CACHED_ATTENTION
    }
    return [
        LayerShape(
            layout,
            layer.q_heads,
            layer.kv_heads,
            layer.k_dim,
            layer.v_dim,
            getattr(torch, plan.dtype),
            plan.exact,
            gathered=layer.select != "all",
            based=layer.select == "basis",
            biased=layer.mean_correction,
            capped=calls[index] > 0,
        )
        for index, (layer, layout) in enumerate(zip(plan.layers, plan.layouts()))
    ]


def use_precompiled(artifact: Artifact, backend: Backend, device: torch.device, *, allowed: bool) -> int:
    """Give Triton the kernels that the artifact carries for `device`; returns how many it took.

    Says in one line of the log what it did: kernels are used when `allowed` and made from the same sources by the
    same version of Triton for the same target; what is missing is compiled at its first use. Raises ArtifactDigest
    for a binary that is not what the manifest says, whether or not the artifact's digests were verified.
    """
    if not artifact.kernels and not allowed:
        return 0
    if backend.name != "triton":
        if allowed:
            log.warning("precompiled kernels are for GPUs; the %s kernels use none", backend.name)
        return 0
    with torch.cuda.device(device):
        return _use(artifact, allowed)


def _use(artifact: Artifact, allowed: bool) -> int:
    import triton

    from kvcc.kernels.precompiled import current_target, preload, sources_digest

    target = current_target()
    index = artifact.kernels.get(target)
    if index is None:
        if allowed:
            carried = ", ".join(sorted(artifact.kernels)) or "no GPU"
            log.warning("the artifact carries kernels for %s, not for %s; compiling", carried, target)
        return 0
    if not allowed:
        log.info(
            "the artifact carries kernels for %s; they are code of its maker, so they are used on request only "
            "(precompiled=True); compiling",
            target,
        )
        return 0
    if index.triton != triton.__version__:
        log.warning(
            "the artifact's kernels are for triton %s, this is %s; compiling",
            index.triton,
            triton.__version__,
        )
        return 0
    if index.sources != sources_digest():
        log.warning("the artifact's kernels are from other sources than this kvcc's; compiling")
        return 0
    used, missing = preload(layer_shapes(artifact.plan, artifact.graph), read_binaries(artifact, index))
    if missing:
        log.warning(
            "using %d precompiled kernels for %s; %d more are not carried: compiling", used, target, missing
        )
    elif used:
        log.info("using %d precompiled kernels for %s", used, target)
    else:
        log.info("this process holds all kernels for %s already", target)
    return used


def read_binaries(artifact: Artifact, index: KernelIndex) -> "dict[str, Binary]":
    """The binaries of an index by key. Raises ArtifactDigest unless each is what the manifest says."""
    from kvcc.kernels.precompiled import Binary

    binaries = {}
    for entry in index.kernels:
        name = f"kernels/{entry.file}"
        listed = artifact.manifest.files[name]
        with (artifact.path / name).open("rb") as file:
            data = file.read(listed.size + 1)
        if len(data) != listed.size or hashlib.sha256(data).hexdigest() != listed.sha256:
            raise ArtifactDigest(
                f"{artifact.path / name}: not what the manifest says; the artifact was altered or damaged: get it "
                "again"
            )
        binaries[entry.key] = Binary(entry.key, entry.name, data, entry.results)
    return binaries
