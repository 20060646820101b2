"""What this machine has: versions, processor features, accelerator, usable kernel backends. For bug reports."""

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from kvcc._version import __version__
from kvcc.kernels import usable

PACKAGES = (
    "torch",
    "transformers",
    "triton",
    "safetensors",
    "tokenizers",
    "gguf",
    "accelerate",
    "onnx",
    "datasets",
)
FEATURES = (
    "avx",
    "avx2",
    "fma",
    "f16c",
    "avx_vnni",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
)


def environment() -> dict[str, Any]:
    """Facts as plain data; a package that is missing has version None, a usable backend reason None."""
    flags = _cpu_flags()
    return {
        "kvcc": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": {"threads": torch.get_num_threads(), "features": [f for f in FEATURES if f in flags]},
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "packages": {name: _version(name) for name in PACKAGES},
        "backends": usable(),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cpu_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return set()
    line = next((row for row in text.splitlines() if row.startswith(("flags", "Features"))), "")
    return set(line.partition(":")[2].split())
