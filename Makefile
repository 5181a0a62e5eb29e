# Every target works on a fresh machine that has Python 3.11 or newer and a network that reaches a
# package index; the first one that runs creates .venv and installs what it needs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help setup demo fix check test test-slow test-gpu bench bench-gpu docs clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(STAMP)  ## create .venv and install the package with everything its tests need

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "eanet needs Python 3.11 or newer; found $$($(PYTHON) --version). Try: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(STAMP)  ## train an EAMLP on handwritten digits, then write a page with what it learned
	$(BIN)/eanet demo

fix: $(STAMP)  ## format, and mend what the linter can
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format --quiet .

check: $(STAMP)  ## format, lint, types and import rules, as in continuous integration
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/basedpyright

test: $(STAMP)  ## the everyday tests (under ten minutes on two cores)
	$(BIN)/python -m pytest --numprocesses 2

test-slow: $(STAMP)  ## the tests that take more than a minute each
	$(BIN)/python -m pytest -m slow --timeout 3600

test-gpu: $(STAMP)  ## the tests that need a GPU
	$(BIN)/python -m pytest -m gpu --device cuda --numprocesses 8

bench: $(STAMP)  ## time and memory of the block: the paper's form, product form, fused
	$(BIN)/eanet bench block

bench-gpu: $(STAMP)  ## speed on a GPU, into results/benchmarks (under nine minutes)
	$(BIN)/eanet bench gpu

docs: $(STAMP)  ## build the documentation into docs/_build
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	$(BIN)/sphinx-build --fail-on-warning docs docs/_build

clean:  ## remove what the other targets made
	rm -rf $(VENV) docs/_build
