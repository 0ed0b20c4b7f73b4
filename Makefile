# Set-up, demo, tests and checks, each by one word: `make help`.
# Needs make, git and Python 3.10-3.12 with its venv module, nothing else.
# ARGS is passed on:  make demo ARGS="--seed 1"    make test ARGS="tests/test_objective.py -x"
# PYTHON names the interpreter to build with:  make setup PYTHON=/path/to/python3.11

SHELL := /bin/sh
ARGS ?=
PYTHON ?=
export PYTHON
unexport PYTHONPATH PYTHONHOME

# Any Python 3 can start the script: it looks for one of the supported versions itself.
SETUP = for python in $(PYTHON) python3.11 python3.12 python3.10 python3 python; do \
	if "$$python" -c "import sys; sys.exit(sys.version_info < (3, 8))" >/dev/null 2>&1; then \
	exec "$$python" -I tools/setup_env.py $(1); fi; done; \
	echo "setup: error: no Python was found; install Python 3.11 and its venv module" >&2; exit 1

# Two test files at a time, each in a process of its own: for machines with two cores.
AT_ONCE = -n 2 --dist loadfile

.PHONY: help setup setup-compat demo test-fast test test-distributed test-compat lint files wheel

help:
	@echo "make setup             create or repair .venv with the tested versions (about 7 GB; a second run installs nothing)"
	@echo "make demo              tune and judge a tiny LLaVA with and without VITask, on a CPU, in minutes"
	@echo "make test-fast         what neither trains nor starts processes: on every change"
	@echo "make test              the test suite"
	@echo "make test-distributed  several processes, ZeRO stages and hosts give one curve (two hosts need root and iproute2)"
	@echo "make test-compat       the tests marked 'compat' on the older row of the compatibility table (its own environment)"
	@echo "make lint              ruff, ruff format, mypy, and whether docs/files.md is as the tree"
	@echo "make files             write docs/files.md"
	@echo "make wheel             wheel and sdist in dist/, checked, and installed into an empty environment"

setup:
	@$(call SETUP,--row transformers-5 --venv .venv)

setup-compat:
	@$(call SETUP,--row transformers-4 --venv .venv-compat)

demo: setup
	@.venv/bin/vitask demo $(ARGS)

test-fast: setup
	.venv/bin/python -m pytest $(AT_ONCE) -m "not slow" $(ARGS)

test: setup
	.venv/bin/python -m pytest $(ARGS)

test-distributed: setup
	.venv/bin/python -m pytest tests/equivalence tests/multinode $(ARGS)

test-compat: setup-compat
	.venv-compat/bin/python -m pytest -m compat $(ARGS)

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/python tools/list_files.py --check

files: setup
	.venv/bin/python tools/list_files.py

wheel: setup
	.venv/bin/python tools/try_wheel.py
