# Every target makes its own environment when it is missing or older than pyproject.toml or constraints.txt,
# and starts at once when it is there. Another interpreter: make test PYTHON=python3.12. Another folder: VENV=/tmp/venv.
PYTHON  ?= python3
VENV    ?= .venv
PARITY_VENV ?= .venv-parity
WORKERS ?= 2
ARGS    ?=

BIN := $(VENV)/bin
RUN := $(VENV)/.installed-run
DEV := $(VENV)/.installed-dev
DEEPSPEED := $(VENV)/deepspeed
PARITY := $(PARITY_VENV)/.installed-parity
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input

# Each test process and each tensor operation in it gets one core; more would only wait for each other.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help quickstart small soak test test-distributed test-slurm test-fast lint format bench parity parity-speed install clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

quickstart: $(RUN)  ## the whole protocol on real images in a few minutes; the report is in runs/quickstart/report
	$(BIN)/sparse-robust study run --config quickstart $(ARGS)

small: $(RUN)  ## the same with three seeds and two data fractions, about an hour on two cores
	$(BIN)/sparse-robust study run --config small $(ARGS)

test: $(DEV)  ## every test, slow ones too; ARGS="-k masks" picks some
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

test-distributed: $(DEV) $(DEEPSPEED)/.installed  ## the tests of two and three processes, and DeepSpeed
	$(ONE_THREAD) PYTHONPATH=$(abspath $(DEEPSPEED)) $(BIN)/python -m pytest -m distributed $(ARGS)

test-slurm: $(DEV)  ## studies on a real Slurm of one node, set up in a temporary folder; needs root and apt-get
	@$(PIP) install --quiet submitit --constraint constraints.txt
	$(ONE_THREAD) PATH="$(abspath $(BIN)):$$PATH" python -m tests.slurm.service python -m pytest -m slurm tests/slurm $(ARGS)

test-fast: $(DEV)  ## the tests that take seconds
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(WORKERS) -m "not slow and not distributed" $(ARGS)

lint: $(DEV)  ## ruff (rules and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(DEV)  ## let ruff lay the code out and mend what it can
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

bench: $(RUN)  ## time the operations of this machine after their gates; ARGS=--claims: only what is claimed, with verdicts
	$(BIN)/python benchmarks/run.py $(ARGS)

soak: $(RUN)  ## kill the workers of a study 25 times and compare with an undisturbed run; a quarter of an hour at most
	$(ONE_THREAD) $(BIN)/python -m benchmarks.soak $(ARGS)

parity: $(PARITY)  ## compare the attacks with the reference implementation, image by image; hours, can be taken up again
	$(ONE_THREAD) $(PARITY_VENV)/bin/python -m benchmarks.parity.train
	$(ONE_THREAD) $(PARITY_VENV)/bin/python -m benchmarks.parity.parity $(ARGS)

parity-speed: $(PARITY)  ## time robust evaluation beside other packages
	$(ONE_THREAD) $(PARITY_VENV)/bin/python -m benchmarks.parity.train
	$(ONE_THREAD) $(PARITY_VENV)/bin/python -m benchmarks.parity.speed $(ARGS)

install: $(RUN)  ## only make the environment

clean:  ## remove the environment and the caches; runs/ and benchmarks/results/ stay
	rm -rf $(VENV) $(PARITY_VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	find sparse_robust kernels tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last, so an interrupted installation leaves none and is taken up again.
$(RUN): pyproject.toml constraints.txt
	@rm -f $@ $(DEV)
	@$(call make_venv)
	@echo "Installing sparse-robust and the pinned stack into $(VENV) (once; PyTorch is the large part)..."
	@$(PIP) install --editable . --constraint constraints.txt
	@touch $@

$(DEV): pyproject.toml constraints.txt tests/data-packages.txt
	@rm -f $@
	@$(call make_venv)
	@echo "Installing sparse-robust, the pinned stack and the tools for its tests into $(VENV) (once)..."
	@$(PIP) install --editable '.[dev]' --constraint constraints.txt
	@$(PIP) install --no-deps --requirement tests/data-packages.txt
	@touch $(RUN) $@

# In a folder of its own: where Accelerate finds DeepSpeed, it imports it in every process.
$(DEEPSPEED)/.installed: tests/deepspeed-packages.txt | $(DEV)
	@rm -rf $(DEEPSPEED)
	@echo "Installing DeepSpeed into $(DEEPSPEED) (once, a few seconds)..."
	@$(PIP) install --quiet --no-deps --target $(DEEPSPEED) --requirement $<
	@touch $@

# The packages that are compared with never enter the environment that tests and users run in.
$(PARITY): pyproject.toml constraints.txt benchmarks/parity/requirements.txt
	@rm -f $@
	@$(MAKE) --no-print-directory install VENV=$(PARITY_VENV)
	@echo "Installing the packages to compare with into $(PARITY_VENV) (once)..."
	@$(PARITY_VENV)/bin/python -m pip --disable-pip-version-check --no-input install --no-deps \
		--requirement benchmarks/parity/requirements.txt
	@touch $@

define make_venv
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "sparse-robust needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1 || true)." \
		     "Name another one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }; \
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
endef
