"""Compiles the C kernels with the system's compiler on first use; keeps them in the user's cache folder."""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch  # noqa: F401 - brings its OpenMP runtime first; libraries loaded later share that thread pool

from kvcc.errors import KernelUnavailable

SOURCES = tuple(sorted(Path(__file__).parent.glob("cpu_*.c")))
HEADERS = tuple(sorted(Path(__file__).parent.glob("cpu_*.h")))
FLAGS = ("-std=gnu11", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared", "-Wno-psabi")
NATIVE = ("-march=native", "-mcpu=native")  # the second where the first is unknown (some ARM compilers)
OPENMP = "-fopenmp"
TIMEOUT = 300  # seconds; the build takes about five

log = logging.getLogger(__name__)


def compiler() -> tuple[str, ...] | None:
    """The C compiler's path and any words of its own: the first of $CC, cc, gcc and clang that exists, else None."""
    for name in (os.environ.get("CC", ""), "cc", "gcc", "clang"):
        words = shlex.split(name)
        if words and (path := shutil.which(words[0])):
            return path, *words[1:]
    return None


def cache_dir() -> Path:
    """Where compiled kernels are kept: $KVCC_CACHE_DIR, else $XDG_CACHE_HOME/kvcc, else ~/.cache/kvcc."""
    if own := os.environ.get("KVCC_CACHE_DIR"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "kvcc"


@functools.cache
def load() -> ctypes.CDLL:
    """The kernels' library, built if this machine's cache has none for this source, compiler and processor.

    Safe to run in several processes at once. Raises KernelUnavailable when there is no compiler, when it
    fails, or when the cache folder cannot be written.
    """
    path = build()
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelUnavailable(
            f"the compiled cpu kernels {path} do not load ({error}); delete the file, or set KVCC_CACHE_DIR "
            "to a folder on a file system that allows execution"
        ) from error


def build(extra: tuple[str, ...] = ()) -> Path:
    """Path of the shared library, compiled now if need be; `extra` are more compiler flags."""
    cc = compiler()
    if cc is None:
        raise KernelUnavailable("no C compiler found (cc, gcc or clang); install one, or set CC to its path")
    target = cache_dir() / f"cpu_kernels-{_key(cc, extra)}.so"
    try:
        if target.exists():
            return target
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix="build-") as folder:
            made = Path(folder) / target.name
            _compile(cc, made, extra)
            os.replace(made, target)
    except OSError as error:
        raise KernelUnavailable(
            f"cannot keep compiled kernels in {target.parent} ({error}); "
            "set KVCC_CACHE_DIR to a writable folder"
        ) from error
    return target


def _compile(cc: tuple[str, ...], target: Path, extra: tuple[str, ...]) -> None:
    """Try the fastest set of flags that this compiler knows."""
    attempts = [(native, OPENMP) for native in NATIVE] + [(native,) for native in NATIVE] + [()]
    name, messages = shlex.join(cc), []
    for flags in attempts:
        command = [*cc, *FLAGS, *flags, *extra, "-o", str(target), *map(str, SOURCES), "-lm"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
        except subprocess.TimeoutExpired as error:
            raise KernelUnavailable(f"{name} did not compile the kernels in {TIMEOUT} s") from error
        if done.returncode == 0:
            if OPENMP not in flags:
                log.warning("%s has no OpenMP: the cpu kernels will use one thread", name)
            return
        messages.append(done.stderr.strip())
    raise KernelUnavailable(f"{name} cannot compile the cpu kernels: {_first_error(messages[0])}")


def _first_error(message: str) -> str:
    lines = message.splitlines() or ["no message"]
    return next((line for line in lines if "error" in line), lines[0])


def _key(cc: tuple[str, ...], extra: tuple[str, ...]) -> str:
    """Digest of all that the machine code depends on."""
    try:
        version = subprocess.run(
            [*cc, "--version"], capture_output=True, text=True, timeout=TIMEOUT, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelUnavailable(
            f"the C compiler {shlex.join(cc)} does not run ({error}); install another or set CC"
        ) from error
    sources = [path.read_text() for path in (*HEADERS, *SOURCES)]
    parts = (*sources, *FLAGS, *NATIVE, OPENMP, *extra, *cc, version.stdout, _processor())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _processor() -> str:
    """The processor's model and abilities, so that a home folder shared by unlike machines is no trap."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("model name", "flags", "Features", "CPU part")
    return platform.machine() + "\n".join(sorted({line for line in lines if line.startswith(wanted)}))
