# Two commands do everything: `make demo` and `make test`. Set-up happens by itself, in .venv.
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -ec
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test lab setup export clean-notebooks readme check-step
.DEFAULT_GOAL := help

help:  ## these lines
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 24

demo: setup  ## train Self-Flow and flow matching on digits, compare them, write runs/quickstart/report.html
	@$(BIN)/selfflow notebook nbs/studies/quickstart.ipynb runs/quickstart/quickstart.ipynb
	@echo; cat runs/quickstart/summary.txt
	@echo "Report: runs/quickstart/report.html    Notebook: runs/quickstart/quickstart.ipynb"
	@echo "To look around in JupyterLab: make lab"

test: setup check-step  ## notebooks and package in step, ruff, every notebook executed, all tests
	$(BIN)/ruff check selfflow tests setup.py
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2
	$(BIN)/pytest

lab: setup  ## JupyterLab on nbs/
	$(BIN)/jupyter lab nbs

export: setup clean-notebooks readme  ## notebooks to package and README
	$(BIN)/nbdev_export

clean-notebooks: setup  ## drop metadata that changes from run to run
	$(BIN)/nbdev_clean

README ?= README.md
readme: setup
	@$(BIN)/jupyter nbconvert --log-level=ERROR --to markdown --stdout nbs/index.ipynb \
	  | sed 's#](\.\./#](#g' > .venv/readme && cp .venv/readme $(README)

# Cleaning and exporting must change nothing: the notebooks are the source, and the package is what they give.
SNAPSHOT = find nbs selfflow README.md -type f -not -path '*/__pycache__/*' -not -path '*/.ipynb_checkpoints/*' \
	| LC_ALL=C sort | xargs sha256sum
check-step: setup
	@$(SNAPSHOT) > .venv/before
	@$(MAKE) --no-print-directory -s export
	@$(SNAPSHOT) > .venv/after
	@diff .venv/before .venv/after > .venv/step || { sed -n 's/^[<>] [0-9a-f]*/  changed:/p' .venv/step | sort -u; \
	  echo "Notebooks, package and README were not in step. They are now (make export was run): look, and commit."; exit 1; }
	@echo "notebooks, package and README are in step"

setup: $(READY)

STEP = { echo; echo "Set-up failed at step $(1)."; echo "$(2)"; exit 1; }
$(READY): settings.ini setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || $(call STEP,1 of 3: Python 3.11 or newer,Install one and name it: make PYTHON=python3.12 ...)
	@echo "set-up 1 of 3: a virtual environment in .venv"
	@$(PYTHON) -m venv .venv \
	  || $(call STEP,2 of 3: python -m venv,On Debian and Ubuntu: apt-get install python3-venv. Then run make again.)
	@echo "set-up 2 of 3: installing (PyTorch is large: 2 to 4 minutes)"
	@$(BIN)/python -m pip install -q -e '.[dev]' \
	  || $(call STEP,3 of 3: pip install,See the message above: mostly the network or a full disk (8 GB are needed). Then run make again.)
	@$(BIN)/python -c 'import torch, selfflow' \
	  || $(call STEP,3 of 3: import torch,Remove .venv and run make again.)
	@echo "set-up 3 of 3: done"
	@touch $(READY)
