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
	cargo test --release -p pagemerge-alloc
	cargo test --release -p pagemerge-linux --features inject --test injected --test regressions --test quick
	cargo test --release -p pagemerge-linux --features inject --test hostile -- known_key
	$(MAKE) --no-print-directory replay loom
	$(PY) -m pytest $(PYTEST_ARGS)

# Also a name of the shell's own, which is why it is given to commands as a number.
SECONDS := $(or $(SECONDS),60)
TORTURE_ARGS = --seconds $(SECONDS) $(addprefix --seed ,$(SEED))

.PHONY: torture
torture: $(VENV)/.tested-with ## Everything at once, for SECONDS=60; SEED=n chooses as that run did; ONLY= and WITHOUT= actors
	cargo test --release -p pagemerge-linux --test torture --no-run
	$(PY) tests/torture_numpy.py $(TORTURE_ARGS) & numpy=$$!; \
	  $(PY) tests/torture_store.py $(TORTURE_ARGS) & store=$$!; \
	  trap "kill $$numpy $$store 2>/dev/null || true" EXIT; \
	  cargo test --release -p pagemerge-linux --test torture -- $(TORTURE_ARGS) \
	    $(addprefix --only ,$(ONLY)) $(addprefix --without ,$(WITHOUT)); \
	  wait $$numpy; wait $$store

.PHONY: lint
lint: $(VENV)/.linted-with ## Formatting, clippy, ruff, mypy, and the stub against the built module
	@cargo fmt --version >/dev/null 2>&1 && cargo clippy --version >/dev/null 2>&1 || { \
	  echo "make lint needs rustfmt and clippy: rustup component add rustfmt clippy" >&2; exit 1; }
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	cargo clippy -p pagemerge-linux --all-targets --features inject -- -D warnings
	cargo fmt --manifest-path fuzz/Cargo.toml --check
	cargo clippy --manifest-path fuzz/Cargo.toml --all-targets -- -D warnings
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy python/pagemerge
	cd $(VENV) && bin/python -m mypy.stubtest pagemerge._core --mypy-config-file ../pyproject.toml

# A few minutes for each of them; BENCH_ARGS go to the first: --mib 128 --cases runs16,unique
.PHONY: bench
bench: $(VENV)/.benched-with ## Everything measured beside ksmd, malloc and memcached (45 minutes; as root); docs/bench.png, .svg; BENCH_ARGS
	mkdir -p $(OUT)/bench
	$(PY) benches/rivals.py --json $(OUT)/bench/rivals.json --plot docs $(BENCH_ARGS)
	$(PY) benches/latency.py --json $(OUT)/bench/latency.json
	$(PY) benches/neighbour.py --json $(OUT)/bench/neighbour.json
	$(PY) benches/scale.py --json $(OUT)/bench/scale.json
	$(PY) benches/hugepages.py --json $(OUT)/bench/hugepages.json
	$(PY) benches/allocator.py --json $(OUT)/bench/allocator.json
	$(PY) benches/store.py --json $(OUT)/bench/store.json
	$(PY) benches/cache_server.py --json $(OUT)/bench/cache_server.json
	$(PY) -m pytest benches --benchmark-json $(OUT)/bench/surface.json
	cargo bench -p pagemerge-core -p pagemerge-linux

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

# ---- Fuzzing, sanitizers, interleavings. What needs compiler flags that stable compilers keep locked
# takes a toolchain named nightly where there is one, and else unlocks them in the one there is.

UNLOCKED := $(shell rustup run nightly rustc --version >/dev/null 2>&1 && echo "cargo +nightly" || echo "env RUSTC_BOOTSTRAP=1 cargo")
HOST = $(shell rustc -vV | sed -n 's/^host: //p')
# Build products that share nothing with an ordinary build.
OUT = $(or $(CARGO_TARGET_DIR),target)
TARGETS := core_model rbtree proc_text settings alloc_ops
TARGET ?= $(TARGETS)
FUZZ_SECONDS = $(if $(filter command,$(origin SECONDS)),$(SECONDS),1200)
# Only one of the targets can meet unsafe code, and `make asan` runs that.
SANITIZER ?= none
FUZZ_TOOLS := $(abspath $(OUT))/fuzz-tools
FUZZ = env PATH="$(FUZZ_TOOLS)/bin:$$PATH" CARGO_TARGET_DIR=$(abspath $(OUT))/fuzz \
	  PYO3_PYTHON=$(abspath $(PY)) PYTHONPATH="$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
	  $(UNLOCKED) fuzz

.PHONY: fuzz-tools
fuzz-tools: $(VENV)/.built
	@command -v c++ >/dev/null || { echo "make fuzz needs a C++ compiler, for libFuzzer" >&2; exit 1; }
	@command -v cargo-fuzz >/dev/null || test -x $(FUZZ_TOOLS)/bin/cargo-fuzz || \
	  cargo install --locked --root $(FUZZ_TOOLS) cargo-fuzz || { \
	  echo "make fuzz needs cargo-fuzz, and it could not be installed" >&2; exit 1; }

.PHONY: fuzz
fuzz: fuzz-tools ## Fuzz for SECONDS (1200) each target, or TARGET only: core_model rbtree proc_text settings alloc_ops
	@# What is new goes beside the build; make fuzz-keep brings it back. What fails is in fuzz/artifacts.
	for target in $(TARGET); do \
	  mkdir -p $(OUT)/fuzz/corpus/$$target; \
	  $(FUZZ) run --fuzz-dir fuzz -s $(SANITIZER) $$([ $$target = settings ] && echo "--features python") $$target \
	    $(abspath $(OUT))/fuzz/corpus/$$target $(abspath fuzz)/corpus/$$target -- \
	    -max_total_time=$(FUZZ_SECONDS) -max_len=1024 -timeout=120 -print_final_stats=1; \
	done

.PHONY: fuzz-keep
fuzz-keep: fuzz-tools ## Make the committed inputs the fewest that reach what all inputs reach
	for target in $(TARGET); do \
	  rm -rf $(OUT)/fuzz/fewest && mkdir -p $(OUT)/fuzz/fewest $(OUT)/fuzz/corpus/$$target; \
	  $(FUZZ) run --fuzz-dir fuzz -s $(SANITIZER) $$([ $$target = settings ] && echo "--features python") $$target \
	    $(abspath $(OUT))/fuzz/fewest $(abspath $(OUT))/fuzz/corpus/$$target $(abspath fuzz)/corpus/$$target -- \
	    -merge=1 -max_len=1024 -set_cover_merge=1 -use_value_profile=0; \
	  rm -rf fuzz/corpus/$$target && mkdir fuzz/corpus/$$target; \
	  ls -S -r $(OUT)/fuzz/fewest | sed -n '1,200s|^|$(OUT)/fuzz/fewest/|p' | xargs cp -t fuzz/corpus/$$target; \
	done

.PHONY: replay
replay: ## Run the committed inputs of the fuzz targets, without the fuzzer
	cargo test --release --manifest-path fuzz/Cargo.toml

.PHONY: loom
loom: ## Go through every interleaving of the threads' hand-offs; LOOM_MAX_PREEMPTIONS=n (3)
	RUSTFLAGS="--cfg loom" CARGO_TARGET_DIR=$(OUT)/loom cargo test --release -p pagemerge-linux --test loom_stop

.PHONY: miri
miri: ## The algorithm and the simulator in the Miri interpreter, where the toolchain has it
	@$(UNLOCKED) miri --version >/dev/null 2>&1 || { \
	  echo "make miri was not run: $$($(UNLOCKED) --version) has no Miri" \
	    "(rustup component add miri --toolchain nightly); make asan and make valgrind stand in" >&2; exit 1; }
	MIRIFLAGS=-Zmiri-disable-isolation PROPTEST_CASES=4 PAGEMERGE_SEEDS=0..2 \
	  $(UNLOCKED) miri test -p pagemerge-core --lib --tests
	MIRIFLAGS=-Zmiri-disable-isolation PAGEMERGE_SIM_SEED=1 $(UNLOCKED) miri test -p pagemerge-sim --test contract

.PHONY: asan
asan: ## The Rust tests with AddressSanitizer (live memory: what runs in one process)
	RUSTFLAGS="-Zsanitizer=address" CARGO_TARGET_DIR=$(OUT)/asan \
	  $(UNLOCKED) test --release --target $(HOST) -p pagemerge-core -p pagemerge-sim --lib --tests
	@# Under it mlock does nothing, locals may lie outside of the stack, and memory limits and figures are
	@# used up by its own: tests of those are left out.
	RUSTFLAGS="-Zsanitizer=address" ASAN_OPTIONS=detect_leaks=0 CARGO_TARGET_DIR=$(OUT)/asan \
	  $(UNLOCKED) test --release --target $(HOST) -p pagemerge-linux --lib --test smoke --test findings -- \
	  --skip each_kind_of_memory --skip mlock --skip f03 --skip f11_memory --skip f13 --skip f14

.PHONY: valgrind
valgrind: ## The algorithm's own tests in valgrind's memcheck
	@command -v valgrind >/dev/null || { echo "make valgrind was not run: there is no valgrind" >&2; exit 1; }
	PROPTEST_CASES=8 PAGEMERGE_SEEDS=0..4 \
	  CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER="valgrind -q --error-exitcode=99 --leak-check=full --show-leak-kinds=definite --errors-for-leak-kinds=definite" \
	  CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="valgrind -q --error-exitcode=99 --leak-check=full --show-leak-kinds=definite --errors-for-leak-kinds=definite" \
	  cargo test -p pagemerge-core --lib --tests

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
	VIRTUAL_ENV=$(abspath $(VENV)) $(VENV)/bin/maturin develop --profile dist
	@touch $@

# What tests and lint need besides, as pyproject.toml lists it.
$(VENV)/.tested-with: $(VENV)/.built
	$(call install_extra,test)
	@touch $@

$(VENV)/.benched-with: $(VENV)/.built
	$(call install_extra,test)
	$(call install_extra,bench)
	@touch $@

$(VENV)/.linted-with: $(VENV)/.built
	$(call install_extra,lint)
	@touch $@
