# The whole project from a fresh clone: `make demo` and `make test` need no other command before them.
#
#   make demo     poison, train, trace, heal and report on the bundled sample     (about two minutes)
#   make test     lint, types, layers, documentation, doctests and tests          (about ten minutes)
#   make bench    measure ours against the peers; writes benchmarks/results
#   make compat   try the datasets and networks of timm, transformers, datasets, lightning and peft as well
#   make docs     build the documentation into docs/_build/html
#   make setup    the virtual environment alone
#   make format   let ruff rewrite the code
#   make wheel    build dist/*.whl
#
# PYTHON names the interpreter: `make test PYTHON=python3.12`. Each version but the default one has a virtual
# environment of its own, .venv-3.12 here; VENV names another place. CONSTRAINTS names another list of versions,
# and PYTEST_OPTIONS is passed to pytest.

PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
ifndef VENV
ifeq ($(PYTHON),python3)
VENV   := .venv
else
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
ifndef VERSION
$(error PYTHON=$(PYTHON) cannot be run; name an interpreter that is on the PATH, or its full path)
endif
VENV   := .venv-$(VERSION)
endif
endif
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS)
BENCHMARKS := demo influence growth training trak detectors art selection gradient_matching metapoison polytope sweep
PYTEST_OPTIONS ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint types layers docs compat bench format wheel clean

help:
	@sed -n '/^#/!q; s/^#   //p' Makefile

# A stamp is as new as the files it was made from, so that an edit of the dependencies installs them again.
# torch is installed first and alone: its pinned version decides which builds of everything else fit.
$(VENV)/.core: pyproject.toml $(CONSTRAINTS)
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

test: $(VENV)/.dev lint types layers docs
	@$(BIN)/python -m pytest --numprocesses 2 --dist worksteal --quiet $(PYTEST_OPTIONS)

lint: $(VENV)/.dev
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet .

types: $(VENV)/.dev
	@$(BIN)/mypy --no-error-summary

layers: $(VENV)/.dev
	@$(BIN)/lint-imports

docs: $(VENV)/.dev
	@$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

compat: $(VENV)/.dev
	@$(PIP) --editable '.[compat]'
	@$(BIN)/python -m pytest --numprocesses 2 --quiet tests/compatibility tests/integrations

bench: $(VENV)/.dev
	@for name in $(BENCHMARKS); do $(BIN)/python -m benchmarks.$$name --json || exit 1; done
	@$(BIN)/python -m benchmarks.tables

format: $(VENV)/.dev
	@$(BIN)/ruff check --fix --quiet .
	@$(BIN)/ruff format --quiet .

wheel: $(VENV)/.dev
	@$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

clean:
	rm -rf .venv .venv-* docs/_build .mypy_cache .ruff_cache .pytest_cache .import_linter_cache dist demo
