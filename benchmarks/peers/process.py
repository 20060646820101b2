"""A worker from outside: started, asked, and given up when it dies, hangs or talks nonsense."""

import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MOST = 2**20  # bytes of an answer


class Gone(Exception):
    """The worker is no more; the message says in one line how it ended."""


class Worker:
    """One peer's process. Its standard error goes to a log file, whose last line explains a death."""

    def __init__(self, command: Sequence[str], log: Path, environment: dict[str, str] | None = None) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        self.log_start = log.stat().st_size if log.exists() else 0
        with log.open("ab") as errors:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=os.environ | (environment or {}),
            )
        self.pending = b""

    def ready(self, timeout: float) -> dict[str, str]:
        """The versions it runs with, once its model is loaded. Raises Gone."""
        answer = self._answer(timeout)
        if answer.get("ready") is not True:
            raise self._gone("said something else than that it is ready")
        return dict(answer["versions"])

    def ask(self, request: dict[str, Any], timeout: float) -> dict[str, Any]:
        """Its answer, which may be an `error`. Raises Gone when there is none within `timeout` seconds."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write((json.dumps(request) + "\n").encode())
            self.process.stdin.flush()
        except (OSError, ValueError):  # the other end, or after `stop` this one, is closed
            raise self._gone("") from None
        return self._answer(timeout)

    def stop(self) -> None:
        """End the process, by force where it does not end by itself."""
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                try:
                    stream.close()
                except OSError:
                    pass
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _answer(self, timeout: float) -> dict[str, Any]:
        line = self._line(time.monotonic() + timeout)
        if line is None:
            raise self._gone(f"no answer in {timeout:.0f} s")
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise self._gone(f"said {line[:60].decode(errors='replace')!r}, which is no answer")
        return answer

    def _line(self, deadline: float) -> bytes | None:
        """The next line; None when the deadline passes before its end. Raises Gone at the end of the output."""
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while b"\n" not in self.pending:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    return None
                part = os.read(self.process.stdout.fileno(), 2**16)
                if not part or len(self.pending) > MOST:
                    raise self._gone("")
                self.pending += part
        line, _, self.pending = self.pending.partition(b"\n")
        return line

    def _gone(self, why: str) -> Gone:
        """End the process, and say how it ended."""
        if why:
            self.process.kill()
        self.stop()
        return Gone(why or f"{ending(self.process.returncode)}{self._last_line()}")

    def _last_line(self) -> str:
        with self.log.open("rb") as log:
            log.seek(self.log_start)
            lines = [
                line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()
            ]
        return f": {lines[-1]}" if lines else ""


def ending(status: int) -> str:
    """How a process ended, for people."""
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"died of {signal.Signals(-status).name}"
    except ValueError:
        return f"died of signal {-status}"
