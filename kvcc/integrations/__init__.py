"""kvcc inside other libraries."""
