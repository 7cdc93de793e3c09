# Everything sets itself up: only Python 3.11 or newer with its venv module is needed beforehand.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
WORKERS ?= 2

# hundreds of processes are started here, and half a second of each would go into compiling our own modules anew
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup browser slurm demo demo-short test test-fast lint campaign faults studies

setup: $(READY)

# torch first and by its exact version: asked for in any other way, it brings gigabytes of CUDA packages along
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,hf]'
	touch $(READY)

# the report's tests look at it in a real browser; without one (no apt, no root) they are skipped and say so
browser:
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || \
	{ [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
	  apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends chromium; } \
	>/dev/null 2>&1 || echo "no chromium: the report's browser tests will be skipped"

# the cluster tests start a real Slurm of their own; without the packages (no apt, no root) they are skipped and say so
slurm:
	@PATH="$$PATH:/usr/sbin"; { command -v slurmctld && command -v slurmd && command -v munged; } >/dev/null || \
	{ [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
	  apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends slurm-wlm munge; } \
	>/dev/null 2>&1 || echo "no Slurm: the cluster tests will be skipped"

demo: setup
	$(BIN)/python demo/demo.py

demo-short: setup
	$(BIN)/python demo/demo.py --short

test: setup browser slurm
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not campaign"

test-fast: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not campaign and not slow"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# minutes to hours: what `make test` leaves out
campaign: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m campaign

# two hundred kills and what else may befall a run; some 20 minutes
faults: setup
	$(BIN)/python -m tests.faults --kills 200

# small models that show what the methods do: hours, restartable; writes docs/studies.md
studies: setup
	for study in mup_coordinates reweighting parameterizations lr_transfer balancing sparsity; do \
	  OMP_NUM_THREADS=1 $(BIN)/python -m studies.$$study || exit; done
