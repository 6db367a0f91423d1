# Each target sets up what it needs in .venv; nothing else has to be installed first.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-all bench reproduce docs clean

demo: $(VENV)/.run
	$(BIN)/kullback distill

test: $(VENV)/.test
	$(BIN)/ruff check
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow" --durations 15

test-all: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

bench: $(VENV)/.bench
	for file in benchmarks/[a-z]*.py; do $(BIN)/python $$file || exit 1; done

reproduce: $(VENV)/.test
	$(BIN)/kullback reproduce --all

docs: $(VENV)/.run
	$(BIN)/python -m kullback.papers.table README.md

clean:
	rm -rf $(VENV) build dist

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch first and pinned: left to the resolver, another build of several gigabytes may come.
$(VENV)/.run: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) torch
	$(PIP) --editable .
	touch $@

$(VENV)/.test: $(VENV)/.run
	$(PIP) --editable '.[test]'
	touch $@

$(VENV)/.bench: $(VENV)/.test
	$(PIP) --editable '.[test,peers]'
	touch $@
