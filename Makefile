# Two commands do it all on a machine with python3 and make: each sets up .venv once and then runs.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test lint types figures clean

demo: $(STAMP)
	$(BIN)/edge-dfcil demo

test: $(STAMP) lint types
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

# The pictures of the README.
figures: $(STAMP)
	$(BIN)/python demos/figures.py

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]' --constraint constraints.txt
	touch $@

clean:
	rm -rf .venv build edge-dfcil-demo .pytest_cache .mypy_cache .ruff_cache
