"""Timings that need an idle machine; `python -m benchmarks.compare` runs the peers."""
