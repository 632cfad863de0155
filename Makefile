# Everything happens in .venv; a stamp there says what is installed, so a second call does not install again.
# make PYTHON=/path/to/python3.12 chooses the interpreter.

VENV := .venv
BIN := $(VENV)/bin
EXTRA := $(if $(filter Linux,$(shell uname -s)),[cpu])
EMULATE := $(if $(filter Linux,$(shell uname -s)),TQ_REQUIRE_EMULATOR=1)
OLD_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c '$(OLD_ENOUGH)' 2>/dev/null && echo $$p && break; done)

.PHONY: demo test lint format completions docs clean

demo: $(VENV)/installed
	$(BIN)/tq demo

test: lint
	$(EMULATE) $(BIN)/pytest -n 2

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

completions docs: $(VENV)/installed-dev  # one script writes both
	$(BIN)/python docs/generate.py

# One recipe from interpreter to package: what was interrupted half-way is simply done again.
# pip 25.1 is the first that can install a dependency group.
$(VENV)/installed: pyproject.toml
	@$(or $(PYTHON),false) -c '$(OLD_ENOUGH)' 2>/dev/null || \
		{ echo "error: tq needs Python 3.11 or newer: install it, or say make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
		{ echo "error: $(PYTHON) has no venv module: on Debian, apt install python3-venv" >&2; exit 1; }
	@echo "Installing tq and what it needs into $(VENV): a minute or two"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --editable '.$(EXTRA)'
	@touch $@

$(VENV)/installed-dev: pyproject.toml $(VENV)/installed
	$(BIN)/python -m pip install --quiet --group dev
	@touch $@

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache
