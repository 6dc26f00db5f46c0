# Every target sets up what it needs: `make demo` and `make test` work on a machine with only Python and make.
PYTHON ?= $(shell for p in python3.11 python3.10 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install demo test test-slow lint mutate soak goldens tables notebook api clean

install: $(VENV)/.installed

$(VENV)/.installed: setup.py
	@test -n "$(PYTHON)" || { echo "no Python 3.10 or 3.11 found: install one, or run 'make PYTHON=/path/to/python3.11'" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: install
	@rm -rf demo_output
	@$(BIN)/pangu-quant demo

test: install
	$(BIN)/python -m pytest

test-slow: install
	$(BIN)/python -m pytest -m slow

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy

soak: install
	$(BIN)/python tools/dev/soak.py

mutate: install
	$(BIN)/python tools/dev/mutate.py

goldens: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[goldens]'
	$(BIN)/python tools/goldens/network.py

# The tables of docs/accuracy.md. Rows of other tools need TABLES='--llmcompressor-python PY --msmodelslim-python PY'.
tables: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[real]'
	$(BIN)/python tools/dev/tables.py $(TABLES)

notebook: install
	$(BIN)/python -m pytest -m '' tests/e2e/test_notebook.py

# The API reference, from the docstrings: docs/api.md for what is public, build/api/ for every module.
api: install
	$(BIN)/python tools/dev/api.py

clean:
	rm -rf $(VENV) demo_output accuracy_output build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
