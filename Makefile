# Everything sets itself up: a virtual environment in .venv, the project with its extras, the built-in data.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# pip compiles what it has installed on one core, for a minute; all cores do it after it. (Templates do not compile.)
INSTALL = $(BIN)/pip install --quiet --no-compile
COMPILE = $(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
export OMP_NUM_THREADS ?= 1
export DS_ACCELERATOR ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo cuda || echo cpu)

.PHONY: demo test lint types imports bench kernels docs clean

demo: $(VENV)/.train
	OMP_NUM_THREADS=$(shell env -u OMP_NUM_THREADS nproc 2>/dev/null || echo 2) $(BIN)/compt train emoji --run-dir runs/demo
	$(BIN)/compt report runs/demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

imports: $(VENV)/.dev
	$(BIN)/lint-imports

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks

kernels: $(VENV)/.train
	$(BIN)/python -m compt_kernels.build

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "make: $(PYTHON) is older than 3.11; try: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	@touch $@

$(VENV)/.train: $(VENV)/.python pyproject.toml
	$(INSTALL) --editable '.[train]'
	$(COMPILE)
	@touch $@

$(VENV)/.dev: $(VENV)/.python pyproject.toml
	$(INSTALL) --editable '.[train,data,llm,dev]'
	$(COMPILE)
	@touch $@ $(VENV)/.train

docs: $(VENV)/.python
	$(BIN)/pip install --quiet 'mkdocs-material>=9.5'
	$(BIN)/mkdocs build

clean:
	rm -rf $(VENV) build dist runs .pytest_cache .mypy_cache .ruff_cache
