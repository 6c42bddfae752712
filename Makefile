# make demo    the main job on real photographs, with a report to look at: out/demo/report.html
# make test    the whole test suite
# Both set up what they need first (make setup): a .venv with pinned packages. Quick when that is done.

PYTHON ?= python3
TORCH := $(shell sed -n 's/^torch==//p' requirements/torch.txt)
# Without a GPU the CPU build is taken where pip knows an index that has it (its environment variables name one).

ifeq ($(OS),Windows_NT)
BIN := .venv/Scripts
else
BIN := .venv/bin
endif
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet

.PHONY: setup demo test lint docs golden clean

setup: .venv/ready

.venv/ready: requirements/dev.txt requirements/torch.txt pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'vistok needs Python 3.11 or newer; make PYTHON=... names another')"
	@echo "setting up .venv (once; a few minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@if command -v nvidia-smi > /dev/null 2>&1; then \
		$(PIP) torch==$(TORCH); \
	else \
		$(PIP) torch==$(TORCH)+cpu 2> /dev/null || $(PIP) torch==$(TORCH); \
	fi
	@$(PIP) -r requirements/dev.txt
	@$(PIP) --no-deps -e .
	@touch .venv/ready

demo: setup
	$(BIN)/python -m examples.demo

# One thread per worker: the models in the tests are too small to share.
test: export OMP_NUM_THREADS := 1
test: setup
	$(BIN)/python -m pytest -n auto --dist worksteal

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python docs/make_api.py --check
	$(BIN)/python docs/make_tables.py --check

# The API reference and the tables in the docs, from docstrings, the tree and result files.
docs: setup
	$(BIN)/python docs/make_api.py
	$(BIN)/python docs/make_tables.py

# The numbers that a clone without the parity cases is held to; run once parity has passed, and review the diff.
golden: setup
	$(BIN)/python -m tests.golden

clean:
	rm -rf .venv out build dist *.egg-info
