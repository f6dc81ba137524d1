# MiniGPT's commands. `make` alone lists them. Works with GNU make 3.81 and newer.
SHELL := bash

PYTHON ?= python3
VENV ?= .venv
# Package index to take PyTorch itself from, e.g. the one with its CPU builds; empty: the default.
TORCH_INDEX ?=
# Processes that tests run in.
JOBS ?= 2
# Processes that are kept busy beside the tests, to show that they hold on a busy machine.
BUSY ?= 0
# Not empty: run every stage of the pipeline anew.
FORCE ?=
# Directory with pretrain, sft, dpo and lora.jsonl to run the benchmarks on; empty: the bundled data.
DATA ?=

PY := $(VENV)/bin/python
STAMP := $(VENV)/.minigpt-installed

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup pipeline test faults faults-large check bench format clean distclean

help: ## List these commands
	@awk 'BEGIN { FS = ":.*## " } /^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "Variables: PYTHON=$(PYTHON) VENV=$(VENV) TORCH_INDEX=$(TORCH_INDEX) JOBS=$(JOBS) BUSY=$(BUSY) FORCE=$(FORCE) DATA=$(DATA)"

setup: $(STAMP) ## Create the virtual environment and install MiniGPT in it

pipeline: $(STAMP) ## Train and test a model, from raw JSONL to chat (FORCE=1: anew)
	$(PY) scripts/pipeline.py $(if $(FORCE),--force)

test: $(STAMP) ## Run all tests but the long ones (JOBS processes, beside BUSY busy ones)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist loadfile --busy $(BUSY)

faults: $(STAMP) ## Kill runs at all moments and compare (the long tests, some minutes)
	OMP_NUM_THREADS=1 $(PY) -m pytest tests/faults -m "faults and not large" -n $(JOBS) --busy $(BUSY)

faults-large: $(STAMP) ## Train on 2 GB of text, prove every model type, read thousands of damaged files
	$(PY) -m pytest -m large -s

check: $(STAMP) ## Check format, lint and types
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy

bench: $(STAMP) ## Measure speed and memory, and write docs/benchmarks.md (DATA=DIR, FORCE=1)
	$(PY) scripts/bench/all.py $(if $(DATA),--data_dir "$(DATA)") $(if $(FORCE),--force)

format: $(STAMP) ## Format the code and fix what the linter can fix
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

clean: ## Remove outputs and caches
	rm -rf outputs mini_tokenizer build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path './$(VENV)' -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +

distclean: clean ## Remove the virtual environment, too
	@if [ -d "$(VENV)" ] && [ ! -f "$(VENV)/pyvenv.cfg" ]; then \
	  echo "error: $(VENV) is not a virtual environment; remove it by hand" >&2; exit 1; fi
	rm -rf "$(VENV)" *.egg-info

# torch first, alone and pinned: left to choose, pip may take a newer build with gigabytes of CUDA.
# Its own dependencies come in the second step.
$(STAMP): pyproject.toml constraints.txt | $(PY)
	$(PY) -m pip install --no-deps $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) \
	  "$$(grep '^torch==' constraints.txt)"
	$(PY) -m pip install -c constraints.txt -e '.[dev]'
	@touch $@

$(PY):
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo "error: $(PYTHON) not found; install Python 3.11 or newer, or set PYTHON=" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: MiniGPT needs Python 3.11 or newer, and $(PYTHON) is" \
	    "$$("$(PYTHON)" -V 2>&1); set PYTHON= to a newer one" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "error: $(PYTHON) -m venv is not available; on Debian and Ubuntu:" \
	    "apt install python3-venv" >&2; exit 1; }
	"$(PYTHON)" -m venv $(if $(wildcard $(VENV)/pyvenv.cfg),--clear) "$(VENV)"
