# The whole project from a fresh clone: `make demo` and `make test` need nothing before them.
#
#   make demo     poison, train, trace, heal and report on the bundled sample     (about two minutes)
#   make test     lint, types, floors, documentation, doctests and tests           (minutes)
#   make bench    measure ours against the peers; writes benchmarks/results
#   make docs     build the documentation into docs/_build/html
#   make setup    the virtual environment alone
#   make format   let ruff rewrite the code

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
BENCHMARKS := influence growth training sweep trak detectors

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint types floors docs bench format clean

help:
	@sed -n 's/^#   //p' Makefile

# A stamp is as new as the files it was made from, so that an edit of the dependencies installs them again.
# torch comes first and alone: its pinned version decides which builds of everything else fit.
$(VENV)/.core: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "unpoison needs Python 3.11 or newer; name one with make PYTHON=python3.12")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing unpoison into $(VENV) (once; torch is large)"
	@$(PIP) torch
	@$(PIP) --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.core
	@echo "installing the development tools and the peers"
	@$(PIP) --editable '.[dev]'
	@touch $@

setup: $(VENV)/.dev

demo: $(VENV)/.core
	@$(BIN)/unpoison demo --out demo --overwrite

test: $(VENV)/.dev lint types floors docs
	@$(BIN)/python -m pytest --numprocesses 2 --dist worksteal --quiet

lint: $(VENV)/.dev
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet .

types: $(VENV)/.dev
	@$(BIN)/mypy --no-error-summary

floors: $(VENV)/.dev
	@$(BIN)/lint-imports

docs: $(VENV)/.dev
	@$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

bench: $(VENV)/.dev
	@for name in $(BENCHMARKS); do $(BIN)/python -m benchmarks.$$name --json || exit 1; done

format: $(VENV)/.dev
	@$(BIN)/ruff check --fix --quiet .
	@$(BIN)/ruff format --quiet .

clean:
	rm -rf $(VENV) docs/_build .mypy_cache .ruff_cache .pytest_cache .import_linter_cache demo
