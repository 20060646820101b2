"""Prompt sets for calibration and evaluation, and the generators behind them."""

from kvcc.calibration_data.prompts import HELD_OUT, Prompt, describe, digest, held_out, load_prompts, names
from kvcc.calibration_data.retrieval_tasks import (
    Task,
    contains_answer,
    key_value,
    needle,
    variable_tracking,
)

__all__ = [
    "HELD_OUT",
    "Prompt",
    "Task",
    "contains_answer",
    "describe",
    "digest",
    "held_out",
    "key_value",
    "load_prompts",
    "names",
    "needle",
    "variable_tracking",
]
