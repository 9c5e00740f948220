# One verb per line; `make help` lists them.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check install -q -c constraints.txt
INPUTS := pyproject.toml constraints.txt setup.py $(wildcard kernels/native/*.cpp kernels/native/*.h)
# The live page's charts: uPlot, out of a wheel whose Python is not wanted, so that nobody needs node.
CHARTS := server/ui/vendor/uPlot.iife.js

.DEFAULT_GOAL := help
.PHONY: help install dev serve test check lint types layers test-gpu bench builtin-model dashboards clean

help:  ## list the verbs
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

install: $(VENV)/.installed $(CHARTS)  ## create .venv with everything `quire serve` needs
dev: $(VENV)/.dev $(CHARTS)  ## add what tests and checks need

serve: install  ## serve the built-in demo model on http://127.0.0.1:8000
	$(BIN)/quire serve

test: dev  ## run every test that needs no GPU
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile

check: dev lint types layers  ## everything CI checks besides the tests

lint: dev  ## style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: dev  ## mypy, strict
	$(BIN)/mypy

layers: dev  ## who may import whom
	$(BIN)/lint-imports

test-gpu: dev  ## the tests that need an NVIDIA GPU
	$(BIN)/python -m pytest -m gpu

bench: dev  ## the engine's own cost, the front end, the CPU kernels, the gain of the cache
	$(BIN)/python -m benchmarks.step_overhead
	$(BIN)/python -m benchmarks.cpu_kernels
	$(BIN)/python -m benchmarks.frontend
	$(BIN)/python -m benchmarks.kv_cache_gain

builtin-model: dev  ## train the built-in demo model again
	$(BIN)/python -m training.train

dashboards: dev  ## write the Grafana dashboards, and their tables in docs/operations.md, again
	$(BIN)/python -m deploy.grafana.generate

clean:  ## remove what the verbs above made
	rm -rf $(VENV) build *.egg-info kernels/native/*.so server/ui/vendor

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Quire needs Python 3.11 or newer; set PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "No venv module: apt install python3-venv"; exit 1; }

$(VENV)/.installed: $(BIN)/python $(INPUTS)
	$(PIP) -e '.[server]'
	@touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(PIP) -e '.[dev]'
	@touch $@

$(CHARTS): constraints.txt | $(BIN)/python
	$(PIP) --no-deps --upgrade --target build/vendor uplot-python
	@mkdir -p server/ui/vendor
	@cp build/vendor/uplot/static/uPlot.min.css build/vendor/uplot/static/uPlot.iife.js server/ui/vendor/
