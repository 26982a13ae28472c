# Each target sets up what it needs. PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install train test lint check canary bench table soak clean

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

train: install  # -q: an error ends with our line, and not with a traceback of the launcher's own call
	$(BIN)/accelerate launch -q train.py

test: .venv/.dev  # two processes; a file's tests stay together, because they share runs
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

check: lint
	$(BIN)/python -m pytest -q -m "not launch and not slow"

# The fast tests with the newest versions of all libraries, beyond the bounds of pyproject.toml: what would break there?
# Not part of CI. pip's own settings choose the index, such as one with CPU builds of torch.
canary:
	$(PYTHON) -m venv --clear .venv-canary
	.venv-canary/bin/pip install --quiet --upgrade pip
	.venv-canary/bin/pip install --quiet $$($(PYTHON) -c "$$UNBOUNDED")
	.venv-canary/bin/pip install --quiet --no-deps -e .
	.venv-canary/bin/pip list | grep -iE '^(torch|transformers|peft|accelerate|deepspeed|datasets) '
	HF_HUB_OFFLINE=1 .venv-canary/bin/python -m pytest -q -m "not launch and not slow"

define UNBOUNDED
import re, tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
extras = project["optional-dependencies"]
wanted = project["dependencies"] + extras["test"]
for name in re.findall(r"chorus\[(\w+)\]", " ".join(extras["test"])):  # its own extras are not in a registry
    wanted += extras[name]
print(*(re.match(r"[\w.-]+(\[[\w,]+\])?", one)[0] for one in wanted if not one.startswith("chorus[")))
endef
export UNBOUNDED

KILLS ?= 300
soak: .venv/.dev  # KILLS SIGKILLs in each engine, a few more through the real launchers, then the slow tests
	$(BIN)/python tests/helpers/soak.py --kills $(KILLS)
	$(BIN)/python tests/helpers/soak.py --kills 20 --launchers
	$(BIN)/python -m pytest -m slow

bench: .venv/.dev
	$(BIN)/python benchmarks/modes.py

table: .venv/.dev
	$(BIN)/python benchmarks/table.py

clean:
	rm -rf .venv .venv-canary runs .pytest_cache .ruff_cache .import_linter_cache
