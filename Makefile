# `make demo` and `make test` need only python3 and make: the first call of any target sets up .venv.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo teach runtime test test-slow test-lowest coverage lint types docs figures notebook structure wheels audit paper-gpu clean

demo: $(STAMP)
	$(BIN)/edge-dfcil demo

# A page that teaches a model in the browser; use ARGS="--camera" or ARGS="--folder PATH" for pictures other than digits.
teach: $(STAMP) runtime
	$(BIN)/python -m demos.teach $(ARGS)

# The runtime with which the browser itself answers. Without npm the page works, and says that this part is off.
runtime: demos/teach/node_modules/.installed
demos/teach/node_modules/.installed: demos/teach/package.json
	@if command -v npm >/dev/null; \
	then npm install --prefix demos/teach --no-package-lock --no-audit --no-fund --ignore-scripts && touch $@; \
	else echo 'npm is not installed: the page works, but does not answer in the browser itself; install npm, then run make runtime' >&2; fi

# Tests compute with one thread each, so two processes keep two cores busy. The tests of a file stay together, and files keep
# their order: ordered by number of tests, files with few long tests would come last, when one process has nothing left to do.
PYTEST = $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
# Lines that both suites run: each suite adds to the count, and only `make coverage` applies the limit.
COVERAGE = --cov --cov-report= --cov-fail-under=0

test: $(STAMP) lint types
	$(PYTEST) $(if $(CI),$(COVERAGE))

# Tests that take longer: every torchvision family, kills of real processes, photographs.
test-slow: $(STAMP)
	$(PYTEST) -m slow $(if $(CI),$(COVERAGE) --cov-append)

# The coverage of the package, after both suites with CI=1. Lines that run only in child processes do not count.
coverage: $(STAMP)
	$(BIN)/coverage report --skip-covered

# The quick suite with the lowest version of each dependency that pyproject.toml allows.
test-lowest:
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet uv
	.venv-lowest/bin/uv pip install --python .venv-lowest/bin/python --resolution lowest-direct --editable '.[dev]'
	.venv-lowest/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -W default

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

types: $(STAMP)
	$(BIN)/mypy --num-workers 2

# Builds the site from docs/ into site/; a broken link is an error.
docs: $(STAMP)
	$(BIN)/mkdocs build --strict

# Makes the pictures and figures of the demo.
figures: $(STAMP)
	$(BIN)/python -m demos.figures

# Runs the notebook and stores its outputs.
notebook: $(STAMP)
	$(BIN)/jupyter-execute --inplace demos/first_task.ipynb

# Draws the imports of the package; fails if there is a cycle.
structure: $(STAMP)
	$(BIN)/python -m docs.structure

# Both distributions, edge-dfcil and edge-dfcil-runtime, as sdist and wheel, checked as a registry checks them.
DIST ?= dist
wheels:
	$(PYTHON) -m venv .venv-wheels
	.venv-wheels/bin/python -m pip install --quiet 'build>=1.2' 'twine>=6.1'
	.venv-wheels/bin/python -m build --outdir $(DIST) .
	.venv-wheels/bin/python -m build --outdir $(DIST) exporters
	.venv-wheels/bin/python -m twine check --strict $(DIST)/edge_dfcil*

# Known vulnerabilities of the pinned versions. Needs the network.
audit:
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/python -m pip install --quiet 'pip-audit>=2.9'
	.venv-audit/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip --strict

# The published protocol, in pieces of under nine minutes: repeat the command until it reports that everything has been run.
# Finished pieces are small files in $(OUT), which may be moved to another machine in between.
OUT ?= benchmarks/results
MINUTES ?= 8.5
paper-gpu: $(STAMP)
	@test -n "$(DATA)" || { echo 'name the data: make paper-gpu DATA=PATH' >&2; exit 2; }
	$(BIN)/python -m benchmarks accuracy --data $(DATA) --out $(OUT) --preset paper-5,paper-10,paper-20 --seeds 0,1,2 \
		--methods abd,deep_inversion,lwf_mc,rehearsal --minutes $(MINUTES)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]' --constraint constraints.txt
	touch $@

clean:
	rm -rf demos/teach/node_modules .venv .venv-lowest .venv-wheels .venv-audit .coverage build dist site edge-dfcil-demo .pytest_cache .mypy_cache .ruff_cache
