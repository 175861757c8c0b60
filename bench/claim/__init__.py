"""The paper's claim, reproduced on one's own CPU: `python -m bench.claim` (see bench/claim/__main__.py)."""
