# TORCH: what pip is asked for, options too: a version, or an index that has builds for the CPU alone.
TORCH ?= torch
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-all bench gpu format clean

demo: .venv/installed
	$(BIN)/python -W error::UserWarning -m expo.demo

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

# Also what is left out above: every pair of bf16 values, kills and fuzzing at length; some 5 minutes.
test-all: .venv/installed
	$(BIN)/python -m pytest -m "exhaustive or not exhaustive"

# Tens of minutes, and 44 GB of free disk for all of it. EXPO_BENCH_GB=0.1 for a quick look at what it does.
bench: .venv/installed
	$(BIN)/python -m pytest bench --benchmark-only --benchmark-json=.benchmarks.json
	$(BIN)/python -m bench.report .benchmarks.json bench/results/$$(nproc)-cores.json
	$(BIN)/python -m bench.plots bench/results/$$(nproc)-cores.json

# On a machine with a GPU, its own Python and nothing to install from: at most 9 minutes, $(OUT)/gpu.json and tables.
gpu:
	@$(PYTHON) -m bench.gpu $(or $(OUT),build)

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/installed: setup.py pyproject.toml kernels/_cpu.c
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --editable ".[test,bench]"
	touch $@

clean:
	rm -rf .venv build *.egg-info kernels/*.so .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks*
