"""End-to-end programs on fastattn: ``python -m examples.translation`` and ``python -m examples.pretraining``."""
