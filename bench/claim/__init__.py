"""Reproduce the paper's claim on a CPU: python -m bench.claim (see __main__.py)."""
