"""Held-out puzzles, benchmarks and probes."""
