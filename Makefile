# Everything runs in a virtual environment that these targets make by themselves.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Processes that share the tests.
WORKERS ?= 2
# Data sets with natural clients are used where the folder is there; nothing depends on it.
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Hundreds of processes are started by the tests; compiled files save each a third of a second.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help demo test test-slow check docs benchmarks clean

# Without a target: what there is. A target says after ## what it does.
help:
	@awk -F ': .*## |:.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/demo.done  ## install into .venv, train on real data, compare; about a minute
	@$(BIN)/atoll demo

test: $(VENV)/test.done check  ## style, types and the tests, with everything they need; ten minutes
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

test-slow: $(VENV)/test.done  ## statistical and end-to-end checks; much longer
	$(BIN)/python -m pytest -m slow -n $(WORKERS) --dist loadfile

check: $(VENV)/test.done  ## style and types only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/test.done  ## build the pages into docs/_build/html
	$(BIN)/sphinx-build -q -W -b html docs docs/_build/html
	@echo "open docs/_build/html/index.html"

# Short runs of what needs no data from elsewhere, no rivals' environments and no GPU. Committed
# results come from the scripts' own settings, which write to benchmarks/results.
FIGURES := build/benchmarks

benchmarks: $(VENV)/test.done  ## short benchmarks into build/benchmarks; about five minutes
	@mkdir -p $(FIGURES)
	$(BIN)/python benchmarks/speed/run.py --workload W3 --passes 1 --out $(FIGURES)/speed.json
	$(BIN)/python benchmarks/frameworks.py --out $(FIGURES)/frameworks.json
	$(BIN)/python benchmarks/fedbuff.py --seeds 1 --concurrency 10 --out $(FIGURES)/fedbuff.json
	$(BIN)/python benchmarks/fedprox_synthetic.py --rounds 10 --out $(FIGURES)/fedprox.json
	$(BIN)/python benchmarks/service_load.py --clients 20 --checkins 200 --megabytes 8 \
		--out $(FIGURES)/service_load.json
	@if [ -n "$$ATOLL_BROWSER" ] || command -v chromium || command -v google-chrome; then \
		echo $(BIN)/python benchmarks/page.py --out $(FIGURES)/page.json; \
		$(BIN)/python benchmarks/page.py --out $(FIGURES)/page.json; \
	else \
		echo "left out, for want of chromium: benchmarks/page.py"; \
	fi
	@echo "the figures are in $(FIGURES)"

clean:  ## remove the virtual environment and everything that was built
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
