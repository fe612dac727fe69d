# `make help` lists what is here.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help install test-install demo test test-failed soak check bench bench-quick clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(BIN)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) --editable .
	@touch $@

$(BIN)/.installed-test: $(BIN)/.installed
	$(PIP) --editable '.[test]'
	@touch $@

install: $(BIN)/.installed ## make .venv with .venv/bin/hydralv-tune

test-install: $(BIN)/.installed-test ## the same with what the tests need

demo: $(BIN)/.installed ## the main job on a phantom: study, best config, report
	$(BIN)/hydralv-tune demo

test: $(BIN)/.installed-test ## every kind of test; what takes long is in the soak
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder --durations 60 -m "not slow"

test-failed: $(BIN)/.installed-test ## what failed last, once more and one at a time
	$(BIN)/python -m pytest --last-failed --last-failed-no-failures none -m "not slow"

soak: $(BIN)/.installed-test ## what takes long: 500 trials that crash and hang, random kills, all rows of slow tables
	$(BIN)/python -m pytest -m slow

check: $(BIN)/.installed-test ## lint, types and the import floors
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_floors.py

bench: $(BIN)/.installed-test ## every benchmark; lines with a target end in met or MISSED
	failed=; for script in benchmarks/[a-z]*.py; do \
	  echo "$$script"; $(BIN)/python $$script || failed="$$failed $$script"; done; \
	test -z "$$failed" || { echo "ended with an error or a limit:$$failed"; exit 1; }

bench-quick: $(BIN)/.installed-test ## the same with few steps, trials and voxels
	$(BIN)/python benchmarks/sweep.py --quick
	$(BIN)/python benchmarks/training.py --steps 10
	$(BIN)/python benchmarks/prediction.py --shape 24 240 240
	$(BIN)/python benchmarks/overhead.py --quick
	$(BIN)/python benchmarks/search.py --seeds 2
	$(BIN)/python benchmarks/phantom.py --minutes 1
	$(BIN)/python benchmarks/whole_volume.py --shape 50 256 256 --folder runs/whole_volume_quick
	-$(BIN)/python benchmarks/startup.py

clean: ## remove .venv and caches, keep runs/
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache
