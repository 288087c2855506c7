# Every target works from a bare clone: it needs Python 3.10 or newer, git and make, and sets up
# everything else in .venv.

PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3.10 python3; do \
	command -v $$python > /dev/null && \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 10))' && echo $$python && break; done)
# The tests need no GPU: the CPU build, where an index offers it, saves a download of gigabytes (set
# PIP_EXTRA_INDEX_URL to one that does). A torch of this version that is already in .venv stays.
TORCH_VERSION := 2.13.0

BIN := .venv/bin
READY := .venv/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
CHECKED := $(wildcard src tests examples benchmarks)

.DEFAULT_GOAL := help
.PHONY: help install test test-fast torture fuzz lint types format demo demo-accelerate demo-moe bench clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 25

install: $(READY) ## set up .venv

$(READY): pyproject.toml Makefile
	@test -n "$(PYTHON)" || { echo "Python 3.10 or newer is needed"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -c 'from importlib.metadata import version as v; \
		assert v("torch").startswith("$(TORCH_VERSION)")' 2> /dev/null \
	|| $(PIP) install "torch==$(TORCH_VERSION)+cpu" 2> /dev/null \
	|| $(PIP) install "torch==$(TORCH_VERSION)"
	$(PIP) install "torch==$(TORCH_VERSION)" --editable '.[dev]'
	DS_BUILD_OPS=0 $(PIP) install "torch==$(TORCH_VERSION)" --editable '.[deepspeed]' \
	|| echo "DeepSpeed could not be installed here: the test that runs it is skipped"
	touch $@

# Most tests wait for disks, timeouts and each other's ranks: two at a time are nearly twice as fast.
SIDE_BY_SIDE ?= 2
PYTEST := $(BIN)/python -m pytest --numprocesses $(SIDE_BY_SIDE) --dist loadfile

test: lint types ## format, lint, types and all tests; `make test SIDE_BY_SIDE=0` runs them one after the other
	$(PYTEST)

test-fast: $(READY) ## the tests that take less than 10 seconds each
	$(PYTEST) -m "not slow and not torture"

torture: $(READY) ## the long forms of the tests of failures: about 25 minutes on 2 cores
	$(PYTEST) --dist load -m torture tests

FUZZED := manifest header objects latest pickle
FUZZ_SECONDS ?= 60

fuzz: $(READY) ## every parser of files under atheris, a minute each; `make fuzz FUZZED=header FUZZ_SECONDS=3600`
	$(BIN)/python -c 'import atheris' 2> /dev/null || $(PIP) install atheris
	set -e; for target in $(FUZZED); do $(BIN)/python -m tests.hostile.fuzz $$target $(FUZZ_SECONDS); done

lint: $(READY)
	$(BIN)/ruff format --check $(CHECKED)
	$(BIN)/ruff check $(CHECKED)

types: $(READY)
	$(BIN)/mypy

format: $(READY) ## rewrite the code in the project's format
	$(BIN)/ruff check --fix $(CHECKED)
	$(BIN)/ruff format $(CHECKED)

demo: $(READY) ## train, kill, resume elsewhere, export: under 3 minutes
	$(BIN)/python examples/lightning/demo.py

demo-accelerate: $(READY) ## the same with Accelerate: 2 processes, killed, resumed on 1
	$(BIN)/python examples/accelerate/demo.py

demo-moe: $(READY) ## experts on 2 processes, resumed on 4 and on 1
	$(BIN)/python examples/moe/demo.py --steps 90

bench: $(READY) ## measure against raw disk and torch's own checkpoints
	$(BIN)/python -c 'import matplotlib' 2> /dev/null || $(PIP) install --editable '.[bench]'
	$(BIN)/python -m benchmarks $(BENCH)

clean: ## remove what the targets made, .venv included
	rm -rf .venv build dist runs/demo runs/demo-accelerate runs/demo-moe .mypy_cache .pytest_cache .ruff_cache src/*.egg-info
