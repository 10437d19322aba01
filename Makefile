# `make demo` and `make test` need nothing but Python 3.10 to 3.13 and make; PYTHON=... chooses which one.
VENV ?= .venv
PYTHON ?=
BIN := $(VENV)/bin
# One stamp per interpreter asked for: another PYTHON makes the environment anew.
STAMP := $(VENV)/.installed$(subst /,_,$(PYTHON))
# What failed is repeated once, alone: on a busy machine tests of time limits fail beside others. No failure to repeat,
# as after an error at the start, is an error too.
ALONE := $(BIN)/pytest --last-failed --last-failed-no-failures none
# Three processes for two cores, because many tests wait for time to pass.
WORKERS ?= $(shell expr $$(getconf _NPROCESSORS_ONLN) \* 3 / 2)
PINS := pyproject.toml constraints.txt scripts/install.sh

.PHONY: demo test slow check matrix corners bench docs release-check format lock clean
.NOTPARALLEL:

demo: $(STAMP)-local  ## the quickstart: a small language model gets better instructions
	$(BIN)/python examples/quickstart.py

test: $(STAMP)-dev  ## style, types and the fast tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -m "not slow" -n $(WORKERS) --dist loadfile || $(ALONE) -m "not slow"

slow: $(STAMP)-dev  ## the tests that take more than a few seconds
	$(BIN)/pytest -m slow -n auto --dist loadfile || $(ALONE) -m slow

check: test slow corners  ## what CI runs

matrix: $(STAMP)-dev  ## the tests on DSPy 3.0 to 3.4, Optuna 4 and 5, Python 3.10 to 3.13; ROWS="3.0 tools" for some
	UV=$(BIN)/uv scripts/matrix.sh $(ROWS)

corners: $(STAMP)-dev  ## of the matrix the oldest and the newest versions, and the tools that people hook up
	ANY_PYTHON=1 UV=$(BIN)/uv scripts/matrix.sh 3.4 oldest tools

docs: $(STAMP)-docs  ## the site, in site/; a broken link or example fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q
	$(BIN)/pytest -q tests/test_docs.py

release-check: $(STAMP)-dev  ## sdist and wheel, their metadata, and README's code from the wheel in an empty environment
	$(BIN)/python scripts/release_check.py

format: $(STAMP)-dev  ## let ruff put the sources into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: $(STAMP)-dev  ## pin the newest versions that fit, for Python 3.10 to 3.13 at once
	$(BIN)/uv pip compile -q --universal --python-version 3.10 --all-extras --upgrade --strip-extras \
		--no-annotate --custom-compile-command "make lock" -o constraints.txt pyproject.toml

bench: $(STAMP)-dev  ## most tables of docs/benchmarks.md, not scaling.py's and those with options; about an hour, alone
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/search_efficiency.py
	$(BIN)/python benchmarks/utilization.py

clean:
	rm -rf $(VENV) site .matrix .mypy_cache .pytest_cache .ruff_cache .hypothesis dist

$(STAMP)-local: $(PINS)
	PYTHON="$(PYTHON)" scripts/install.sh $(VENV) local
	touch $@

$(STAMP)-dev: $(PINS)
	PYTHON="$(PYTHON)" scripts/install.sh $(VENV) local,dev
	touch $@ $(STAMP)-local

$(STAMP)-docs: $(PINS)
	PYTHON="$(PYTHON)" scripts/install.sh $(VENV) local,dev,docs
	touch $@ $(STAMP)-dev $(STAMP)-local
