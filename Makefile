# `make demo` and `make test` need Python >= 3.11 and make; everything else they install into .venv.
PYTHON ?= python3
VENV = .venv/bin/python
.PHONY: demo test lint

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	@echo "installing PyTorch and the rest into .venv: minutes, several GB"
	$(VENV) -m pip install --quiet --editable '.[demo,dev]' --constraint constraints.txt
	touch $@

demo: .venv/installed  ## Task 1 on the generated phantom, into demo/: about three minutes on two cores
	$(VENV) task1.py --dataset phantom --size 28 --data_root demo/data --output_dir demo --wandb disabled
	@echo "open the figures above; every record is in demo/runs/"

test: .venv/installed
	$(VENV) -m pytest

lint: .venv/installed
	$(VENV) -m ruff check .
	$(VENV) -m ruff format --check .
	$(VENV) -m mypy
