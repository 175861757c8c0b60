# TORCH: what pip is asked for, options too: a version, or an index that has builds for the CPU alone.
TORCH ?= torch
PYTHON ?= python3
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest
# Two workers of pytest-xdist, with one core and one thread of torch each. The option -n switches benchmarks off, so it
# stands here and not among pytest's options in pyproject.toml.
PARALLEL := OMP_NUM_THREADS=1 $(PYTEST) -n 2 --dist worksteal
# The two files that are left out take a third of the time.
FAST := --ignore=tests/checkpoints/test_reader.py --ignore=tests/output/test_failing_calls.py \
	tests/planning tests/checkpoints tests/output tests/execution/test_engines.py tests/kernels/test_convert.py \
	tests/merging/test_merge.py tests/merging/test_carry.py tests/merging/test_model_card.py \
	tests/tensors/test_streaming.py tests/end_to_end/test_bad_input.py tests/end_to_end/test_ci.py

.PHONY: demo lint check test test-all bench gpu gpu-report format clean

demo: .venv/installed
	$(BIN)/python -W error::UserWarning -m expo.demo

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# To run before every commit: at most a minute on two idle cores.
check: lint
	$(PARALLEL) -m "not alone and not exhaustive" $(FAST)

# At most 6 minutes on two idle cores.
test: lint
	$(PARALLEL) -m "not alone and not exhaustive"
	$(PYTEST) -m "alone and not exhaustive"

# The long tests, which `make test` leaves out: every pair of bf16 values, kills and fuzzing at length; some 5 minutes.
test-all: .venv/installed
	$(PARALLEL) -m "exhaustive and not alone"
	$(PYTEST) -m "exhaustive and alone"

# Tens of minutes, and 44 GB of free disk for all of it. EXPO_BENCH_GB=0.1 for a quick look at what it does.
bench: .venv/installed
	$(BIN)/python -m pytest bench --benchmark-only --benchmark-json=.benchmarks.json
	$(BIN)/python -m bench.report .benchmarks.json bench/results/$$(nproc)-cores.json
	$(BIN)/python -m bench.plots bench/results/$$(nproc)-cores.json

# On a machine with a GPU, its own Python and nothing to install from: at most 9 minutes, $(OUT)/gpu.json and tables.
gpu:
	@$(PYTHON) -m bench.gpu $(or $(OUT),build)

# The figures of build/gpu.json, or of $(JSON), go into bench/results/ and docs/gpu.md.
gpu-report:
	@$(PYTHON) -m bench.gpu_report $(or $(JSON),build/gpu.json)

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/installed: setup.py pyproject.toml $(wildcard kernels/_cpu*.[ch])
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --editable ".[test,bench]"
	touch $@

clean:
	rm -rf .venv build *.egg-info kernels/*.so .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks*
