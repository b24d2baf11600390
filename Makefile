# Two commands on a fresh machine with python3 >= 3.10 and a package index: `make demo` and `make test`.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: help demo test lint parity planted clean

help:
	@echo "make demo     install, train on images that come with the package, show what was learned"
	@echo "make test     install, run the tests"
	@echo "make lint     ruff and mypy"
	@echo "make parity   remake the tables of what other libraries compute (installs them)"
	@echo "make planted  plant every known defect and see that a test finds it"
	@echo "make clean    remove the virtual environment and the demo's files"

demo: $(VENV)/installed
	@$(BIN)/python -m data2vec_vision demo demo --seed $(or $(SEED),0)

test: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

parity: $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[parity]'
	OMP_NUM_THREADS=1 $(BIN)/python tests/parity/make.py

planted: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python tests/planted.py

clean:
	rm -rf $(VENV) demo

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "python3 >= 3.10 is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(BIN)/python setup.cfg pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/installed-dev: $(BIN)/python setup.cfg pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@ $(VENV)/installed
