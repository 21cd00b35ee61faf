# Everything a person or a machine runs on this repository. `make help` lists the targets.
#
# A clean machine needs python3 (3.11 or newer, with the venv module and headers), make and a C++17 compiler
# (gcc >= 11 or clang >= 14). Everything else, cmake and ninja included, comes from pip into $(VENV).

PYTHON      ?= python3
VENV        ?= .venv
JOBS        ?= $(shell nproc)
PYTEST_ARGS ?=
BENCH_ARGS  ?=

BIN        := $(VENV)/bin
PIP        := $(BIN)/python -m pip
CMAKE      := $(abspath $(BIN))/cmake
CTEST      := $(abspath $(BIN))/ctest
INSTALLED  := $(VENV)/.kt_sft-installed
DEVELOP    := $(VENV)/.kt_sft-develop
CXX_BUILD  := build/cxx
TIDY_BUILD := build/tidy

CXX_SOURCES := $(shell find csrc -name '*.cc' -o -name '*.cpp')
CXX_HEADERS := $(shell find csrc -name '*.h' -o -name '*.inl')
NATIVE      := CMakeLists.txt $(shell find csrc -type f)
PY_DIRS     := kt_sft scripts tests
CXX_TESTS   := -DKT_SFT_PYTHON=OFF -DKT_SFT_TESTS=ON

# qemu-x86_64 warns of what it lacks of its models in every thread; none of it matters here.
HASWELL := Haswell,-pcid,-x2apic,-tsc-deadline,-hle,-invpcid,-rtm

# ThreadSanitizer of gcc 12 cannot place its shadow memory when the kernel randomises addresses over 32 bits.
FIXED_ADDRESSES := $(shell setarch $$(uname -m) -R true 2>/dev/null && echo "setarch $$(uname -m) -R")

# The build needs the virtual environment's cmake, ninja and python, whatever the machine has.
export PATH := $(abspath $(BIN)):$(PATH)
# pip's own notices are noise here.
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install quickstart example walkthrough test test-cxx test-python test-emulated lint format sanitize bench clean distclean

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-14s %s\n", $$1, $$2 }' Makefile

# --- install ---------------------------------------------------------------------------------------------------------

$(BIN)/python:
	@$(PYTHON) -c 'import ensurepip, os, sysconfig, venv; os.stat(sysconfig.get_path("include") + "/Python.h")' || \
	  { echo "$(PYTHON) lacks venv or its headers; on Debian and Ubuntu: apt-get install python3-venv python3-dev"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The build tools come first: --no-build-isolation lets a rebuild after a change in csrc/ reuse build/ and take seconds.
$(INSTALLED): pyproject.toml constraints.txt $(NATIVE) | $(BIN)/python
	$(PIP) install --quiet "scikit-build-core>=0.10" "pybind11>=2.12" cmake ninja
	$(PIP) install --quiet -c constraints.txt --no-build-isolation -e . torchvision torchaudio
	@touch $@

$(DEVELOP): $(INSTALLED)
	$(PIP) install --quiet -c constraints.txt --no-build-isolation -e ".[test,lint]"
	@touch $@

install: $(INSTALLED)  ## Create .venv and install kt_sft with everything it needs
	@echo "kt_sft is installed in $(VENV); run '. $(BIN)/activate' to use llamafactory-cli from your shell"

# --- run -------------------------------------------------------------------------------------------------------------

quickstart: $(INSTALLED)  ## From nothing to a tuned model, compared with stock LLaMA-Factory
	$(BIN)/python scripts/quickstart.py

# It asks over HTTP with the openai client, which the tests bring.
example: $(DEVELOP)  ## Train LoRA on experts, reload it in plain PEFT, merge, serve, ask
	$(BIN)/python scripts/expert_lora_example.py

walkthrough: $(INSTALLED)  ## Plan, quantize, train, export and chat, from an FP8 and an MXFP4 checkpoint
	$(BIN)/python scripts/walkthrough.py

bench: $(INSTALLED)  ## Measure the expert engine on this machine
	$(BIN)/kt-sft bench $(BENCH_ARGS)

# --- check -----------------------------------------------------------------------------------------------------------

test: test-cxx test-python  ## Run the C++ and the Python tests

test-cxx: $(INSTALLED)  ## Build and run the C++ tests; check what each tier's unit exports
	$(CMAKE) -S . -B $(CXX_BUILD) -G Ninja $(CXX_TESTS)
	$(CMAKE) --build $(CXX_BUILD) -j $(JOBS)
	$(BIN)/python scripts/check_tier_symbols.py $(CXX_BUILD)
	$(CTEST) --test-dir $(CXX_BUILD) -j $(JOBS) --no-tests=error --output-on-failure

test-python: $(DEVELOP)  ## Run the Python tests, without network
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive \
	  $(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(PYTEST_ARGS)

# One static program, on CPUs that this machine is not: needs Debian's g++-aarch64-linux-gnu and qemu-user.
test-emulated: $(INSTALLED)  ## Run the C++ tests under qemu: aarch64, x86 without AVX-512, x86 without AVX
	@(for tool in aarch64-linux-gnu-g++ qemu-aarch64 qemu-x86_64; do command -v $$tool >/dev/null || exit 1; done) || \
	  { echo "this needs: apt-get install g++-aarch64-linux-gnu qemu-user"; exit 1; }
	$(CMAKE) -S . -B build/aarch64 -G Ninja $(CXX_TESTS) -DKT_SFT_STATIC=ON -DCMAKE_SYSTEM_NAME=Linux \
	  -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DCMAKE_CXX_FLAGS=-Wno-psabi
	$(CMAKE) --build build/aarch64 -j $(JOBS)
	qemu-aarch64 build/aarch64/csrc/kt_sft_tests --quick --best=portable
	$(CMAKE) -S . -B build/static -G Ninja $(CXX_TESTS) -DKT_SFT_STATIC=ON
	$(CMAKE) --build build/static -j $(JOBS)
	qemu-x86_64 -cpu $(HASWELL) build/static/csrc/kt_sft_tests --quick --best=avx2
	qemu-x86_64 -cpu Nehalem build/static/csrc/kt_sft_tests --quick --best=portable

lint: $(DEVELOP)  ## Run ruff, mypy, clang-format and clang-tidy
	$(BIN)/ruff check $(PY_DIRS)
	$(BIN)/ruff format --check $(PY_DIRS)
	$(BIN)/mypy kt_sft
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES) $(CXX_HEADERS)
	$(CMAKE) -S . -B $(TIDY_BUILD) -G Ninja -DKT_SFT_TESTS=ON -DCMAKE_EXPORT_COMPILE_COMMANDS=ON \
	  -DPython_EXECUTABLE=$(abspath $(BIN))/python -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir)
	printf '%s\n' $(CXX_SOURCES) | xargs -P $(JOBS) -n 1 $(BIN)/clang-tidy -p $(TIDY_BUILD) --quiet

format: $(DEVELOP)  ## Rewrite Python and C++ sources in the project's format
	$(BIN)/ruff check --fix $(PY_DIRS)
	$(BIN)/ruff format $(PY_DIRS)
	$(BIN)/clang-format -i $(CXX_SOURCES) $(CXX_HEADERS)

sanitize: $(INSTALLED)  ## Run the C++ tests under ASan + UBSan, then under TSan
	$(CMAKE) -S . -B build/asan -G Ninja $(CXX_TESTS) -DCMAKE_BUILD_TYPE=RelWithDebInfo -DKT_SFT_SANITIZE=address,undefined
	$(CMAKE) --build build/asan -j $(JOBS)
	UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
	  $(CTEST) --test-dir build/asan --no-tests=error --output-on-failure
	$(CMAKE) -S . -B build/tsan -G Ninja $(CXX_TESTS) -DCMAKE_BUILD_TYPE=RelWithDebInfo -DKT_SFT_SANITIZE=thread
	$(CMAKE) --build build/tsan -j $(JOBS)
	TSAN_OPTIONS=halt_on_error=1 \
	  $(FIXED_ADDRESSES) $(CTEST) --test-dir build/tsan --no-tests=error --output-on-failure

# --- clean -----------------------------------------------------------------------------------------------------------

clean:  ## Remove what was built; keep .venv and saves/
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f $(INSTALLED) $(DEVELOP)
	find kt_sft scripts tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## Remove .venv as well
	rm -rf $(VENV)
