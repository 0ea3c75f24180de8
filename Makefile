# Every target installs what it needs first; a second run installs nothing.
# PYTHON chooses the interpreter: make test PYTHON=python3.12
# TORCH=newest takes the newest PyTorch instead of the pinned one, in .venv-newest: make test TORCH=newest
.DEFAULT_GOAL := help
.PHONY: help install demo test test-fast lint format check-cuda real-check docs lock clean check-python

PYTHON ?= python3
BOOTSTRAP = $(PYTHON) scripts/bootstrap.py $(if $(filter newest,$(TORCH)),--newest-torch)
SOURCES = d2ext tests tools scripts setup.py docs/conf.py
CXX_SOURCES = $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
MODULES = $(shell find d2ext -name '*.py' ! -name '__main__.py' | sed 's|/__init__.py$$||; s|\.py$$||; s|/|.|g' | sort)
# Threads that wait for each other sleep instead of spinning: many times faster on a busy machine.
export OMP_WAIT_POLICY ?= PASSIVE
# Processes, each with one thread: on two cores faster than one process with two threads.
TEST_JOBS ?= 2
PYTEST_ARGS ?=
CUDA_ARCH ?= 8.0

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1|\2/' | column -t -s '|' 2>/dev/null \
	  || grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST)

install: check-python  ## create .venv (or use the active Detectron2), compile csrc/
	@$(BOOTSTRAP)

demo: check-python  ## train YOLACT on the built-in shapes on the CPU, evaluate, draw (minutes)
	@$(BOOTSTRAP) -- python scripts/run_demo.py

test: check-python  ## the whole test suite on the CPU; PYTEST_ARGS="-k name" for a part
	@OMP_NUM_THREADS=1 $(BOOTSTRAP) --dev -- python -m pytest -n $(TEST_JOBS) --dist loadfile --no-loadscope-reorder --timeout=300 $(PYTEST_ARGS)

test-fast: check-python  ## the part of the suite that takes under three minutes
	@$(MAKE) --no-print-directory test PYTEST_ARGS='-m "not slow" $(PYTEST_ARGS)'

lint: check-python  ## ruff, mypy and clang-format: changes nothing, fails on any finding
	@status=0; \
	$(BOOTSTRAP) --dev -- ruff check $(SOURCES) || status=1; \
	$(BOOTSTRAP) --dev -- ruff format --check $(SOURCES) || status=1; \
	$(BOOTSTRAP) --dev -- mypy || status=1; \
	test -z "$(CXX_SOURCES)" \
	  || $(BOOTSTRAP) --dev -- clang-format --dry-run --Werror $(CXX_SOURCES) || status=1; \
	exit $$status

format: check-python  ## let ruff and clang-format rewrite the sources
	@$(BOOTSTRAP) --dev -- ruff check --fix --exit-zero --quiet $(SOURCES)
	@$(BOOTSTRAP) --dev -- ruff format $(SOURCES)
	@test -z "$(CXX_SOURCES)" || $(BOOTSTRAP) --dev -- clang-format -i $(CXX_SOURCES)

check-cuda: check-python  ## compile csrc/ for one GPU architecture, CUDA_ARCH=8.0; needs nvcc, no GPU
	@$(BOOTSTRAP) -- env D2EXT_BUILD=cuda TORCH_CUDA_ARCH_LIST=$(CUDA_ARCH) \
	  python setup.py build_ext --build-temp build/check-cuda --build-lib build/check-cuda

real-check: check-python  ## a few training steps and an evaluation on real COCO images
	@$(BOOTSTRAP) -- python scripts/real_check.py

docs: check-python  ## the site, with the API from the docstrings, in output/docs
	@$(BOOTSTRAP) --dev -- sphinx-build -q -W --keep-going -d build/docs docs output/docs
	@$(BOOTSTRAP) --dev -- pdoc --docformat google --math -o output/docs/api $(MODULES)
	@echo "open output/docs/index.html"

lock:  ## renew the pinned versions in requirements/ (needs uv)
	@sh scripts/lock.sh

clean:  ## remove what was built; keeps .venv and output/
	rm -rf build dist *.egg-info .cache .pytest_cache .ruff_cache .mypy_cache d2ext/*.so
	find d2ext tests tools scripts -name __pycache__ -type d -prune -exec rm -rf {} +

check-python:
	@command -v $(PYTHON) >/dev/null 2>&1 || { \
	  echo "[d2ext] cannot go on: there is no '$(PYTHON)'. Install Python 3.10 or newer, or name one: make PYTHON=/path/to/python3 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "[d2ext] cannot go on: $(PYTHON) is $$($(PYTHON) --version 2>&1), d2ext needs Python 3.10 or newer: make PYTHON=python3.11 ..." >&2; exit 1; }
