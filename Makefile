# Triune: `make quickstart` and `make test` work from a fresh clone; both create .venv themselves.

SHELL := /bin/bash
PYTHON ?= python3.12
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PEERS := .venv-peers
OLDEST := .venv-oldest
PIP := -m pip --quiet --disable-pip-version-check install

ifeq ($(shell uname),Linux)
export MUJOCO_GL ?= $(shell /sbin/ldconfig -p | grep -q libEGL.so.1 && echo egl || echo osmesa)
endif

.PHONY: help venv quickstart test check lint format bench clean
.DEFAULT_GOAL := help

help:
	@echo "make venv        create $(VENV) with everything pinned by constraints.txt, and two small ones for tests beside it"
	@echo "make quickstart  record, train, evaluate: a report in runs/quickstart"
	@echo "make test        the tests that finish in minutes"
	@echo "make check       all tests"
	@echo "make lint        ruff and mypy"
	@echo "make format      let ruff format and sort imports"
	@echo "make bench       benchmarks into eval/results"
	@echo "make clean       remove caches and build folders (never runs/ or $(VENV))"

venv: $(STAMP) $(PEERS)/.installed $(OLDEST)/.installed

# The stamp is newer than what it was made from, so a second `make venv` does nothing.
# opencv-python (robosuite asks for it) and opencv-python-headless (lerobot asks for it) own the same files: the
# headless one goes last, because it needs neither libGL nor a display.
$(STAMP): pyproject.toml policies/client/pyproject.toml policies/plugin/pyproject.toml constraints.txt
	@.ci/libraries || true
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not there: install Python 3.12, or name it: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@test -x $(BIN)/python || { echo "creating $(VENV) (some minutes, about 7 GB)"; $(PYTHON) -m venv $(VENV); }
	$(BIN)/python $(PIP) --constraint constraints.txt --editable policies/client --editable ".[all,dev]"
	$(BIN)/python $(PIP) --no-deps --no-build-isolation --editable policies/plugin
	$(BIN)/python $(PIP) --constraint constraints.txt --force-reinstall --no-deps opencv-python-headless
	@mkdir -p $(VENV)/typing && ln -sfn ../.. $(VENV)/typing/triune && ln -sfn ../../policies/client/triune_client $(VENV)/typing/triune_client
	@touch $@

# What others wrote and cannot live beside us (numpy < 2): tests compare with it.
$(PEERS)/.installed: constraints-peers.txt
	@test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python $(PIP) --no-deps --requirement constraints-peers.txt
	@touch $@

# The client on an old Python, where one is installed; without one its test is skipped with that reason.
$(OLDEST)/.installed: policies/client/pyproject.toml .ci/oldest
	@mkdir -p $(OLDEST)
	@old=$$(.ci/oldest); [ -z "$$old" ] || { test -x $(OLDEST)/bin/python || "$$old" -m venv $(OLDEST); }
	@[ ! -x $(OLDEST)/bin/python ] || $(OLDEST)/bin/python $(PIP) --editable policies/client
	@touch $@

quickstart: venv
	@.ci/libraries
	@$(BIN)/vla quickstart

test: venv
	@.ci/libraries
	@$(BIN)/python -m pytest --numprocesses=$(WORKERS) --dist=loadfile -m "not slow" $(ARGS)

check: venv
	@.ci/libraries
	@$(BIN)/python -m pytest --numprocesses=$(WORKERS) --dist=loadfile $(ARGS)

lint: venv
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: venv
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: venv
	@$(BIN)/vla bench --out eval/results

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
