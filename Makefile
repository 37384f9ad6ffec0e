# make run, make test, make check: each makes .venv from a fresh clone; only Python >= 3.11 is needed.
# Another interpreter: make PYTHON=python3.12 test
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=
TESTS ?= tests
JOBS ?= 2
KILLS ?= 25
SEED ?= 0

.DEFAULT_GOAL := help
.PHONY: help run test test-kill check lint types tree clean

help:
	@echo "make run     the quickstart: launch.py --config=configs/quickstart.py (ARGS=... adds flags)"
	@echo "make test    all tests (TESTS=tests/test_cli.py for some)"
	@echo "make test-kill  a real run killed KILLS=25 times, and inside a save; SEED=0 chooses where"
	@echo "make check   ruff format, ruff lint, pyright, tests"
	@echo "make tree    writes docs/layout.md: every file in one clause"
	@echo "make clean   removes $(VENV) and caches; runs/ stays"

run: $(VENV)/.stamp-run
	$(BIN)/python launch.py --config=configs/quickstart.py $(ARGS)

test: $(VENV)/.stamp-dev
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(TESTS) $(ARGS)

test-kill: $(VENV)/.stamp-dev
	$(BIN)/python tests/save_crashes.py
	$(BIN)/python tests/kill_run.py --kills=$(KILLS) --seed=$(SEED)

check: lint types test

lint: $(VENV)/.stamp-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/.stamp-dev
	$(BIN)/pyright --pythonpath $(BIN)/python

tree: $(BIN)/python
	$(BIN)/python tests/file_tree.py

# The stamps are newer than the requirements that were installed last.
$(VENV)/.stamp-run: requirements.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/.stamp-dev: requirements-dev.txt $(VENV)/.stamp-run
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "awf needs Python >= 3.11, $(PYTHON) is older or missing; give one: make PYTHON=python3.11 ..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) .venv-parity .cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
