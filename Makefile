# Every command of this project. A command first makes what it needs in .venv of this folder, so a fresh clone needs
# nothing but make and Python 3.11 or newer.
#
#   PYTHON=/path/to/python3.12   the interpreter to make .venv from, when there is none yet
#   ARGS='-k attention -n 0'     passed on by test and golden (to pytest) and by demo
#   BENCH=benchmarks/NAME.py     the benchmark to run, instead of all of them
#   FUZZ=graphs                  the fuzzer of tests/fuzz/ to run, instead of all of them; ARGS go to it

PYTHON ?=
ARGS ?=
BENCH ?= $(sort $(wildcard benchmarks/*.py))

CANDIDATES := $(or $(PYTHON),python3 python3.14 python3.13 python3.12 python3.11)
VENV_PYTHON := .venv/bin/python
INSTALL := $(VENV_PYTHON) -m pip install --quiet --disable-pip-version-check --editable
DEMO := torch,text,chat,gguf,tvm
FUZZ ?= graphs artifacts gguf_files safetensors_files onnx_nodes shardings config_keys
DRIVERS := mesa-vulkan-drivers pocl-opencl-icd
BOUNDED := tiny cli from_torch torch_operators torch_arena gguf templates serving memory_placement kernel_cache session \
  trainer safetensors onnx_import onnx_export_files image_tasks sentencepiece
FOLDERS := backends files frontends ir models passes runtime

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test lint golden docs bench fuzz first-hour bounds drivers dev clean .typecheck

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s%s\n", $$1, $$2}' Makefile

demo: .venv/ready-$(DEMO) ## see a model declared, compiled, inspected and run on real weights
	@$(VENV_PYTHON) -m treadle.demo $(ARGS)

test: .venv/ready-test ## run all tests
	@PYTHONDONTWRITEBYTECODE= $(VENV_PYTHON) -m pytest -n auto --maxprocesses 4 $(ARGS)

lint: dev ## check style, format, types and plain English
	@$(VENV_PYTHON) -m ruff check
	@$(VENV_PYTHON) -m ruff format --check
	@$(VENV_PYTHON) -m mypy
	@$(VENV_PYTHON) -m tests.plain_english

golden: .venv/ready-test ## rewrite the golden files from what is printed now; then read the diff
	@$(VENV_PYTHON) -m pytest --update-golden $(ARGS)

docs: .venv/ready-docs ## write the API reference to build/docs, from docstrings
	@$(VENV_PYTHON) docs/api_reference.py build/docs

bench: .venv/ready-test ## run the benchmarks
	@for file in $(BENCH); do echo "== $$file"; $(VENV_PYTHON) $$file || exit 1; done

fuzz: .venv/ready-test ## draw random graphs and damaged files, thousands of each
	@for name in $(FUZZ); do echo "== $$name"; $(VENV_PYTHON) -m tests.fuzz.$$name $(ARGS) || exit 1; done

first-hour: $(VENV_PYTHON) ## run the commands of docs/own-models.md from a new clone in a new environment
	@$(VENV_PYTHON) tests/first_hour.py $(ARGS)

bounds: $(VENV_PYTHON) ## install the lowest versions that pyproject.toml allows, in build/bounds, and run some tests
	@rm -rf build/bounds && $(VENV_PYTHON) -m venv build/bounds
	@build/bounds/bin/python -m pip install --quiet --disable-pip-version-check uv
	@build/bounds/bin/python -m uv pip install --quiet --python build/bounds/bin/python --resolution lowest-direct \
	  --editable '.[bounds]'
	@PYTHONDONTWRITEBYTECODE= build/bounds/bin/python -m pytest -n auto --maxprocesses 4 $(BOUNDED:%=tests/test_%.py) $(ARGS)

drivers: ## install drivers that compute on the CPU, for tests of WebGPU and OpenCL (Debian, as root)
	@dpkg-query -W $(DRIVERS) >/dev/null 2>&1 || { apt-get -qq update && \
	  apt-get -qq install -y --no-install-recommends $(DRIVERS); }

dev: .venv/ready-dev .typecheck ## make the environment for working on Treadle (editors find it in .venv)

clean: ## remove caches and build output; .venv stays
	rm -rf build dist *.egg-info .typecheck .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name .venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# An environment with the extras of its name. It is made again when pyproject.toml is newer.
.venv/ready-%: pyproject.toml $(VENV_PYTHON)
	@echo "installing treadle[$*] into .venv (the first time takes some minutes)"
	@$(VENV_PYTHON) -m pip --version >/dev/null 2>&1 || $(VENV_PYTHON) -m ensurepip
	@$(INSTALL) '.[$*]' 2>.venv/pip-errors || { \
	  if grep -q 'NewConnectionError\|NameResolutionError\|ConnectTimeoutError\|ProxyError' .venv/pip-errors; then \
	    echo "the package index cannot be reached, so treadle[$*] is not installed" >&2; \
	    echo "  received  pip's messages, in .venv/pip-errors" >&2; \
	    echo "  try       the network, or pip's own settings ($(VENV_PYTHON) -m pip config list)" >&2; \
	    exit 1; \
	  fi; \
	  if [ '$*' = '$(DEMO)' ] && grep -q 'No matching distribution\|ResolutionImpossible' .venv/pip-errors; then \
	    echo "torch or TVM has no wheel for this platform; installing the demo without both"; \
	    exec $(INSTALL) '.[text,chat,gguf]'; \
	  fi; \
	  cat .venv/pip-errors >&2; \
	  exit 1; \
	}
	@touch $@

$(VENV_PYTHON):
	@for python in $(CANDIDATES); do \
	  if $$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "making .venv from $$python"; \
	    exec $$python -m venv --clear .venv; \
	  fi; \
	done; \
	echo "no Python 3.11 or newer with venv and ensurepip" >&2; \
	for python in $(CANDIDATES); do \
	  echo "  received  $$python: $$($$python --version 2>&1 | head -n 1)" >&2; \
	done; \
	echo "  try       make $(or $(MAKECMDGOALS),test) PYTHON=/path/to/python3.11" >&2; \
	echo "            (on Debian and Ubuntu, venv and ensurepip are in the package python3-venv)" >&2; \
	exit 1

# The package as type checkers can follow it: links, laid anew each time since files come and go.
.typecheck:
	@rm -rf .typecheck && mkdir -p .typecheck/treadle
	@for path in $(filter-out treadle/__pycache__,$(wildcard treadle/*)) $(FOLDERS); do ln -s ../../$$path .typecheck/treadle/; done
