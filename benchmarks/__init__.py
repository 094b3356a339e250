"""Checks and measures fastattn against torch and a naive implementation: ``python -m benchmarks``."""
