"""Progress where there is no terminal: lines, few of them, on standard error; and none for machines."""

import pytest

from kvcc.cli import _console
from kvcc.cli._console import progress


def test_lines_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stage's beginning and end, and what comes LINE_EVERY seconds after the last line."""
    clock = iter([0.0, 1.0, 10.0, 11.0, 12.0])
    monkeypatch.setattr(_console.time, "monotonic", lambda: next(clock))
    with progress(quiet=False) as advance:
        for done in range(4):
            advance("reading", done, 4)
        advance("reading", 4, 4)
    assert capsys.readouterr() == ("", "reading 0/4\nreading 2/4\nreading 4/4\n")


def test_nothing_for_machines(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(quiet=True) as advance:
        advance("reading", 0, 1)
    assert capsys.readouterr() == ("", "")
