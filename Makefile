# You need Python >= 3.11 and make; everything else is installed into .venv.
PYTHON ?= python3
VENV = .venv/bin/python
DATASET ?= pathmnist
SIZE ?= 28
BENCH = throughput scaling startup summary
.PHONY: bench demo report test lint

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	@echo "installing PyTorch and other packages into .venv: some minutes, several GB"
	$(VENV) -m pip install --quiet --editable '.[demo,dev,export]' --constraint constraints.txt
	touch $@

demo: .venv/installed  ## a small study of all tasks on generated tiles, into demo/
	$(VENV) -m study --dataset phantom --size 28 --data_root demo/data --output_dir demo --wandb disabled

report: .venv/installed  ## the study of a data set: run what is missing, then write report.md
	$(VENV) -m study --dataset $(DATASET) --size $(SIZE)

bench: .venv/installed  ## measure speed, into bench/results/ and docs/speed.md: an hour on a quiet machine
	for name in $(BENCH); do $(VENV) -m bench.$$name || exit 1; done

test: .venv/installed
	$(VENV) -m pytest

lint: .venv/installed
	$(VENV) -m ruff check .
	$(VENV) -m ruff format --check .
	$(VENV) -m mypy
