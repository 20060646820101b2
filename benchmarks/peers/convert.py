"""A GGUF file as a folder that transformers, kvpress and vLLM read in a second: `convert.py FILE.gguf FOLDER`."""

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

LEFT_OUT = ("quantization_config", "_name_or_path", "transformers_version")


def main() -> None:
    source, target = map(Path, sys.argv[1:])
    model = AutoModelForCausalLM.from_pretrained(
        str(source.parent), gguf_file=source.name, dtype=torch.float32
    )
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    config = {key: value for key, value in model.config.to_dict().items() if key not in LEFT_OUT}
    config["architectures"] = [type(model).__name__]
    part = target.with_name(f"{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    save_file(tensors, part / "model.safetensors", {"format": "pt"})
    (part / "config.json").write_text(json.dumps(config, indent=1))
    part.rename(target)


if __name__ == "__main__":
    main()
