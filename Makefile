# Everything runs in .venv, which is made on first use and renewed when pyproject.toml or constraints.txt change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
FUZZ_MINUTES ?= 10
ROOMS := configs parallel models trainer launch
# Where editors and pyright find the rooms as pentad.*: the editable installation maps them by a finder of its own.
LINK_ROOMS = mkdir -p $(VENV)/rooms/pentad \
	&& for room in $(ROOMS); do ln -sfn "$(CURDIR)/$$room" $(VENV)/rooms/pentad/$$room; done

.PHONY: demo test test-all test-slurm slurm retest fuzz lint format clean

demo: $(VENV)/run.stamp
	$(BIN)/pentad train --fresh demo

# Two tests beside each other: many of them leave a core idle, and many run several processes of their own.
PYTEST := $(BIN)/python -m pytest -q -n 2 --dist worksteal

test: $(VENV)/dev.stamp
	$(PYTEST) -m "not slow"

test-all: $(VENV)/dev.stamp
	$(PYTEST)

# Jobs on a real SLURM of four emulated nodes, which is installed from Debian's packages; needs root.
test-slurm: $(VENV)/dev.stamp slurm
	$(BIN)/python -m pytest -q tests/slurm

slurm:
	command -v slurmctld >/dev/null || { apt-get update -qq && apt-get install -y -qq --no-install-recommends slurm-wlm munge; }

# At most three tests that failed, once more and alone: what fails again is wrong, and what passes fails beside others,
# which is a fault of its own.
retest: $(VENV)/dev.stamp
	@$(BIN)/python -c 'import json, sys; names = list(json.load(open(".pytest_cache/v/cache/lastfailed"))); \
		print("failed beside others:", *names, sep="\n  "); sys.exit(len(names) > 3)'
	$(BIN)/python -m pytest -q --last-failed --last-failed-no-failures none

# Random jobs under random layouts, held against one process, for so many minutes; goes on where it stopped.
fuzz: $(VENV)/dev.stamp
	$(BIN)/python -m tests.fuzz_layouts --minutes $(FUZZ_MINUTES)

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(VENV)/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build *.egg-info

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "error: Pentad needs Python 3.11 or newer; name one with make PYTHON=..." >&2; exit 2; }
	@echo "making $(VENV)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/run.stamp: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing Pentad into $(VENV)"
	@$(PIP) install -c constraints.txt -e .
	@$(LINK_ROOMS)
	@touch $@

$(VENV)/dev.stamp: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing Pentad and its development tools into $(VENV)"
	@$(PIP) install -c constraints.txt -e '.[dev]'
	@$(LINK_ROOMS)
	@touch $@ $(VENV)/run.stamp
