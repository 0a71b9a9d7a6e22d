# `make demo` and `make test` work on a fresh clone: the first run sets up .venv, later runs skip that.
PYTHON ?= python3.11
BIN := .venv/bin
# torch comes first and alone: as a dependency of another package pip may take a build with CUDA libraries.
TORCH := $(shell grep -m1 '^torch==' constraints.txt)

# One process per core, each with a Ray of its own where it needs one; files with a Ray come first, as ordered.
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-unit check bench chaos gpu

demo: .venv/installed
	$(BIN)/prophy demo

# Everything but the long series of `make chaos`.
test: .venv/installed
	$(PYTEST) --durations=40

# What starts no Ray, ranks or browser and computes for some seconds at most: four fifths of the tests.
test-unit: .venv/installed
	$(PYTEST) -m 'not heavy and not gpu and not slow' --durations=10

check: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: .venv/installed
	for file in tests/benchmarks/*.py; do $(BIN)/python $$file || exit 1; done

chaos: .venv/installed
	$(BIN)/python -m pytest -m slow

# What only a GPU can tell; without one, a small form of each check.
gpu: .venv/installed
	$(BIN)/python -m tests.gpu.accept

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt $(TORCH)
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	# On all cores, where pip takes one. Some packages hold templates that are no Python.
	$(BIN)/python -m compileall -qq -j 0 .venv/lib || true
	touch $@
