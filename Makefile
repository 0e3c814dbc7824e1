# Two commands are enough: `make quickstart` and `make test`. Each sets up .venv by itself.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
ALONE := tests/test_ray_faults.py  # holds recoveries to seconds, so that nothing runs beside it

.PHONY: quickstart test soak check audit bench clean

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
	@code=0; \
	$(BIN)/python -m pytest $(ALONE) || code=1; \
	$(BIN)/python -m pytest --ignore $(ALONE) -n 2 --dist loadfile --no-loadscope-reorder || code=1; \
	exit $$code

soak: $(STAMP)  ## runs, studies and reports killed at sixty-five random moments, models compiled as users do, a million rows
	@$(BIN)/python -m pytest -m soak

check: $(STAMP) audit  ## lint, format, types, and what audit finds
	@$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/pyright

audit: $(STAMP)  ## known holes in the packages that are installed, where the network allows to ask
	@said="$$($(BIN)/pip-audit --skip-editable --progress-spinner off 2>&1)"; code=$$?; \
	case "$$said" in \
		*requests.exceptions.*) echo "pip-audit: no network, so nothing was looked up";; \
		*) echo "$$said" | grep -v "could not be audited"; \
			echo "$$(echo "$$said" | grep -c "could not be audited") packages are not known where they were looked up"; \
			exit $$code;; \
	esac

bench: $(STAMP)  ## figures of this machine, some from data/esc10 (see the README): a table on the screen, JSON beside the scripts
	@for script in $(filter-out $(addprefix benchmarks/,contest.py compare.py few_shot.py mislabelled.py),$(wildcard benchmarks/*.py)); do $(BIN)/python $$script || exit 1; done

clean:  ## what the commands above made; your own data, runs and studies stay
	rm -rf .venv data/synth data/synth-packed studies/quickstart-* runs/quickstart-*
