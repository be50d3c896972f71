# Every target works in a fresh clone: .venv is made when there is none, and installed into when setup.py has changed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# One thread per worker: several workers with several threads each only wait for one another.
PYTEST_WORKERS ?= 2
PYTEST_ARGS ?=
PYTEST = OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 \
	$(BIN)/python -m pytest -n $(PYTEST_WORKERS) $(PYTEST_ARGS)

# torch is installed first and by itself, so that its build is chosen here and not by a dependency. Without a GPU, the CPU
# build is taken from wherever pip is told to look (PIP_EXTRA_INDEX_URL may name PyTorch's CPU wheels); where there is
# none, the default wheel for Linux, which carries CUDA and takes several GB, does as well. TORCH= names another build.
# A torch that is already in .venv stays.
ifeq ($(shell command -v nvidia-smi 2>/dev/null),)
TORCH ?= torch==2.13.0+cpu
else
TORCH ?= torch
endif

NODE_MODULES := tests/transformers_js/node_modules

.DEFAULT_GOAL := help
.PHONY: help install demo demo-all test test-all test-hub style quality docs imports clean
.NOTPARALLEL: # two pips in one environment get in each other's way

help: ## Show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile

install: $(VENV)/.installed-dev $(NODE_MODULES) ## Make .venv with the package, editable, and the tools for tests, style and plots

demo: $(VENV)/.installed-base ## Compress the embedded teacher and compare the results (under 3 minutes on 2 cores)
	$(BIN)/python recipes/demo.py --config recipes/configs/demo.yaml

demo-all: $(VENV)/.installed-base ## The same by all methods, on more pairs (about 6 minutes on 2 cores)
	$(BIN)/python recipes/demo.py --config recipes/configs/demo_all.yaml

test: $(VENV)/.installed-test ## Run the fast tests; more for pytest in PYTEST_ARGS="-k retrieval"
	$(PYTEST)

test-all: $(VENV)/.installed-test $(NODE_MODULES) ## Run every test, with those marked slow, distributed and recipes
	$(PYTEST) -m ""

test-hub: $(VENV)/.installed-test ## Run what loads published checkpoints, which are downloaded (1.9 GB)
	HF_HUB_OFFLINE=0 $(BIN)/python -m pytest -rs -m hub $(PYTEST_ARGS)

style: $(VENV)/.installed-quality ## Format, and fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

quality: $(VENV)/.installed-quality ## Check lint and format without changing anything
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

docs: $(VENV)/.installed-docs ## Build the site into site/; a broken link or a missing page is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

imports: ## Print which folder of the package imports from which
	$(PYTHON) tests/import_order.py

clean: ## Remove caches, build products, the site and the demo's output; .venv stays
	rm -rf build dist site *.egg-info .pytest_cache .ruff_cache demo-output
	find clipmap_hf recipes tests -type d -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/.made:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.installed-torch: | $(VENV)/.made
	$(BIN)/python -m pip show --quiet torch 2>/dev/null || \
		$(BIN)/python -m pip install "$(TORCH)" || $(BIN)/python -m pip install torch==2.13.0
	touch $@

$(VENV)/.installed-base: setup.py pyproject.toml | $(VENV)/.installed-torch
	$(BIN)/python -m pip install -e .
	touch $@

# The extra of the same name: test, quality, docs, plots or dev.
$(VENV)/.installed-%: setup.py pyproject.toml | $(VENV)/.installed-torch
	$(BIN)/python -m pip install -e ".[$*]"
	touch $@

# For the test in Node.js, which says why it is skipped where npm is not installed or finds no packages.
$(NODE_MODULES): tests/transformers_js/package.json
	-npm install --prefix $(@D) --ignore-scripts --no-package-lock --no-audit --no-fund && touch $@
