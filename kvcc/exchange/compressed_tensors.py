"""A Hugging Face folder with `kv_cache_scheme` and scales, as llm-compressor writes and vLLM reads: FP8 and INT8."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from kvcc.artifact import check_export
from kvcc.errors import ArtifactUnwritable, PassError, UnsupportedModel
from kvcc.frontend import LoadedModel, save_checkpoint
from kvcc.passes import Pass
from kvcc.passes.fp8 import Fp8
from kvcc.passes.int8 import Int8
from kvcc.pipeline import Compiled
from kvcc.profile import Profile
from kvcc.recipe import Recipe
from kvcc.runtime.plan import Plan

SCALES, BITS = "kv-scales.safetensors", "kv_cache_bits.json"


def write_compressed_tensors(
    loaded: LoadedModel,
    profile: Profile | None,
    recipe: Recipe,
    compiled: Compiled,
    output: Path,
    *,
    overwrite: bool,
) -> dict[str, float]:
    """Write the model's own weights with the scales of a recipe's cache; gives the scales by tensor name.

    One scale a layer for K and one for V: a head's largest, since few readers know scales a head. Also writes
    kv_cache_bits.json: bits of K and V by layer and head. Raises PassError for a recipe that the format cannot express,
    UnsupportedModel for a model whose attention it could not name, ArtifactExists and ArtifactUnwritable.
    """
    pass_ = _expressible(recipe)
    names = _attention_names(loaded)
    check_export(output, BITS, overwrite=overwrite)
    scales = {}
    for index, name in enumerate(names):
        if not compiled.plan.layers[index].page:
            raise PassError(
                f"layer {index}: a sliding window stays exact; kv_cache_scheme quantises every layer alike"
            )
        for side, value in zip("kv", pass_.head_scales(profile, index)):
            scales[f"{name}.{side}_scale"] = float(value.max())
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        save_checkpoint(loaded, partial)
        _add_tensors(partial, {name: torch.tensor([value]) for name, value in scales.items()})
        _add_scheme(partial, "float" if isinstance(pass_, Fp8) else "int")
        (partial / BITS).write_text(json.dumps(bits_by_head(compiled.plan), indent=1) + "\n")
        shutil.rmtree(output, ignore_errors=True)
        partial.rename(output)
    except OSError as error:
        raise ArtifactUnwritable(f"{output} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return scales


def bits_by_head(plan: Plan) -> dict[str, Any]:
    """Bits per element of K and V, codes only, by layer and KV head; null for a layer that stays exact."""

    def mean(planes: Any, width: int) -> float:
        return sum(p.bits * p.channels for p in planes) / width

    return {
        "bits_per_element": plan.bits_per_element(),
        "layers": [
            {
                "k": [mean(h.k.planes, layer.k_dim) for h in layer.heads],
                "v": [mean(h.v.planes, layer.v_dim) for h in layer.heads],
            }
            if layer.page
            else None
            for layer in plan.layers
        ],
    }


def _expressible(recipe: Recipe) -> Fp8 | Int8:
    """The one pass of a recipe that the format can express. Raises PassError saying why there is none."""
    why = "compressed-tensors stores caches of 8 bits under static scales: use a recipe of fp8 or int8 alone"
    passes: tuple[Pass, ...] = recipe.passes
    found = passes[0] if len(passes) == 1 else None
    if not isinstance(found, Fp8 | Int8):
        raise PassError(f"recipe {recipe.name}: {', '.join(p.name for p in passes) or 'no pass'}; {why}")
    if found.layers is not None:
        raise PassError(f"recipe {recipe.name}: {found.name} is for some layers only; {why}, for all layers")
    if isinstance(found, Int8) and found.scales == "channel":
        raise PassError(f"recipe {recipe.name}: int8 has a scale a channel; use scales: head")
    return found


def _attention_names(loaded: LoadedModel) -> list[str]:
    """Module names of the attention layers, in order."""
    found = {
        int(module.layer_idx): name
        for name, module in loaded.model.named_modules()
        if isinstance(getattr(module, "k_proj", None), nn.Module) and hasattr(module, "layer_idx")
    }
    if sorted(found) != list(range(loaded.identity.layers)):
        raise UnsupportedModel(
            f"{loaded.identity.name}: compressed-tensors wants a k_proj and a v_proj in each attention layer; "
            f"this model has them in {len(found)} of {loaded.identity.layers}"
        )
    return [found[i] for i in sorted(found)]


def _add_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """One more file of a checkpoint, and its index."""
    from safetensors import safe_open

    index_path, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.is_file():
        first = "model-00001-of-00002.safetensors"
        single.rename(folder / first)
        with safe_open(folder / first, "pt") as held:
            index = {"metadata": {}, "weight_map": dict.fromkeys(held.keys(), first)}
    else:
        index = json.loads(index_path.read_text())
    save_file(tensors, folder / SCALES, metadata={"format": "pt"})
    index["weight_map"] |= dict.fromkeys(tensors, SCALES)
    index_path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _add_scheme(folder: Path, kind: str) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "dense",
        "quantization_status": "compressed",
        "config_groups": {},
        "ignore": [],
        "kv_cache_scheme": {
            "num_bits": 8, "type": kind, "strategy": "tensor", "symmetric": True, "dynamic": False,
        },
    }  # fmt: skip
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
