# `make train` and `make test` set up what they need. PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install train test lint check bench table soak clean

install: .venv/.installed

.venv/.installed: requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Chorus needs Python 3.11 or newer: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -r requirements.txt
	touch $@

.venv/.dev: .venv/.installed
	$(BIN)/pip install --quiet -e '.[test,dev,trackers]'
	touch $@

train: install
	$(BIN)/accelerate launch train.py

test: .venv/.dev  # two at a time, a file's tests together: they share runs
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

check: lint
	$(BIN)/python -m pytest -q -m "not launch and not slow"

KILLS ?= 300
soak: .venv/.dev  # so many SIGKILLs in each engine; a few more through the real launchers; then the slow tests
	$(BIN)/python tests/helpers/soak.py --kills $(KILLS)
	$(BIN)/python tests/helpers/soak.py --kills 20 --launchers
	$(BIN)/python -m pytest -m slow

bench: .venv/.dev
	$(BIN)/python benchmarks/modes.py

table: .venv/.dev
	$(BIN)/python benchmarks/table.py

clean:
	rm -rf .venv runs .pytest_cache .ruff_cache
