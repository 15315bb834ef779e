# `make` installs the package, as a built wheel, into a virtual environment in this folder; `make help` lists the rest.
#
# LANE=declared (default): the versions that fairchem-core 1.10.0 declares (torch 2.4, numpy 1.26), in .venv
# LANE=current:            current ones (torch 2.13, numpy 2), in .venv-current

LANE ?= declared
PYTHON ?= $(or $(shell command -v python3.11),$(shell command -v python3.12),python3)
PIP_ARGS ?=
PYTEST_ARGS ?=
DEMO_ARGS ?=

ifeq ($(LANE),declared)
VENV := .venv
else ifeq ($(LANE),current)
VENV := .venv-current
else
$(error LANE must be 'declared' or 'current', found '$(LANE)')
endif

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PINS := requirements/$(LANE).txt
SOURCES := $(shell find fairchem_dens startup configs -type f -not -path '*/__pycache__/*') LICENSE README.md
# -P: the current folder stays off sys.path, so that the installed package is tested and not this folder.
# Files are spread over the cores, four at most: what a file sets up once stays with it.
PYTEST := $(BIN)/python -P -m pytest -q -n auto --maxprocesses 4 --dist loadfile

.DELETE_ON_ERROR:
.PHONY: install test test-slow demo docs lint format clean help

install: $(VENV)/installed

$(VENV)/created:
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 12) else f"Python 3.11 or 3.12 is needed, found {v[0]}.{v[1]}: set PYTHON=...")'
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

# The wheel is built in the environment that it is for; pip fetches the build backend by itself.
$(VENV)/wheel: pyproject.toml $(SOURCES) | $(VENV)/created
	rm -rf $(VENV)/dist
	$(PIP) wheel --quiet --no-deps $(PIP_ARGS) --wheel-dir $(VENV)/dist .
	@touch $@

# Only a change of the requirements comes here again.
$(VENV)/dependencies: $(PINS) pyproject.toml | $(VENV)/wheel
ifeq ($(LANE),declared)
	@echo "Installing the dependencies: minutes, and several GB where torch comes with CUDA."
	$(PIP) install $(PIP_ARGS) --constraint $(PINS) "$$(echo $(VENV)/dist/*.whl)[test]"
else
	@echo "Installing the dependencies: minutes, and several GB where torch comes with CUDA."
	$(PIP) install $(PIP_ARGS) --requirement $(PINS)
	$(PIP) install --quiet --no-deps $(PIP_ARGS) fairchem-core==1.10.0
endif
	@touch $@

$(VENV)/installed: $(VENV)/wheel $(VENV)/dependencies
	$(PIP) install --quiet --no-deps --force-reinstall $(VENV)/dist/*.whl
	@touch $@
	@echo "Installed into $(VENV): $(BIN)/fairchem and $(BIN)/fairchem-dens are ready."

test: install
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)

test-slow: install
	$(PYTEST) -m slow $(PYTEST_ARGS)

demo: install
	$(BIN)/fairchem-dens demo $(DEMO_ARGS)

.venv-docs/installed: requirements/docs.txt
	$(PYTHON) -m venv --clear .venv-docs
	.venv-docs/bin/python -m pip --disable-pip-version-check install --quiet $(PIP_ARGS) --requirement requirements/docs.txt
	@touch $@

# In an environment of its own, because the site needs none of the package. The variable silences an advertisement.
docs: .venv-docs/installed
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict --quiet
	@echo "Open site/index.html"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-current .venv-docs site build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

help:
	@echo "make             install into .venv (LANE=current: .venv-current)"
	@echo "make test        the fast tests, on the installed package (PYTEST_ARGS=... adds arguments)"
	@echo "make test-slow   the slow ones"
	@echo "make demo        train with and without DeNS on a generated data set (DEMO_ARGS=... adds arguments)"
	@echo "make docs        build the documentation into site/, strictly"
	@echo "make lint        ruff and mypy"
	@echo "make format      let ruff format the code"
	@echo "make clean       remove the environments and caches"
	@echo "PYTHON=...       the interpreter to build the environment with, 3.11 or 3.12"
	@echo "PIP_ARGS=...     arguments for pip, e.g. where to find wheels of torch"
