# You need Python >= 3.11 and make; everything else is installed into .venv.
PYTHON ?= python3
VENV = .venv/bin/python
FAST ?=
.PHONY: bench demo test lint

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	@echo "installing PyTorch and other packages into .venv: some minutes, several GB"
	$(VENV) -m pip install --quiet --editable '.[demo,dev]' --constraint constraints.txt
	touch $@

demo: .venv/installed  ## a small study on generated tiles, into demo/
	$(VENV) -m study --dataset phantom --size 28 --data_root demo/data --output_dir demo --wandb disabled

bench: .venv/installed  ## measure speed, into bench/results/ and docs/speed.md: 4 minutes on two quiet cores
	$(VENV) -m bench.throughput

test: .venv/installed  ## all tests, in two processes; FAST=1: without the slow ones
	OMP_NUM_THREADS=1 $(VENV) -m pytest -n 2 --dist loadfile $(if $(FAST),-m "not slow")

lint: .venv/installed
	$(VENV) -m ruff check .
	$(VENV) -m ruff format --check .
	$(VENV) -m mypy
