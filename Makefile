# `make serve` and `make test` need only Python >= 3.11: both set up .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
HOST ?= 127.0.0.1
PORT ?= 8000
# torch's CPU build, where there is no NVIDIA driver; the plain package brings gigabytes of CUDA.
CPU_TORCH ?= torch==2.13.0 --retries 1 --extra-index-url https://download.pytorch.org/whl/cpu

.PHONY: serve test test-long test-mutations lint types pytest format bench pair clean kernel-code \
	gpu-first-contact gpu-test gpu-bench gpu-wheels gpu-kernels gpu-environment gpu-rehearsal

serve: $(VENV)/.installed
	$(BIN)/mi-server serve --host $(HOST) --port $(PORT)

test: lint types pytest

lint: $(VENV)/.tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.tested
	$(BIN)/mypy

# As many tests at a time as there are cores. A worker that is done takes tests from the end of
# another's list, so neighbours stay together and share their servers.
pytest: $(VENV)/.tested
	$(BIN)/pytest --numprocesses logical --maxprocesses 8 --dist worksteal

# Property tests alone, with ten times the examples and new ones each time, and what `make test`
# leaves out; takes half an hour.
test-long: $(VENV)/.tested
	$(BIN)/pytest --numprocesses logical --maxprocesses 8 --dist worksteal \
		--hypothesis-profile long -m "hypothesis or long"

# Breaks lines of the code on purpose; a test must fail for each. Takes five minutes.
test-mutations: $(VENV)/.tested
	$(BIN)/python -m tests.mutations

format: $(VENV)/.tested
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Speed and overhead, measured on this machine; bench/README.md says what.
bench: $(VENV)/.tested
	$(BIN)/python -m bench.engine
	$(BIN)/python -m bench.serving
	$(BIN)/python -m bench.latency
	$(BIN)/python -m bench.merge
	$(BIN)/python -m bench.host
	$(BIN)/python -m bench.sweep
	$(BIN)/python -m bench.grammar
	$(BIN)/python -m bench.routing

# --- With a GPU; bench/README.md says how ---------------------------------------------------------

GPU_OUT ?= bench/results
GPU_FLAGS ?=
GPU_VENV ?= .venv-gpu

# These run on a GPU machine, with its own $(PYTHON) and packages. They install and fetch nothing.
gpu-first-contact:
	$(PYTHON) -m bench.first_contact --out $(GPU_OUT) $(GPU_FLAGS)

gpu-test:
	GPU_OUT=$(GPU_OUT) OMP_NUM_THREADS=1 TRITON_INTERPRET=0 $(PYTHON) -m pytest tests/gpu -W default

gpu-bench:
	$(PYTHON) -m bench.gpu --out $(GPU_OUT) $(GPU_FLAGS)

# These prepare the folder .wheels for a GPU machine without network, on a machine with one. Copy it
# there with the checkout. It gets wheels of the packages that bench/gpu_machine.txt lacks, and
# compiled kernels. PYTHON must be a Python 3.12.
gpu-wheels:
	$(PYTHON) -m bench.gpu_wheels

gpu-kernels: $(GPU_VENV)/.installed
	$(GPU_VENV)/bin/python -m bench.kernel_code --pack .wheels/kernels.tar.xz

# Installs those packages of bench/gpu_machine.txt that first contact needs, in its versions. Only
# numpy is older, because Triton 3.6 does not interpret with 2.4. PYTHON must be a Python 3.12.
gpu-environment: $(GPU_VENV)/.installed

$(GPU_VENV)/.installed: bench/gpu_machine.txt pyproject.toml
	test -x $(GPU_VENV)/bin/python || $(PYTHON) -m venv $(GPU_VENV)
	$(GPU_VENV)/bin/pip install --no-deps $$($(GPU_VENV)/bin/python -m bench.gpu_wheels --machine)
	$(GPU_VENV)/bin/pip install 'numpy<2.4'
	touch $@

# Runs all steps of first contact at tiny shapes on this CPU, in that environment if it exists.
REHEARSED := $(or $(wildcard $(GPU_VENV)/.installed),$(VENV)/.tested)
gpu-rehearsal: $(REHEARSED)
	$(dir $<)bin/python -m bench.first_contact --smoke $(GPU_FLAGS)

# Compiles the kernels for a GPU that need not be there, and prints what they use of it.
kernel-code: $(VENV)/.tested
	$(BIN)/python -m bench.kernel_code

# Retrains the embedded pair from nothing and replaces the shipped weights (about 10 minutes).
pair: $(VENV)/.installed
	$(BIN)/python -m mi_runtime.embedded_pair.train --out build/embedded_pair
	install -m 644 build/embedded_pair/instruct/* mi_runtime/embedded_pair/instruct/
	install -m 644 build/embedded_pair/thinking/* mi_runtime/embedded_pair/thinking/

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	if command -v nvidia-smi >/dev/null; then $(BIN)/pip install --quiet torch; \
	else $(BIN)/pip install --quiet $(CPU_TORCH); fi
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/.tested: $(VENV)/.installed
	$(BIN)/pip install --quiet --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) $(GPU_VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
