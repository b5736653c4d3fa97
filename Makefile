# The commands of this project. Each sets up what it needs in .venv; a second run reuses it.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# The CPU build of torch. On a GPU machine: make TORCH="torch" demo, or install torch into .venv beforehand.
TORCH ?= torch==2.13.0
SOURCES := setup.py pyproject.toml $(wildcard csrc/*)

.PHONY: demo demo-chat test test-fast test-lowest check mutants bench setup clean help

help:
	@echo "make demo         the whole pipeline on two cores: corpus, tokenizer, training, Hugging Face export, text"
	@echo "make demo-chat    after make demo: SFT and DPO of its model, and replies"
	@echo "make test         all tests"
	@echo "make test-fast    those that are not marked slow: under two minutes on two cores"
	@echo "make test-lowest  the same with the lowest version of every dependency, in .venv-lowest; for a clean clone"
	@echo "make check        ruff, mypy and the test of the layers"
	@echo "make mutants      whether the tests notice small edits of the sources (ONLY=model: one list of them)"
	@echo "make bench        the benchmarks that need no GPU"
	@echo "make clean        removes what was built (.venv and runs/ too)"

demo: setup
	$(BIN)/python examples/quickstart/demo.py

demo-chat: setup
	$(BIN)/python examples/quickstart/chat_demo.py

test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-fast: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

# The extension is compiled in place, against this torch: not for a clone whose .venv is in use.
test-lowest:
	$(PYTHON) .ci/lowest_versions.py pyproject.toml > lowest.txt
	PIP_CONSTRAINT="$(CURDIR)/lowest.txt" $(MAKE) test-fast VENV=.venv-lowest TORCH=torch

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layers.py

mutants: setup
	$(BIN)/python -m tests.mutants.run --only "$(ONLY)"

bench: setup
	@set -e; for benchmark in $(filter-out benchmarks/gpu_check.py,$(wildcard benchmarks/*.py)); do echo "== $$benchmark"; $(BIN)/python "$$benchmark"; done

setup: $(VENV)/.ready

$(VENV)/.ready: $(SOURCES)
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) is not here. Install Python 3.11 with its headers (Debian: apt-get install python3.11 python3.11-venv python3.11-dev), or name another: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is older than 3.11. Name a newer one: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "error: $(PYTHON) cannot make virtual environments. Debian: apt-get install python3.11-venv"; exit 2; }
	@test -n "$$STEEL_NO_EXT" || command -v $${CXX:-g++} >/dev/null || { echo "error: there is no C++ compiler ($${CXX:-g++}). Debian: apt-get install g++. Or do without the compiled kernels: STEEL_NO_EXT=1 make $(MAKECMDGOALS)"; exit 2; }
	@test -n "$$STEEL_NO_EXT" || $(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || { echo "error: the headers of $(PYTHON) (Python.h) are not here. Debian: apt-get install python3.11-dev"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "setting up $(VENV) (a few minutes the first time)"
	@# What building the extension and the packages without wheels needs, as they are built against this very torch.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)" setuptools wheel ninja pybind11
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --editable ".[dev]"
	@# transformers' own tests, out of its source distribution; one test runs them.
	@$(BIN)/python -m tests.hf.suite || echo "transformers' own tests are not here: that test will be skipped"
	@touch $@

clean:
	rm -rf $(VENV) .venv-lowest lowest.txt build dist *.egg-info runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find steel_megatron -name '*.so' -delete
