# Every target does its own set-up, on a fresh machine too. Another interpreter: make test PYTHON=python3.12.
# More words for a command: make bench ARGS="--model vit_large_patch16_224 --batch-size 1,64".
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
# 0 leaves out the compilation of the C++ extension before make bench and make test.
BUILD ?= 1

RUN := $(VENV)/bin/python -P -m
READY := $(VENV)/.setup
TRITON36 := $(VENV)/triton-3.6.0

.PHONY: help bench test test-full mutants gpu lint aot setup extension wheel clean

help:
	@echo "make bench   benchmark vit_fast against timm eager and torch.compile on this machine; results in out/"
	@echo "make test    all tests: plain and GPU, interpreted kernels, kernels compiled ahead of time"
	@echo "make test-full   the same with thousands of random cases (SEED=n: others) and every mutant, under an hour"
	@echo "make mutants break the kernels in every small way and see that a test notices (ARGS=--help tells more)"
	@echo "make gpu     on a GPU: limits, tests, all benchmarks, profiles, tuning, into benchmarks/results/ (ARGS=--help tells more)"
	@echo "            ARGS=--first-look: the most telling of it in 8 minutes; ARGS=--models-table: models alone, in 5"
	@echo "make aot     compile every kernel ahead of time and compare with the ledger (ARGS=--update rewrites it)"
	@echo "make lint    ruff check, ruff format --check, mypy"
	@echo "make extension   compile the C++ library for CPU tensors (ARGS=--cuda or --cutlass: those for GPUs too); bench and test do it, BUILD=0 not"
	@echo "make wheel   a wheel with the CPU library inside, in dist/"
	@echo "make setup   only the virtual environment, $(VENV)"
	@echo "make clean   remove $(VENV), out/ and caches"

setup: $(READY)

extension: $(READY)
	$(RUN) vit_fast build $(ARGS)

# A wheel with the CPU library inside, for this machine's platform; it fits every Python and every torch from 2.11 on.
wheel: $(READY)
	VIT_FAST_BUILD_EXT=1 $(RUN) pip wheel --no-deps --no-build-isolation --wheel-dir dist .

$(READY): pyproject.toml setup.py constraints.txt .ci/setup .ci/torchvision_schemas.py
	@PYTHON="$(PYTHON)" VENV="$(VENV)" bash .ci/setup

# The second Triton that the ahead-of-time tests compile with; not where packages are borrowed (perhaps offline).
$(TRITON36)/.setup: $(READY)
	@if [ -z "$$(find $(VENV) -name borrowed.pth)" ] && [ "$$(uname -s)" = Linux ]; then \
	    $(RUN) pip install -qq --no-deps --upgrade --target $(TRITON36) triton==3.6.0; fi
	@mkdir -p $(TRITON36) && touch $@

bench: $(READY)
	@mkdir -p out
	@BUILD="$(BUILD)" PYTHON="$(VENV)/bin/python" bash .ci/extension
	$(RUN) vit_fast bench --results-file out/bench.json --plot out/bench.png $(ARGS)

test: $(READY) $(TRITON36)/.setup
	@BUILD="$(BUILD)" PYTHON="$(VENV)/bin/python" bash .ci/extension
	@PYTHON="$(VENV)/bin/python" TRITON36="$(TRITON36)" bash .ci/test

test-full: $(READY) $(TRITON36)/.setup
	@BUILD="$(BUILD)" PYTHON="$(VENV)/bin/python" bash .ci/extension
	@VIT_FAST_DEPTH=full VIT_FAST_SEED="$(or $(SEED),0)" PYTHON="$(VENV)/bin/python" TRITON36="$(TRITON36)" bash .ci/test

mutants: $(READY)
	$(VENV)/bin/python -P tests/mutation/run.py $(ARGS)

gpu: $(READY)
	$(VENV)/bin/python -P benchmarks/gpu.py $(ARGS)

aot: $(READY) $(TRITON36)/.setup
	VIT_FAST_TRITON36="$$([ -d $(TRITON36)/triton ] && echo $(CURDIR)/$(TRITON36))" \
	    $(VENV)/bin/python -P tests/aot/ledger.py --all $(ARGS)
	$(VENV)/bin/python -P tests/csrc/cuda_ledger.py --all $(ARGS)
	$(VENV)/bin/python -P tests/csrc/cutlass_ledger.py --all $(ARGS)

lint: $(READY)
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy

clean:
	rm -rf $(VENV) out build dist vit_fast/_lib .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
