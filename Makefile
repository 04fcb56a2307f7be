# Each target makes .venv and installs what it needs on first use; see CONTRIBUTING.md for the test tiers.
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PYTHON ?=
ARGS ?=
# One process per core, one thread each; a file's tests stay together because they share what they build.
FAST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slow and not evidence" -n auto --dist loadfile

.PHONY: help install lint format test test-all evidence demo clean
.DEFAULT_GOAL := help

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 12

install: $(INSTALLED)  ## make .venv (PYTHON=/path/to/python to choose one)

$(INSTALLED): pyproject.toml .ci/install
	@.ci/install $(VENV) $(PYTHON)
	@touch $@

lint: $(INSTALLED)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)  ## let ruff fix and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: lint  ## lint and the fast tests
	$(FAST) $(ARGS)

test-all: $(INSTALLED)  ## all tests short of hours: also vLLM, Ray, notebooks, a smoke of the demo
	$(FAST) $(ARGS)
	$(BIN)/python -m pytest -v -m "slow and not evidence" --durations=15 $(ARGS)

evidence: $(INSTALLED)  ## hours: three seeds, long fuzz, benchmarks
	$(BIN)/python -m pytest -v -m evidence $(ARGS)
	$(BIN)/python benchmarks/evidence.py --jobs 2 --overlapped $(ARGS)
	$(BIN)/python benchmarks/train_step.py --visual-tokens 512 2000 8192 --generations 4 8 16 --out docs/performance
	$(BIN)/python benchmarks/rollout_speed.py --out docs/performance
	$(BIN)/python benchmarks/whole_steps.py --out docs/performance
	$(BIN)/python benchmarks/reward_speed.py
	$(BIN)/python benchmarks/bench.py
	$(BIN)/python benchmarks/plan_check.py

demo: $(INSTALLED)  ## the whole path on phantoms: SFT, GRPO, benchmark, report
	$(BIN)/reasonknee demo --config configs/demo.yaml $(ARGS)

clean:  ## remove .venv and tool caches; runs/ stays
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
