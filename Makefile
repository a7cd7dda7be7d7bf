# SPDX-License-Identifier: Apache-2.0
# Everything runs in .venv, which is made at first need. A torch >= 2.13 of the active environment is reused; otherwise
# the pinned one is installed.
PYTHON ?= python3
DEMO_ARGS ?= --minutes 4 --name demo
TEST_ARGS ?=
BENCH_ARGS ?=
CUDA_ARGS ?=
GPU_ARGS ?=

VENV := .venv/bin/python
NEEDS := $(PYTHON) build_support/make_venv.py
# Code for every CUDA architecture takes minutes. Where there is no GPU to run it, the demo does without, and the tests
# compile for one; both can be asked for in the environment.
NO_GPU := $(if $(shell command -v nvidia-smi),,yes)
DEMO_BUILD := $(if $(NO_GPU),DYNAMIC_MOE_CUDA=$${DYNAMIC_MOE_CUDA-0})
TEST_BUILD := $(if $(NO_GPU),TORCH_CUDA_ARCH_LIST=$${TORCH_CUDA_ARCH_LIST-8.0})
INSTALL := $(VENV) -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test check bench cuda-check gpu-check lint format wheel clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: ## train a small language model on the Python standard library and show the result (DEMO_ARGS)
	@$(NEEDS) build demo
	@echo "Building the extension" && $(DEMO_BUILD) $(INSTALL)
	$(VENV) examples/train_lm.py $(DEMO_ARGS)

test: ## build everything, run ctest and pytest at every CPU level that this machine has (TEST_ARGS)
	@$(NEEDS) build demo reproduce test
	@echo "Building the extension" && $(TEST_BUILD) $(INSTALL)
	$(VENV) tests/run_all.py $(TEST_ARGS)

check: ## lint, build and test what has changed, in under a minute; needs one `make test` before
	@$(NEEDS) build demo reproduce test lint
	@$(TEST_BUILD) $(VENV) tests/check.py

bench: ## measure against this machine's ceilings and other implementations (BENCH_ARGS)
	@$(NEEDS) build bench
	@echo "Building the extension" && $(DEMO_BUILD) $(INSTALL)
	$(VENV) -m benchmarks $(BENCH_ARGS)

cuda-check: ## compile the CUDA kernels for all architectures, judge the machine code, write docs/kernels.md (no GPU)
	@$(NEEDS) build cuda
	$(VENV) build_support/cuda_check.py $(CUDA_ARGS)

gpu-check: ## all tests and benchmarks that need a GPU, into build/gpu-report.md (GPU_ARGS)
	@$(NEEDS) build demo test bench
	$(VENV) build_support/gpu_check.py $(GPU_ARGS)

lint: ## ruff, mypy --strict, clang-format, clang-tidy
	@$(NEEDS) build demo reproduce test lint
	$(VENV) build_support/lint.py

format: ## let ruff and clang-format rewrite the sources
	@$(NEEDS) build demo reproduce test lint
	$(VENV) build_support/lint.py --fix

wheel: ## wheel and source distribution, into dist/
	@$(NEEDS) build package
	rm -rf build/lib.*
	$(VENV) -m build --no-isolation --sdist --wheel --outdir dist

clean: ## remove everything that was built, installed or measured
	rm -rf .venv build dist runs *.egg-info dynamic_moe/*.so .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
