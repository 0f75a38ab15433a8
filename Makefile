# `make reproduce` makes every result of config/config.yaml, `make test` runs the tests; both set up .venv first.
# Without a GPU, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu spares the download of CUDA.

SHELL := bash
PYTHON ?= python3
READY := .venv/.ready
IN_VENV := source .venv/bin/activate &&

.PHONY: reproduce test lint smoke figures fuzz audit

reproduce: $(READY)
	$(IN_VENV) snakemake --cores all

test: $(READY)
	$(IN_VENV) pytest --numprocesses auto --maxprocesses 4 --dist loadfile

lint: $(READY)
	$(IN_VENV) ruff check
	$(IN_VENV) ruff format --check
	$(IN_VENV) snakefmt --check --line-length 120 Snakefile rules
	$(IN_VENV) mypy
	$(IN_VENV) snakemake --lint

fuzz: $(READY)
	$(IN_VENV) FUZZ=10000 pytest --numprocesses auto --maxprocesses 4 --timeout 1800 tests/test_fuzz.py

audit:
	PYTHON=$(PYTHON) .ci/audit

smoke: $(READY)
	$(IN_VENV) snakemake --cores all --configfile config/smoke.yaml

figures: $(READY)
	$(IN_VENV) snakemake --cores all figures

$(READY): requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed; name one: make PYTHON=python3.11 $(MAKECMDGOALS)")'
	$(PYTHON) -m venv .venv
	$(IN_VENV) python -m pip install --requirement requirements.lock
	$(IN_VENV) python -m pip install --no-build-isolation --no-deps --editable .
	touch $@
