"""Artifacts nobody meant: a real one of a tiny model, changed at random, must load and run or be refused."""
