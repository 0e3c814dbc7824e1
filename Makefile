# Two commands are enough: `make quickstart` and `make test`. Each sets up .venv by itself.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: quickstart test soak check bench clean

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "meamtm needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Name another one: make PYTHON=/path/to/python3")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

quickstart: $(STAMP)  ## tune, train and test on the built-in sounds
	@$(BIN)/meamtm synth data/synth
	@$(BIN)/meamtm pack data/synth data/synth-packed
	@$(BIN)/python -m tune configs/tune/quickstart.yaml

test: $(STAMP)  ## every test, real Ray and MLflow included
	@$(BIN)/python -m pytest -n 2 --dist loadfile

soak: $(STAMP)  ## processes and machines killed, again and again
	@$(BIN)/python -m pytest -m faults

check: $(STAMP)  ## lint, format, types
	@$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/pyright

bench: $(STAMP)  ## figures of this machine: a table on the screen, JSON beside the scripts
	@for script in $(filter-out benchmarks/contest.py,$(wildcard benchmarks/*.py)); do $(BIN)/python $$script || exit 1; done

clean:  ## everything that the commands above made, runs and data sets included
	rm -rf .venv data runs studies mlflow.db mlartifacts
