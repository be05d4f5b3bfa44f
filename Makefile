# `make help` lists the targets. Everything runs in .venv, which `make venv` builds from requirements/cpu.txt.

SHELL := /bin/bash

# One thread: FBGEMM's and torch's OpenMP barriers make two threads on two busy cores up to 20 times slower than one.
export OMP_NUM_THREADS := 1

VENV   := .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.installed
LOCK   := requirements/cpu.txt

# Which Python builds .venv (`make venv PYTHON=/path/to/python`); empty: the first of these that runs and is new
# enough. 3.11 first: the lock was made with it.
PYTHON ?=
PYTHONS := $(if $(PYTHON),$(PYTHON),python3.11 python3.12 python3.13 python3 python)

# PyTorch's index of CPU builds, used where it answers: without it PyPI's torch is the CUDA build. See $(LOCK).
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
# Anything else pip needs where you are, say PIP_FLAGS="--proxy http://...".
PIP_FLAGS ?=

# What ruff and mypy look at, of what is there.
SOURCES := $(wildcard torchrec_slipstream examples benchmarks)

.PHONY: help venv demo test test-versions bench plots lint format clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 24

venv: $(STAMP)  ## set up .venv (again only when the lock or pyproject.toml changed)

# The stamp is written last, so an install that broke off is done again.
$(STAMP): $(LOCK) pyproject.toml
	@set -euo pipefail; \
	check='import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))'; \
	python=; \
	for p in $(PYTHONS); do "$$p" -c "$$check" >/dev/null 2>&1 && { python=$$p; break; }; done; \
	if [ -z "$$python" ]; then \
	    echo "make venv: none of '$(PYTHONS)' is Python 3.11 or newer with the venv module." >&2; \
	    echo "Install one (Debian: apt-get install python3.11-venv), or name it: make venv PYTHON=/path/to/python" >&2; \
	    exit 1; \
	fi; \
	rm -f $(STAMP); \
	if ! $(PY) -c "$$check" >/dev/null 2>&1; then \
	    echo "make venv: $(VENV) with $$($$python -V)"; \
	    rm -rf $(VENV); "$$python" -m venv $(VENV); \
	fi; \
	flags="$(PIP_FLAGS)"; \
	if $(PY) -c "import urllib.request as u; u.urlopen('$(TORCH_INDEX)/torch/', timeout=5)" >/dev/null 2>&1; then \
	    flags="$$flags --extra-index-url $(TORCH_INDEX)"; \
	fi; \
	pip="$(PY) -m pip --disable-pip-version-check install --quiet --no-deps $$flags"; \
	echo "make venv: installing $(LOCK)"; \
	$$pip -r $(LOCK) 2> >(grep -v "^WARNING: Location .* is ignored" >&2); \
	$$pip --no-build-isolation -e .; \
	if ! $(PY) -c 'import torch, fbgemm_gpu, torchrec' 2>$(VENV)/import.log; then \
	    cat $(VENV)/import.log >&2; \
	    echo "make venv: torch, fbgemm_gpu and torchrec are installed but do not load together (above)." >&2; \
	    echo "The likely cause is PyPI's CUDA build of torch, because $(TORCH_INDEX)" >&2; \
	    echo "did not answer. Name an index that has the CPU build: make venv TORCH_INDEX=..." >&2; \
	    exit 1; \
	fi; \
	touch $(STAMP)

demo: venv  ## train a DLRM with and without stale-update skipping, side by side (about two minutes)
	$(PY) examples/train_dlrm.py --compare

test: venv  ## run the tests
	$(PY) -m pytest -q

# VERSIONS="1.6.1 1.9.2" for some only, PYTEST="tests/tbe -x" for pytest, JOBS=2 for two at a time, TABLE=FILE for the
# table, ENVIRONMENTS="DIR ..." for virtual environments that are there instead.
VERSIONS ?= 1.6.1 1.7.0 1.8.0 1.9.2
PYTEST   ?=
JOBS     ?= 1
TABLE    ?=
ENVIRONMENTS ?=

test-versions: venv  ## run the tests on each torchrec that is supported (ten minutes each)
	$(PY) -m tests.versions --versions $(VERSIONS) --pytest="$(PYTEST)" --jobs $(JOBS) $(if $(TABLE),--markdown "$(TABLE)") \
	    $(if $(ENVIRONMENTS),--environments $(ENVIRONMENTS)) \
	    --make "TORCH_INDEX=$(TORCH_INDEX)" "PIP_FLAGS=$(PIP_FLAGS)"

bench: venv  ## run every benchmark that a laptop can (a quarter of an hour)
	@[ -s benchmarks/laptop.txt ] || { echo "make bench: benchmarks/laptop.txt lists no question" >&2; exit 1; }
	@failed=; while read -r question; do \
	    echo "=== python -m benchmarks.$$question ($$SECONDS s so far)"; \
	    $(PY) -W ignore -m benchmarks.$$question </dev/null || failed="$$failed $${question%% *}"; \
	done <benchmarks/laptop.txt; \
	echo "=== $$SECONDS s; failed:$${failed:- none}"; [ -z "$$failed" ]

plots: venv  ## draw docs/bench/ from the rows in benchmarks/data/
	$(PY) -m benchmarks.plots

lint: venv  ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy $(SOURCES)

format: venv  ## let ruff mend what it can
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:  ## remove .venv and the caches
	rm -rf $(VENV) build .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
