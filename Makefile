# Everything runs in a virtual environment that these targets make by themselves.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Data sets with natural clients are used where the folder is there; nothing depends on it.
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Hundreds of processes are started by the tests; compiled files save each a third of a second.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test test-slow check docs benchmarks clean

demo: $(VENV)/demo.done
	@$(BIN)/atoll demo

test: $(VENV)/test.done check
	$(BIN)/python -m pytest

test-slow: $(VENV)/test.done
	$(BIN)/python -m pytest -m slow

check: $(VENV)/test.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/test.done
	$(BIN)/sphinx-build -q -W -b html docs docs/_build/html
	@echo "open docs/_build/html/index.html"

clean:
	rm -rf $(VENV) docs/_build build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(VENV)/bin/pip:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
		{ echo "atoll needs Python 3.11 or later; say which: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -m venv $(VENV)

$(VENV)/demo.done: pyproject.toml | $(VENV)/bin/pip
	@echo "installing atoll into $(VENV) ..."
	@$(BIN)/pip install --quiet -e '.[demo]'
	@touch $@

# A torch that is bounded from above is a small CPU build here; unbounded it may be gigabytes.
$(VENV)/test.done: pyproject.toml | $(VENV)/bin/pip
	$(BIN)/pip install --quiet 'torch>=2.6,<2.14'
	$(BIN)/pip install --quiet -e '.[test]'
	@touch $@ $(VENV)/demo.done
