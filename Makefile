# make demo | test | test-slow | lint | env | clean. Needs Python 3.11 or newer and make; PYTHON=... chooses which.

OLDER := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(or $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$python -c '$(OLDER)' 2>/dev/null && echo $$python && break; done),python3)
BIN := .venv/bin
STAMP := .venv/installed

.PHONY: demo test test-slow lint env clean

demo: $(STAMP)
	@$(BIN)/triscale train scenes

test: lint
	@OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: $(STAMP)
	@$(BIN)/pytest --run-slow -m slow

lint: $(STAMP)
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/basedpyright

env: $(STAMP)

$(STAMP): requirements/dev.txt pyproject.toml
	@$(PYTHON) -c '$(OLDER)' 2>/dev/null || \
		{ echo "Triscale needs Python 3.11 or newer: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@echo "Installing requirements/dev.txt into .venv (the first time, PyTorch is downloaded: some minutes)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -r requirements/dev.txt
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

clean:
	rm -rf .venv build dist .hypothesis .pytest_cache .ruff_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
