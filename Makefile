# Two words a newcomer needs: `make demo`. Each target does what it needs first; nothing is done twice.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

comma  := ,

.DEFAULT_GOAL := help
.PHONY: help install demo report test lint atlas clean

help:
	@echo "make demo     correct one fact in the bundled model and look at everything around it"
	@echo "make report   300 edits in a row under five methods, measured from all sides: report.html (DATA=folder: general ability too)"
	@echo "make test     all tests            make lint    ruff, mypy, import directions"
	@echo "make atlas    rebuild the bundled world and model (an hour; goes on where it was stopped)"
	@echo "make install  the package and its tools into $(VENV)         make clean   remove what make made (not .atlas)"

install: $(STAMP)

# Only when what is to be installed has changed. Always through the constraints: an unpinned torch brings gigabytes with it.
$(STAMP): pyproject.toml constraints.txt
	@if [ ! -x $(BIN)/python ]; then \
	  for python in "$(PYTHON)" python3.13 python3.12 python3.11; do \
	    if "$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then found="$$python"; break; fi; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo "error: errata needs Python 3.11 or later with venv, and neither $(PYTHON) nor python3.11 to python3.13 is one;" \
	         "install one and run: make PYTHON=/path/to/python3" >&2; exit 1; \
	  fi; \
	  echo "creating $(VENV) with $$("$$found" --version)"; "$$found" -m venv $(VENV) || { rm -rf $(VENV); exit 1; }; \
	fi
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: install
	$(BIN)/errata demo

# Stopped at any moment, it goes on. With DATA (a folder with ability/cola.json …) it is another run, in a folder of its own.
DATA    ?= $(ERRATA_DATA)
RUNS    := .report$(if $(DATA),-ability)
ABILITY := $(if $(DATA),--also perplexity$(comma)ability$(comma)drift$(comma)fluency$(comma)extended --data-dir $(DATA) --set ability.limit=40)
report: install
	@set -e; cores=$$(getconf _NPROCESSORS_ONLN); for recipe in locft sequence; do \
	  OMP_NUM_THREADS=1 $(BIN)/errata bench recipes/report/$$recipe.yaml --workers $$cores --out $(RUNS)/$$recipe --resume $(ABILITY); \
	done
	$(BIN)/errata report $(RUNS)/sequence $(RUNS)/locft --to report.html

# Two workers of one thread each: more threads than cores makes small tensors slower, not faster.
test: install
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

atlas: install
	$(BIN)/python -m errata.data.atlas.train --out .atlas $(ARGS)
	rm -rf src/errata/data/atlas/model/*.json src/errata/data/atlas/model/*.safetensors
	cp .atlas/model/* src/errata/data/atlas/model/
	$(BIN)/python benchmarks/tracing.py --to docs/atlas-tracing.png
	$(BIN)/errata eval --model atlas --data atlas

clean:
	rm -rf $(VENV) .report .report-ability report.html build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
