# make txt2img | test | test-slow | test-peers | test-tpu | lint, each in a virtual environment that it makes itself.
PYTHON ?= python3
ACCELERATOR ?= cpu
WORKDIR ?= runs/txt2img
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
# In two processes; a file of tests stays in one, for what its tests share. JOBS= is one process.
PYTEST := $(BIN)/python -m pytest $(if $(JOBS),--numprocesses $(JOBS) --dist loadfile)
EXTRA_cuda := "jax[cuda13]"
EXTRA_tpu := "jax[tpu]" -r requirements-gcs.txt
EXTRA_cpu := jax

.PHONY: txt2img test test-slow test-peers test-tpu lint clean

txt2img: $(VENV)/.$(ACCELERATOR)
	$(BIN)/python -m ldm_jax.train --config configs/txt2img.py --workdir $(WORKDIR)

test: $(VENV)/.dev
	$(PYTEST) -m "not slow and not peers and not tpu"

test-slow: $(VENV)/.dev
	$(PYTEST) -m "slow and not peers and not tpu"

test-peers: $(VENV)/.peers
	$(PYTEST) -m peers

# Programs for TPUs are compiled, on any machine; libtpu is large, and one process at a time may load it.
test-tpu: $(VENV)/.dev
	$(BIN)/pip install --quiet "jax[tpu]"
	$(BIN)/python -m pytest -m tpu

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/shellcheck --external-sources launch/*.sh launch/*.sbatch

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip

$(VENV)/.$(ACCELERATOR): requirements.txt requirements-gcs.txt | $(VENV)/bin/python
	$(BIN)/pip install --quiet -r requirements.txt $(EXTRA_$(ACCELERATOR))
	touch $@

$(VENV)/.dev: requirements.txt requirements-dev.txt | $(VENV)/bin/python
	$(BIN)/pip install --quiet -r requirements.txt -r requirements-dev.txt
	touch $@

# torch is pinned, so that no peer pulls a build with several gigabytes of CUDA.
$(VENV)/.peers: $(VENV)/.dev tests/peers/constraints.txt
	$(BIN)/pip install --quiet -c tests/peers/constraints.txt torch diffusers transformers accelerate
	$(BIN)/pip install --quiet --no-deps -c tests/peers/constraints.txt lpips torch-fidelity
	touch $@

clean:
	rm -rf $(VENV)
