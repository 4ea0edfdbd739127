# The commands that people and CI need. `make help` lists them.

PYTHON ?= python3
VENV := .venv
TRITON_VENV := .venv-triton
BIN := $(VENV)/bin
BUILDER ?= tensorrt-rtx
COMPUTE_CAPABILITY ?= 7.5 8.0 8.6 8.9 12.0
PARTS ?= unet refiner vae text_encoder text_encoder_2
# tests/conftest.py puts the files that take longest first, so that no process waits for one at the end.
BY_FILE := --dist loadfile --no-loadscope-reorder
export PYTHONSAFEPATH := 1
export RAY_USAGE_STATS_ENABLED := 0

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev demo test test-quick test-slow check format protos constraints tiny-base engine engine-full gpu-check gpu-bench triton triton-gpu train-job lace-samples bench-demo bench-serve bench-train clean

help: ## List the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-14s %s\n", $$1, $$2}'

# pip takes its own configured index and find-links, so a CPU build of torch is used where
# one is configured. The stamps make a second call instant.
$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Toile needs Python 3.11 or newer; $(PYTHON) is older. Name another: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "No virtual environment could be made; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@touch $@

$(VENV)/.setup: $(VENV)/.python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[compute,engine,report]'
	@touch $@

$(VENV)/.setup-dev: $(VENV)/.setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[compute,engine,rtx,report,postgres,kubernetes,dev]'
	@touch $@

setup: $(VENV)/.setup ## Make .venv and .venv-triton: all that runs Toile on this machine
	@$(MAKE) --no-print-directory triton || \
	  echo "The Triton server cannot be set up here: designs will be drawn one at a time."
setup-dev: $(VENV)/.setup-dev ## Make .venv with what tests and checks need, too

# Triton's Python wants numpy below 2, so it has an environment of its own.
$(TRITON_VENV)/.setup: $(VENV)/.python constraints-triton.txt
	@$(PYTHON) -m venv $(TRITON_VENV)
	$(TRITON_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r constraints-triton.txt
	@touch $@

triton: $(TRITON_VENV)/.setup ## Make .venv-triton, which holds the Triton server

triton-gpu: triton ## Add to .venv-triton what engines of TensorRT for RTX need
	$(TRITON_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r constraints-triton.txt -r constraints-triton-gpu.txt

demo: setup ## Run the whole loop on the sample lace photographs; writes out/demo
	$(BIN)/toile run examples/lace/loop.yaml

train-job: setup ## Submit the training that JOB=file describes and follow it
	@test -n "$(JOB)" || { echo "Name a file: make train-job JOB=training-jobs/lora-lace.yaml"; exit 1; }
	$(BIN)/toile train --job "$(JOB)"

# Processes that share the cores get one thread each: those of OpenMP wait for one another busily.
test test-quick test-slow: export OMP_NUM_THREADS ?= 1
test: test-quick triton ## Run the tests that need no GPU, without the slow ones
	$(BIN)/pytest -n 2 $(BY_FILE) -m "not gpu and not slow and (integration or browser)"

test-slow: setup-dev triton ## Run the slow ones: kills, the whole loop, other exports, benchmarks in small
	$(BIN)/pytest -n 2 $(BY_FILE) -m "not gpu and slow"

test-quick: setup-dev ## Run the tests that start no platform
	$(BIN)/pytest -n auto --maxprocesses 4 $(BY_FILE) -m "not gpu and not slow and not integration and not browser"

check: setup-dev ## Lint, types, layers, protos, generated code
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	cd protos && ../$(BIN)/buf lint && ../$(BIN)/buf format --diff --exit-code
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python scripts/generate_protos.py --check

format: setup-dev ## Format Python and protos
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	cd protos && ../$(BIN)/buf format --write

protos: setup-dev ## Generate services/toile/v1 from protos/
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python scripts/generate_protos.py

constraints: setup-dev ## Pin the versions of .venv in constraints.txt
	$(BIN)/python scripts/freeze_constraints.py

tiny-base: setup ## Train the tiny base from nothing; PHOTOS=folder adds photographs
	$(BIN)/python -m toile.training.tiny_base all --workdir out/tiny-base $(if $(PHOTOS),--photos "$(PHOTOS)")

engine: setup-dev ## Export the tiny base's networks, compile and check them; BUILDER, COMPUTE_CAPABILITY, PARTS
	@for part in $(PARTS); do \
	  $(BIN)/python tensorrt/export_unet.py --part $$part --out out/engines/$$part.onnx && \
	  $(BIN)/python tensorrt/build_engine.py --onnx out/engines/$$part.onnx \
	    --builder $(BUILDER) --compute-capability $(COMPUTE_CAPABILITY) && \
	  $(BIN)/python tensorrt/verify_engine.py out/engines/$$part.onnx --part $$part --batch 2 --runs 2 || exit 1; \
	done

engine-full: setup-dev ## Export and compile SDXL's UNet at full size, random weights; needs about 20 GB of memory
	$(BIN)/python benchmarks/engine_full/__main__.py

gpu-check: setup-dev triton-gpu ## On a GPU: run the tests that need one, and compare fresh engines with torch
	@$(BIN)/python -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "No GPU, or a CPU build of torch.")'
	$(BIN)/pytest tests/gpu -m gpu
	$(MAKE) engine $$($(BIN)/python -c 'from toile.diffusion.tensorrt_library import *; gpu = capability_here(); print(f"BUILDER={builder_for(gpu)} COMPUTE_CAPABILITY={gpu}")')
	@for part in $(PARTS); do \
	  $(BIN)/python tensorrt/verify_engine.py out/engines/$$part.engine --part $$part || exit 1; \
	done

gpu-bench: setup-dev ## On a GPU: time SDXL's UNet at full size, with and without adapters as inputs
	$(BIN)/python benchmarks/gpu/__main__.py

lace-samples: setup ## Draw the sample photographs of examples/lace anew
	$(BIN)/python -m toile.imaging.renderer.lace_samples examples/lace/photos

bench-demo: setup ## Measure the demo; writes benchmarks/demo/results.json
	$(BIN)/python benchmarks/demo/__main__.py

bench-serve: setup triton ## Measure drawing through Triton; ARGS="--figure 1 2 3 4 --quick"
	PYTHONPATH=benchmarks $(BIN)/python -m serve $(ARGS)

bench-train: setup ## Measure training beside diffusers' script; ARGS="--script FILE --script-python PYTHON"
	PYTHONPATH=benchmarks $(BIN)/python -m train $(ARGS)

clean: ## Remove what make and the demo made, .venv included
	rm -rf $(VENV) $(TRITON_VENV) out build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
