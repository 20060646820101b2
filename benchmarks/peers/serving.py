"""What every worker does: answer requests, a JSON object a line, and time steps.

A worker is started as `python WORKER.py OPTIONS`, OPTIONS a JSON object, loads its model once, and says
`{"ready": true, "versions": {...}}`. A request is `{"do": NAME, ...arguments}`; its answer is what the function of
that name returns, or `{"error": "one line"}`. Only the standard library is imported here: this file runs in every
peer's environment, as a neighbour of the worker's script.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

THREADS = 2
WARM_STEPS = 2  # before the timed ones
LIMIT = 8192  # tokens of SmolLM2's context

Function = Callable[..., dict[str, Any]]


def options() -> dict[str, Any]:
    """What the harness gave on the command line."""
    return dict(json.loads(sys.argv[1]))


def private_output() -> int:
    """A descriptor for answers alone; whatever libraries print on standard output goes to standard error."""
    sys.stdout.flush()
    answers = os.dup(1)
    os.dup2(2, 1)
    return answers


def serve(answers: int, functions: Mapping[str, Function], packages: tuple[str, ...]) -> None:
    """Answer requests from standard input on the descriptor `answers` until it closes."""
    say(answers, {"ready": True, "versions": {name: version(name) for name in packages}})
    for line in sys.stdin:
        say(answers, answer(functions, json.loads(line)))


def answer(functions: Mapping[str, Function], request: dict[str, Any]) -> dict[str, Any]:
    """The result of one request, with `peak_rss` in bytes, or its error in one line."""
    arguments = {key: value for key, value in request.items() if key != "do"}
    try:
        restart_peak()
        return functions[request["do"]](**arguments) | {"peak_rss": peak_rss()}
    except Exception as error:  # a peer's failure is a result
        lines = str(error).strip().splitlines() or [""]
        return {"error": f"{type(error).__name__}: {lines[0]}"}


def say(answers: int, message: dict[str, Any]) -> None:
    os.write(answers, (json.dumps(message) + "\n").encode())


def timed_steps(step: Callable[[], object], steps: int, seconds: float) -> list[float]:
    """Milliseconds of each of up to `steps` steps, after untimed ones.

    Ends after `seconds`, but not before three are timed; one is enough where it takes longer than that.
    """
    started = time.perf_counter()
    step()
    slow = time.perf_counter() - started > seconds / 3
    for _ in range(0 if slow else WARM_STEPS - 1):
        step()
    least = 1 if time.perf_counter() - started > seconds else min(3, steps)
    times: list[float] = []
    while len(times) < steps and (len(times) < least or sum(times) < 1e3 * seconds):
        begun = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - begun))
    return times


def first_length(context: int, steps: int) -> int:
    """Tokens to cache before the steps: `context`, or fewer where the steps would go beyond the model's."""
    return min(context, LIMIT - WARM_STEPS - steps)


def mean_length(filled: int, timed: int) -> float:
    """Tokens in a sequence's cache during a step, the mean over the timed ones."""
    return filled + WARM_STEPS + (timed + 1) / 2


def decoded(times: list[float], filled: int, batch: int, cache_bytes: float, tokens: float) -> dict[str, Any]:
    """The answer to `decode`: cache_bytes are allocated for `tokens` tokens, all sequences together."""
    return {
        "ms": times,
        "length": mean_length(filled, len(times)),
        "batch": batch,
        "bytes_per_token": cache_bytes / tokens,
    }


def prompt(path: str, count: int, row: int = 0) -> list[int]:
    """`count` token ids of the common text, for each row beginning elsewhere in it."""
    ids: list[int] = json.loads(Path(path).read_text())
    start = row * 37 % len(ids)
    return ((ids[start:] + ids[:start]) * -(-count // len(ids)))[:count]


def restart_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass  # the peak is then of the whole process


def peak_rss() -> int:
    """Most bytes this process had in memory, on Linux since `restart_peak`."""
    try:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])
    except (OSError, IndexError):
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
