# make demo   sets everything up and asks a small model a question about a long document, inside a small cache
# make test   sets everything up and runs the tests
# make test-gpu   kernels on a GPU: against float64, end to end, and their share of its bandwidth (has not run yet)
# make check  formatting, lint and types      make bench   speed and memory against stock mlx-lm (quiet machine, 10 minutes)
#
# Needs Python 3.11 or newer (as mlx-lm does), git, make and a C++ compiler. Everything goes into .venv and the user's cache folder.

VENV ?= .venv
BIN := $(VENV)/bin
COMMA := ,
EXTRAS := $(if $(filter Linux,$(shell uname -s)),cpu$(COMMA))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

.PHONY: demo test test-gpu check bench setup dev clean
.DELETE_ON_ERROR:

demo: setup
	@$(BIN)/mlx-kvprune pull smollm2-135m
	@$(BIN)/python examples/demo.py

test: dev
	@$(BIN)/python -m pytest

test-gpu: dev
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$(if $(filter Linux,$(shell uname -s)),cuda13$(COMMA))dev]'
	@$(BIN)/python -m pytest -m gpu -n 0 -rs
	@if command -v compute-sanitizer >/dev/null; then \
		compute-sanitizer --tool memcheck --error-exitcode 1 $(BIN)/python -m pytest -m gpu -n 0 -k attention; \
		else echo "compute-sanitizer is not on the PATH: left out"; fi
	@$(BIN)/mlx-kvprune doctor
	@$(BIN)/python -m mlx_kvprune.bench --kernels

check: dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: setup
	@$(BIN)/mlx-kvprune pull smollm2-135m
	$(BIN)/mlx-kvprune bench

setup: $(VENV)/.setup
dev: $(VENV)/.dev

$(VENV)/.venv:
	@test -n "$(PYTHON)" || { echo "make: needs Python 3.11 or newer; got none on the PATH; try PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || { $(PYTHON) -m venv --clear --without-pip $(VENV) && \
		$(PYTHON) -m pip --python $(BIN)/python install --quiet pip; } || \
		{ echo "make: cannot make a virtual environment with $(PYTHON); try installing python3-venv"; exit 1; }
	@touch $@

$(VENV)/.setup: $(VENV)/.venv pyproject.toml
	@echo "Installing mlx-kvprune into $(VENV) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$(EXTRAS)gguf,pdf,chat]'
	@$(BIN)/python -c 'from mlx_kvprune import blas; blas.build()'
	@touch $@

$(VENV)/.dev: $(VENV)/.setup
	@echo "Installing what the tests need ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$(EXTRAS)dev]'
	@touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
