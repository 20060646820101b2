"""Kernels behind one protocol: seal pages, attend over a layer's cache."""

import importlib
import importlib.util
import logging
from typing import cast

import torch

from kvcc.errors import KernelUnavailable
from kvcc.kernels.protocol import Backend

BACKENDS = ("reference", "cpu", "triton")
DEVICES = {"cpu": ("cpu",), "triton": ("cuda",)}  # ROCm devices are "cuda" to torch; reference runs anywhere

log = logging.getLogger(__name__)
_warned: set[str] = set()


def backend(name: str, device: torch.device) -> Backend:
    """The backend `name` for `device`. "auto": triton on a GPU, else cpu, else (with one warning) reference.

    Raises KernelUnavailable when the name is unknown or that backend cannot run here.
    """
    if name == "auto":
        return _best(device)
    if name not in BACKENDS:
        raise KernelUnavailable(f"unknown kernel backend {name!r}; use auto, {', '.join(BACKENDS)}")
    reason = _reason(name, device)
    if reason is not None:
        raise KernelUnavailable(f"kernel backend {name} cannot run on {device}: {reason}")
    return _module(name)


def usable() -> dict[str, str | None]:
    """Every backend: None when it can run on this machine, else the reason why not."""
    gpu = torch.device("cuda")
    return {name: _reason(name, gpu if name == "triton" else torch.device("cpu")) for name in BACKENDS}


def _best(device: torch.device) -> Backend:
    name = "triton" if device.type == "cuda" else "cpu"
    reason = _reason(name, device)
    if reason is None:
        return _module(name)
    if reason not in _warned:
        _warned.add(reason)
        log.warning("kernel backend %s cannot run on %s, using the slow reference: %s", name, device, reason)
    return _module("reference")


def _reason(name: str, device: torch.device) -> str | None:
    if name in DEVICES and device.type not in DEVICES[name]:
        return f"it runs on {' or '.join(DEVICES[name])} devices only"
    if name == "triton" and importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install 'kvcc[triton]'"
    if name == "triton" and not torch.cuda.is_available():
        return "torch finds no GPU"
    if name == "cpu":
        from kvcc.kernels import cpu  # not at the top: it loads torch's OpenMP and looks for a compiler

        return cpu.available()
    return None


def _module(name: str) -> Backend:
    return cast(Backend, importlib.import_module(f"kvcc.kernels.{name}"))
