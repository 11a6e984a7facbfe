# Two commands do everything: `make demo` and `make test`. Set-up happens by itself, in .venv.
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -ec
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
SOURCES := nbs tests data setup.py
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.NOTPARALLEL:
.PHONY: help demo test coverage lab docs setup export format clean-notebooks readme check-step
.DEFAULT_GOAL := help

help:  ## these lines
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 24

demo: setup  ## train Self-Flow and flow matching on digits, compare them, write runs/quickstart/report.html
	@$(BIN)/selfflow notebook nbs/studies/quickstart.ipynb runs/quickstart/quickstart.ipynb
	@echo; cat runs/quickstart/summary.txt
	@echo "Report: runs/quickstart/report.html    Notebook: runs/quickstart/quickstart.ipynb"
	@echo "To look around in JupyterLab: make lab"

test: setup  ## in step, form, types, every notebook executed, all tests
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES) selfflow
	@# the types and the step keep one core busy each
	@$(BIN)/mypy > .venv/types 2>&1 & types=$$!; failed=0; \
	  $(MAKE) --no-print-directory check-step || failed=1; \
	  wait $$types || failed=1; cat .venv/types; exit $$failed
	@# one worker more than cores: those with a browser mostly wait
	$(BIN)/pytest -n 3 --durations 25

# Of every process that tests and notebooks start, but for those that are killed: see pyproject.toml.
coverage: setup  ## lines and branches of the package that tests and notebooks reach
	@rm -rf .venv/covered
	export COVERAGE_FILE=$(CURDIR)/.venv/covered/data; mkdir .venv/covered; failed=0; \
	  $(BIN)/coverage run -m pytest -n 2 || failed=1; \
	  $(BIN)/coverage combine -q; $(BIN)/coverage report; exit $$failed

lab: setup  ## JupyterLab on nbs/, at the workbench
	@# in a container the user is often root, whom Jupyter refuses by default
	GOMP_SPINCOUNT=1000 $(BIN)/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) \
	  --LabApp.default_url=/lab/tree/studies/workbench.ipynb nbs

# Sphinx reads a copy of nbs/, in which the site's own pages lie beside the notebooks.
docs: setup .venv/.docs  ## the site: notebooks and API as pages, in _docs/html; links are checked
	@mkdir -p _docs && find _docs -mindepth 1 -maxdepth 1 ! -name html -exec rm -r {} +
	@cp -Rp nbs/* nbs/_site/*.md nbs/_site/api _docs
	$(BIN)/sphinx-build -q -W --keep-going -j auto -c nbs/_site _docs _docs/html
	SELFFLOW_SITE=_docs/html $(BIN)/pytest tests/test_docs.py
	@echo "The site: _docs/html/index.html"

.venv/.docs: settings.ini | setup
	$(BIN)/python -m pip install -q -e '.[docs]'
	@touch $@

export: setup format clean-notebooks readme  ## format, then notebooks to package and README
	$(BIN)/nbdev_export

format: setup  ## ruff: imports in order, 88 columns
	$(BIN)/ruff check --select I --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

clean-notebooks: setup  ## drop metadata that changes from run to run
	$(BIN)/nbdev_clean

# README.md is nbs/index.ipynb; its links lead from nbs/ to the top, the README's start there.
TO_README = jupyter nbconvert --log-level=ERROR --to markdown --stdout nbs/index.ipynb \
  | sed -e 's\#](\.\./\#](\#g' -e 's\#](studies/\#](nbs/studies/\#g' -e 's\#](\([0-9]\)\#](nbs/\1\#g'
readme: setup
	@$(BIN)/$(TO_README) > .venv/readme && cp .venv/readme README.md

# Cleaning and exporting must change nothing. It is tried on a copy: a test never touches your files.
check-step: setup
	@rm -rf .venv/step && mkdir .venv/step && cp -R nbs selfflow README.md settings.ini .venv/step
	@cd .venv/step && PATH="$(CURDIR)/$(BIN):$$PATH" && nbdev_clean && nbdev_export && $(TO_README) > README.md
	@differ=0; for part in nbs selfflow README.md; do \
	    diff -rq -x __pycache__ -x .ipynb_checkpoints $$part .venv/step/$$part || differ=1; done; \
	  [ $$differ = 0 ] || { echo "Notebooks, package and README are not in step (see above). 'make export' makes package and README from the"; \
	       echo "notebooks; if you edited a module by hand, '.venv/bin/nbdev_update' first carries that into its notebook."; exit 1; }
	@echo "notebooks, package and README are in step"

setup: $(READY)

STEP = { echo; echo "Set-up failed at step $(1)."; echo "$(2)"; exit 1; }
$(READY): settings.ini setup.py pyproject.toml
	@echo "set-up 1 of 4: Python 3.11 or newer"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || $(call STEP,1 of 4: Python 3.11 or newer,Install one and name it: make PYTHON=python3.12 ...)
	@echo "set-up 2 of 4: a virtual environment in .venv"
	@$(PYTHON) -m venv .venv \
	  || $(call STEP,2 of 4: python -m venv,On Debian and Ubuntu: apt-get install python3-venv. Then run make again.)
	@echo "set-up 3 of 4: installing (PyTorch is large: 2 to 4 minutes)"
	@$(BIN)/python -m pip install -q -e '.[dev]' \
	  || $(call STEP,3 of 4: pip install,See the message above: mostly the network or a full disk (8 GB are needed). Then run make again.)
	@echo "set-up 4 of 4: does it import?"
	@$(BIN)/python -c 'import torch, selfflow' \
	  || $(call STEP,4 of 4: import torch,Remove .venv and run make again.)
	@touch $(READY)
