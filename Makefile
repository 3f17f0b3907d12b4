# make serve and make test do all their own set-up; a second run skips it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready

# What Python compiles is kept, whatever the machine is set to: every process under test would compile torch anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: gpu-report setup serve test test-all lint types format

serve: $(READY)
	$(BIN)/mixtral-serve serve serve_config.yaml

# Two at a time, the longest first: what servers under test wait for, others compute in. One pytest per folder:
# tests/dist forks, which no process with Ray or a used thread pool may do.
FOLDERS := cluster unit e2e dist
CHECKS := lint $(FOLDERS:%=tests-%) types

test: $(READY)
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target $(CHECKS)

test-all: export MIXTRAL_TEST_ALL := 1
test-all: test

# Threads that wait for each other sleep: on cores with other work to do they would mostly burn it.
tests-%: export OMP_WAIT_POLICY := passive
tests-%: $(READY)
	$(BIN)/pytest -q tests/$*

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(READY)
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

setup: $(READY)

# Anew whenever what is to be installed changes. torch by pip, which takes whatever wheel the machine is configured to
# find. All else by uv, in a third of the time; by pip where there is no uv, or where it finds no way, as with a mirror
# that only pip was told of.
# Nothing is byte-compiled here: Python does it as it imports, and four files of five are never imported.
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-compile -c constraints.txt
$(READY): pyproject.toml constraints.txt $(wildcard model/native/*.[ch])
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch uv || $(PIP) torch
	UV_DEFAULT_INDEX=$${UV_DEFAULT_INDEX:-$$PIP_INDEX_URL} \
		$(BIN)/uv pip install -q --python $(BIN)/python -c constraints.txt -e ".[dev]" || $(PIP) -e ".[dev]"
	touch $(READY)

# On a machine with a GPU, its own Python with torch, triton, transformers and pytest: no network, no virtual environment.
# Tests that fail, hang or take too long do not keep the bench from running; together they end within ten minutes.
TESTS_WITHIN ?= 4m
BENCH_WITHIN_S ?= 260
REPORT ?= docs/gpu
gpu-report:
	timeout --foreground --signal=INT --kill-after=30s $(TESTS_WITHIN) \
		$(PYTHON) -m pytest -c tests/gpu/pytest.ini tests/gpu; tested=$$?; \
	$(PYTHON) -m tests.bench.bench_gpu --within $(BENCH_WITHIN_S) --out $(REPORT) && exit $$tested
