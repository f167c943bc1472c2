VENV ?= .venv
BIN := $(VENV)/bin
PYTHON ?= python3

PIP := $(BIN)/python -m pip install
# a line every 20 seconds as long as the shell lives that says it: unpacking and type checking are silent
HEARTBEAT = begun=$$(date +%s); \
	( while sleep 20 </dev/null >/dev/null 2>&1; do kill -0 $$$$ 2>/dev/null || exit; \
	echo "    still $(1), $$(( $$(date +%s) - begun )) s"; done ) & beat=$$!; trap "kill $$beat" EXIT

.PHONY: help setup demo test test-slow check gpu-check

help:  ## what there is
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

# what running sdo needs
$(BIN)/.installed: pyproject.toml
	@echo "== a virtual environment in $(VENV)/"
	@$(call HEARTBEAT,making it); $(PYTHON) -m venv $(VENV) && $(PIP) --upgrade pip
	@echo "== sdo and what it needs: about 2 minutes and 6 GB, most of it PyTorch"
	@$(call HEARTBEAT,installing); $(PIP) --editable .
	@touch $@

# and what working on it needs
$(BIN)/.developing: $(BIN)/.installed
	@echo "== the developers' tools: about a minute"
	@$(call HEARTBEAT,installing); $(PIP) --editable ".[dev]"
	@touch $@

setup: $(BIN)/.developing  ## a virtual environment with sdo and the developers' tools

demo: $(BIN)/.installed  ## fine-tune the embedded model with SDO; ends with figures and a before/after picture
	@echo "== the demo: about 6 minutes on two free cores; the first line comes when PyTorch is loaded"
	@$(BIN)/sdo finetune --recipe quickstart

test: $(BIN)/.developing  ## all tests but the slow ones
	@echo "== the tests, in two processes; a dot for each"
	@$(call HEARTBEAT,testing); $(BIN)/python -m pytest -n 2 --dist worksteal -q

test-slow: $(BIN)/.developing  ## what takes minutes: the gain on held-out prompts and its controls, the built wheel
	$(BIN)/python -m pytest -q -m slow

gpu-check: $(BIN)/.developing  ## on a GPU: its tests, speed, memory, targets; 10 minutes, random weights, ends with a table
	$(BIN)/python scripts/gpu/check.py --out gpu-check.json

check: $(BIN)/.developing  ## format, lint, types, layers
	@echo "== format, lint, types (a minute the first time), layers"
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	@$(call HEARTBEAT,checking types); $(BIN)/mypy
	@$(call HEARTBEAT,testing layers); $(BIN)/python -m pytest -q tests/test_layers.py
