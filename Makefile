VENV ?= .venv
BIN := $(VENV)/bin
PYTHON ?= python3

.PHONY: help setup demo test test-slow check gpu-check

help:  ## what there is
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

$(BIN)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

setup: $(BIN)/.installed  ## a virtual environment with sdo and its tools (about 2 minutes, 6 GB)

demo: setup  ## fine-tune the embedded model with SDO; ends with figures and a before/after picture
	$(BIN)/sdo finetune --recipe quickstart

test: setup  ## all tests but the slow ones
	$(BIN)/python -m pytest -n 2 -q

test-slow: setup  ## what takes minutes: the gain on held-out prompts and its controls, the built wheel
	$(BIN)/python -m pytest -q -m slow

gpu-check: setup  ## on a GPU: its tests, speed, memory, targets; 10 minutes, random weights, ends with a table
	$(BIN)/python scripts/gpu/check.py --out gpu-check.json

check: setup  ## format, lint, types, layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layers.py
