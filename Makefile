# Everything runs from a virtual environment inside this clone; nothing outside it is touched.
# Another interpreter: make test PYTHON=python3.12. More processes: make test JOBS=8

PYTHON ?= python3
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
SETUP := $(VENV)/.installed
PEERS := $(VENV)/.peers-installed

.PHONY: help demo test test-slow test-postgres lint gpu rig-test bench bench-peers bench-train conformance torture clean

help:
	@echo "make demo         install, then train a real model under a memory budget that its batch does not fit in"
	@echo "make test         install, then run the tests, but for the slow ones"
	@echo "make test-slow    the slow ones"
	@echo "make test-postgres  the search against a PostgreSQL server of its own (says what is missing)"
	@echo "make lint         ruff and mypy --strict"
	@echo "make bench        the loop's overhead against a loop by hand, and the command line's start"
	@echo "make bench-peers  the probe beside Lightning's and Accelerate's, attached trainers beside themselves (installs them)"
	@echo "make bench-train  whole trainings under one budget, by autoaccum and its peers (installs them)"
	@echo "make conformance  the correctness table, peers included (installs them)"
	@echo "make torture      kills, injected out-of-memory errors and a soak, at full size"
	@echo "make gpu          everything that needs a GPU, in ten minutes; skips elsewhere and says why"
	@echo "make rig-test RIG=DIR  as much of it as a CUDA PyTorch without a GPU can run, its python at DIR/python"

$(SETUP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable . --group dev
	@touch $@

$(PEERS): $(SETUP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --group peers
	@touch $@

demo: $(SETUP)
	$(BIN)/python examples/01_first_fit.py

# One thread in each process: threads that outnumber the cores wait for each other at every operator.
test: $(SETUP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -m "not slow" --numprocesses $(JOBS) --dist worksteal

# What takes long and rarely breaks: real kills, long searches, processes by the dozen. CI runs both tiers.
test-slow: $(SETUP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -m slow --numprocesses $(JOBS) --dist worksteal

# Installs no server and no driver: says what is missing.
test-postgres: $(SETUP)
	$(BIN)/python -m tests.postgres

lint: $(SETUP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# With a GPU's own PyTorch where the interpreter has all that this needs: it may stand where nothing can be installed.
gpu:
	@if $(PYTHON) -c "import torch, pytest, hypothesis, psutil, click, rich, pynvml; assert torch.cuda.is_available()" \
	    2>/dev/null; then $(PYTHON) -m tests.gpu; else $(MAKE) $(SETUP) && $(BIN)/python -m tests.gpu; fi

# PyTorch's CUDA build over stand-ins of the CUDA libraries that compute nothing: its allocator is real, values are not.
rig-test:
	@test -n "$(RIG)" -a -x "$(RIG)/python" || { echo "skipped: RIG=DIR names no stand-in (DIR/python)"; exit 1; }
	@echo "left out, since nothing is computed: test_ladder, test_nccl, test_batch_norm, test_own_loop, a device's assert"
	$(RIG)/python -m pytest tests/gpu/test_ahead.py tests/gpu/test_allocator.py tests/gpu/test_device.py \
	    tests/gpu/test_savers.py tests/gpu/test_waits.py -q \
	    --deselect tests/gpu/test_device.py::test_a_device_side_assert_is_seen_to_poison_the_context

bench: $(SETUP)
	$(BIN)/python -m tests.benchmarks

bench-peers: $(PEERS)
	$(BIN)/python -m tests.benchmarks.peers
	$(BIN)/python -m tests.benchmarks.trainers

bench-train: $(PEERS)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.benchmarks.train

conformance: $(PEERS)
	$(BIN)/python -m tests.conformance --table

torture: $(SETUP)
	$(BIN)/python -m tests.torture

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .hypothesis
