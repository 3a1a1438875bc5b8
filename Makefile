# Every command that CI runs, under the name that CI uses. Each target sets up what it needs: from a
# fresh clone with CPython 3.11 or newer, cargo, make and a C compiler, nothing else is prepared.
#
# Variables: PYTHON (the interpreter for the virtual environment), VENV (where that lies),
# CARGO_TARGET_DIR (as for cargo), PYTEST_ARGS and DEMO_ARGS (passed on).

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV ?= .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
install_extra = $(PY) -c 'import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	  print(*project["optional-dependencies"]["$(1)"], sep="\n")' | $(PIP) -r /dev/stdin
RUST_SOURCES := $(shell find rust -name target -prune -o \( -name '*.rs' -o -name Cargo.toml \) -print 2>/dev/null)

.PHONY: help
help: ## What can be made
	@sed -nE 's/^([a-z][a-z-]*):[^#]*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

.PHONY: run
run: $(VENV)/.built ## Set everything up and run the demonstration on this machine's own data
	$(VENV)/bin/pagemerge demo $(DEMO_ARGS)

.PHONY: test
test: $(VENV)/.tested-with ## All tests: the Rust crates, then the Python package
	cargo test -p pagemerge-core
	cargo test --release -p pagemerge-sim
	cargo test --release -p pagemerge-linux
	cargo test --release -p pagemerge-linux --features inject --test injected --test regressions
	cargo test --release -p pagemerge-linux --features inject --test hostile -- known_key
	$(PY) -m pytest $(PYTEST_ARGS)

# Also a name of the shell's own, which is why it is given to commands as a number.
SECONDS := $(or $(SECONDS),60)
TORTURE_ARGS = --seconds $(SECONDS) $(addprefix --seed ,$(SEED))

.PHONY: torture
torture: $(VENV)/.tested-with ## Everything at once, for SECONDS=60; SEED=n chooses as that run did; ONLY= and WITHOUT= actors
	cargo test --release -p pagemerge-linux --test torture --no-run
	$(PY) tests/torture_numpy.py $(TORTURE_ARGS) & numpy=$$!; trap "kill $$numpy 2>/dev/null || true" EXIT; \
	  cargo test --release -p pagemerge-linux --test torture -- $(TORTURE_ARGS) \
	    $(addprefix --only ,$(ONLY)) $(addprefix --without ,$(WITHOUT)); \
	  wait $$numpy

.PHONY: lint
lint: $(VENV)/.linted-with ## Formatting, clippy, ruff, mypy, and the stub against the built module
	@cargo fmt --version >/dev/null 2>&1 && cargo clippy --version >/dev/null 2>&1 || { \
	  echo "make lint needs rustfmt and clippy: rustup component add rustfmt clippy" >&2; exit 1; }
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	cargo clippy -p pagemerge-linux --all-targets --features inject -- -D warnings
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy python/pagemerge
	cd $(VENV) && bin/python -m mypy.stubtest pagemerge._core --mypy-config-file ../pyproject.toml

.PHONY: sim
sim: ## The seeded simulator alone; PAGEMERGE_SIM_SEED=n replays one seed
	cargo test --release -p pagemerge-sim -- --nocapture

.PHONY: soak
soak: $(VENV)/.tested-with ## Everything around a program that could disturb merging, SECONDS=n for each
	PAGEMERGE_STRESS_SECONDS=$(or $(SECONDS),600) cargo test --release -p pagemerge-linux --test surroundings
	PAGEMERGE_STRESS_SECONDS=$(or $(SECONDS),600) $(PY) -m pytest tests/test_allocators.py

.PHONY: faults
faults: ## Faults at every call and panics in every phase, all of them, and the table of sites (15 minutes)
	PAGEMERGE_FAULTS=all PAGEMERGE_STRESS_SECONDS=$${PAGEMERGE_STRESS_SECONDS:-60} \
	  cargo test --release -p pagemerge-linux --features inject --test injected

.PHONY: build
build: $(VENV)/.built ## The package, built and importable in the virtual environment

.PHONY: format
format: $(VENV)/.linted-with ## Format all Rust and Python files
	cargo fmt --all
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix-only .

.PHONY: clean
clean: ## Remove the virtual environment and everything built
	rm -rf $(VENV)
	cargo clean

# The virtual environment. Some distributions split ensurepip off; then the outer pip fills in.
$(VENV)/.made:
	@command -v cargo >/dev/null || { \
	  echo "cargo was not found: install Rust (https://rustup.rs)" >&2; exit 1; }
	@found=; for python in $(PYTHON) python3 python3.14 python3.13 python3.12 python3.11; do \
	  if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    found=$$python; break; fi; \
	done; \
	[ -n "$$found" ] || { \
	  echo "no CPython 3.11 or newer was found: install one, or say PYTHON=/path/to/python" >&2; \
	  exit 1; }; \
	if "$$found" -c 'import ensurepip, venv' 2>/dev/null; then \
	  "$$found" -m venv --clear $(VENV); \
	elif "$$found" -c 'import pip, venv' 2>/dev/null; then \
	  "$$found" -m venv --clear --without-pip $(VENV); \
	  "$$found" -m pip --python $(VENV)/bin/python install --quiet pip; \
	else \
	  echo "$$found has neither ensurepip nor pip, so no virtual environment can be made:" \
	    "install python3-venv (Debian, Ubuntu) or python3-pip" >&2; exit 1; \
	fi
	$(PIP) 'maturin>=1.9.4,<2'
	@touch $@

# maturin runs cargo, which builds only what has changed; the stamp saves asking it.
$(VENV)/.built: $(VENV)/.made pyproject.toml Cargo.toml $(RUST_SOURCES)
	VIRTUAL_ENV=$(abspath $(VENV)) $(VENV)/bin/maturin develop --release
	@touch $@

# What tests and lint need besides, as pyproject.toml lists it.
$(VENV)/.tested-with: $(VENV)/.built
	$(call install_extra,test)
	@touch $@

$(VENV)/.linted-with: $(VENV)/.built
	$(call install_extra,lint)
	@touch $@
