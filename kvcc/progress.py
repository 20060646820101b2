"""How long work tells what it is doing."""

from collections.abc import Callable

OnProgress = Callable[[str, int, int], None]  # called with a stage, its steps done, and its steps in all


def unseen(stage: str, done: int, total: int) -> None:
    """The OnProgress that nobody watches."""
