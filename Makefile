# `make serve` and `make test` need only Python >= 3.11: both set up .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
HOST ?= 127.0.0.1
PORT ?= 8000
# torch's CPU build, where there is no NVIDIA driver; the plain package brings gigabytes of CUDA.
CPU_TORCH ?= torch==2.13.0 --retries 1 --extra-index-url https://download.pytorch.org/whl/cpu

.PHONY: serve test lint types pytest format bench gpu-test gpu-bench pair clean

serve: $(VENV)/.installed
	$(BIN)/mi-server serve --host $(HOST) --port $(PORT)

test: lint types pytest

lint: $(VENV)/.tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.tested
	$(BIN)/mypy

pytest: $(VENV)/.tested
	$(BIN)/pytest

format: $(VENV)/.tested
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Measures on this machine; bench/README.md says what.
bench: $(VENV)/.tested
	$(BIN)/python -m bench.engine
	$(BIN)/python -m bench.serving
	$(BIN)/python -m bench.latency
	$(BIN)/python -m bench.merge
	$(BIN)/python -m bench.host
	$(BIN)/python -m bench.sweep
	$(BIN)/python -m bench.grammar
	$(BIN)/python -m bench.routing

# On a machine with a GPU, by its own $(PYTHON) and packages: nothing is installed, nothing fetched.
# Both leave their JSON in $(GPU_OUT), as GPU_OUT=DIR names it; bench/README.md says what is measured.
GPU_OUT ?= bench/results
GPU_FLAGS ?=

gpu-test:
	GPU_OUT=$(GPU_OUT) TRITON_INTERPRET=0 PYTHONPATH=. $(PYTHON) -m pytest tests/gpu -W default

gpu-bench:
	PYTHONPATH=. $(PYTHON) -m bench.gpu --out $(GPU_OUT) $(GPU_FLAGS)

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
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
