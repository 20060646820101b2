"""A virtual environment for each peer, from its pinned requirements, made once and kept in the bench's folder."""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent

# Packages that requirements bring along and the peer's own code cannot use here: torchvision, built for another
# build of torch, fails on import, and transformers imports it wherever it finds it.
UNWANTED = {"vllm": ("torchvision", "torchaudio", "torchcodec")}

# The library's own choice, GGML_NATIVE, uses AMX where the processor has it, which crashes in virtual machines.
CMAKE = ["-DGGML_NATIVE=OFF", "-DGGML_AVX2=ON", "-DGGML_FMA=ON", "-DGGML_F16C=ON"]
CMAKE_IF = {
    "avx512f": "-DGGML_AVX512=ON",
    "avx512_vnni": "-DGGML_AVX512_VNNI=ON",
    "avx512_bf16": "-DGGML_AVX512_BF16=ON",
}


class Uninstallable(Exception):
    """An environment could not be made; the message is one line."""


def environment(name: str, folder: Path) -> Path:
    """The python of the environment `name`, made where it is missing or its requirements have changed.

    Raises Uninstallable. What pip printed is in `folder`/logs.
    """
    place, requirements = folder / "venvs" / name, HERE / f"{name}.txt"
    recipe = digest(name, requirements)
    python, marker = place / "bin" / "python", place / ".installed"
    if marker.is_file() and marker.read_text() == recipe:
        return python
    shutil.rmtree(place, ignore_errors=True)
    log = folder / "logs" / f"install-{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    call(log, sys.executable, "-m", "venv", str(place))
    found = ["--find-links", str(llama_wheel(python, folder, log))] if name == "llama_cpp" else []
    call(log, *pip(python), "install", "--no-compile", *found, "-r", str(requirements))
    if name in UNWANTED:
        call(log, *pip(python), "uninstall", "-y", *UNWANTED[name])
    marker.write_text(recipe)
    return python


def digest(name: str, requirements: Path) -> str:
    """What an environment is made from, in one word."""
    parts = [
        requirements.read_text(),
        *UNWANTED.get(name, ()),
        *(cmake_args() if name == "llama_cpp" else ()),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def llama_wheel(python: Path, folder: Path, log: Path) -> Path:
    """The folder with llama-cpp-python compiled for this processor: minutes, once. pip's cache knows no flags."""
    arguments = cmake_args()
    wanted = next(line for line in (HERE / "llama_cpp.txt").read_text().split() if "llama-cpp-python" in line)
    key = hashlib.sha256(" ".join([wanted, *arguments]).encode()).hexdigest()[:16]
    place = folder / "wheels" / key
    if not list(place.glob("*.whl")):
        flags = os.environ | {"CMAKE_ARGS": " ".join(arguments)}
        wheel = [*pip(python), "wheel", "--no-cache-dir", "--no-deps", "--no-binary", "llama-cpp-python"]
        call(log, *wheel, "-w", str(place), wanted, env=flags)
    return place


def cmake_args() -> list[str]:
    flags = cpu_flags()
    if platform.machine() not in ("x86_64", "AMD64"):
        return ["-DGGML_NATIVE=ON"]
    return CMAKE + [argument for flag, argument in CMAKE_IF.items() if flag in flags]


def cpu_flags() -> set[str]:
    """What Linux says the processor can do; nothing elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return set(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())


def pip(python: Path) -> list[str]:
    return [str(python), "-m", "pip", "--disable-pip-version-check"]


def call(log: Path, *command: str, env: dict[str, str] | None = None) -> None:
    """Run a command with its output in `log`; raises Uninstallable with the last line that tells something."""
    with log.open("a") as output:
        status = subprocess.run(
            command, check=False, stdout=output, stderr=subprocess.STDOUT, env=env
        ).returncode
    if status:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        said = (
            [line for line in lines if "ERROR" in line or "error:" in line] or lines or [f"status {status}"]
        )
        raise Uninstallable(f"{said[-1].strip()} (see {log})")
