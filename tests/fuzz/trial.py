"""One mutant: made, loaded, run a little, and judged."""

import contextlib
import io
import logging
import os
import shutil
import signal
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch

from kvcc.cli.inspect import command as inspect_command
from kvcc.errors import (
    ArtifactError,
    CapacityError,
    DataError,
    KernelUnavailable,
    KvccError,
    UnsupportedModel,
)
from kvcc.integrations.transformers import CompressedCache
from kvcc.report import Extras, render_report
from kvcc.runtime import CompiledModel, load
from tests.fuzz.mutations import mutate
from tests.fuzz.originals import write_front

SECONDS = 5.0  # of processor time, for everything that is done with a mutant
FLOOR = 64 << 20  # bytes that loading and running may take beyond twice the artifact
BUDGET = 32 << 20  # bytes of cache
REFUSALS = (ArtifactError, CapacityError, KernelUnavailable)


class Violation(Exception):
    """What must not happen."""


class Hang(BaseException):
    """The time is up. (No Exception: the code under test catches those.)"""


def trial(originals: Sequence[Path], folder: Path, key: str) -> str:
    """Make mutant `key` in `folder`, load and use it. Gives how it ended; raises Violation.

    The same key makes the same mutant of the same originals.
    """
    rng = Random(key)
    original = rng.choice(originals)
    shutil.rmtree(folder, ignore_errors=True)
    path = folder / original.name
    shutil.copytree(original, path, copy_function=os.link)
    write_front(folder / "front.json")
    how = "+".join(mutate(path, rng))
    with _guarded(path, f"{original.name} {how}"):
        if rng.random() < 0.05:
            _show(path, rng)
        return _use(path, rng)


def _show(path: Path, rng: Random) -> None:
    """Everything that reads an artifact and does not run it."""
    assert inspect_command.callback is not None
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(ArtifactError):
        inspect_command.callback(path, False, None, rng.random() < 0.5)
    with contextlib.suppress(ArtifactError, DataError):
        render_report(path, None, Extras(front=path.parent / "front.json" if rng.random() < 0.5 else None))
    with contextlib.suppress(ArtifactError, UnsupportedModel):
        CompressedCache.from_artifact(path).folded_state_dict()


def _use(path: Path, rng: Random) -> str:
    backend = rng.choice(["cpu", "cpu", "reference"])
    weights: Any = rng.choice([None, None, "bfloat16", "int8"]) if backend == "cpu" else None
    try:
        model = load(path, backend=backend, weights=weights, verify=rng.choice([True, True, "sizes"]))
    except REFUSALS as error:
        return _refused("load", error)
    try:
        _run(model, rng)
    except REFUSALS as error:
        return _refused("run", error)
    return "ran"


def _refused(where: str, error: KvccError) -> str:
    if "\n" in str(error):
        raise Violation(f"an error of several lines: {error}")
    if isinstance(error, CapacityError) and "allocate memory" in str(error):
        raise Violation(f"more memory than there is: {error}")
    return f"{where}: {type(error).__name__}"


def _run(model: CompiledModel, rng: Random) -> None:
    """A ragged prompt and three steps; text there and back."""
    batch, vocabulary = rng.choice([1, 2]), model.identity.vocab_size
    cache = model.new_cache(batch, BUDGET)
    for counts in ([rng.choice([1, 7, 30]), 4][:batch], [1] * batch, [1] * batch, [2, 0][:batch]):
        tokens = [[rng.randrange(vocabulary) for _ in range(n)] for n in counts]
        logits = model.forward(tokens, cache)
        if logits.shape != (sum(n > 0 for n in counts), vocabulary):
            raise Violation(f"logits of shape {list(logits.shape)}")
    if model.tokenizer is not None:
        model.tokenizer.decode(model.tokenizer.encode("w3 w31 and more")[:100])
        if model.tokenizer.has_chat_template:
            model.tokenizer.chat([{"role": "user", "content": "w3"}])


@contextlib.contextmanager
def _guarded(path: Path, about: str) -> Iterator[None]:
    """Turn anything but a refusal into a Violation: other exceptions, time, memory."""
    allowed = FLOOR + 2 * sum(file.lstat().st_size for file in path.rglob("*"))
    signal.signal(signal.SIGPROF, _hang)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    start, before = time.process_time(), _reset_peak()
    try:
        yield
    except Violation as error:
        raise Violation(f"{about}: {error}") from error
    except (Exception, Hang) as error:
        raise Violation(f"{about}: {type(error).__name__}: {error}") from error
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    if (taken := time.process_time() - start) > SECONDS:
        raise Violation(f"{about}: {taken:.1f} s")
    if (grown := _memory("VmHWM") - before) > allowed:
        raise Violation(f"{about}: {grown >> 20} MiB of memory, {allowed >> 20} allowed")


def _hang(number: int, frame: Any) -> None:
    raise Hang(f"more than {SECONDS} s")


def _reset_peak() -> int:
    """Begin to measure resident memory's peak anew; what is resident now, in bytes."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not Linux, or not allowed: the peak is that of the process
        return 1 << 62
    return _memory("VmRSS")


def _memory(name: str) -> int:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith(name))


def quiet() -> None:
    """What every process that tries mutants needs: one thread, and no warnings on what they do."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
