# Two commands: `make demo` and `make test`. Each creates .venv as needed; see CONTRIBUTING.md for the others.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
WORKERS ?= 2

.PHONY: demo demo-sharded test test-gpu lint docs fuzz bench bench-gpu bench-compile bench-knowledge clean
.DELETE_ON_ERROR:

demo: $(VENV)/.examples
	$(BIN)/python examples/facts.py

# Two processes share one table; one is killed half way, torchrun starts both again, and one process evaluates the result.
demo-sharded: $(VENV)/.examples
	rm -rf build/sharded
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node 2 --max-restarts 1 \
		examples/sharded.py --folder build/sharded --kill-at 550
	$(BIN)/python examples/sharded.py --evaluate build/sharded

test: $(VENV)/.test lint
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --durations 10

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.test
	$(BIN)/python -m tests.zoo.table
	$(BIN)/python -m tests.lowering.triton.resources
	$(BIN)/python -m tests.runtime.table.optimizer_matrix

fuzz: $(VENV)/.test
	$(BIN)/python -m tests.fuzz --examples 5100 --processes $(WORKERS)

bench: $(VENV)/.benchmark
	$(BIN)/python -m benchmarks.cpu
	$(BIN)/python -m benchmarks.training_step

bench-knowledge: $(VENV)/.benchmark
	$(BIN)/python -m benchmarks.knowledge

# .venv has PyTorch's CPU build, so these two take PYTHON, which must have the CUDA build and the packages of the extras.
test-gpu:
	$(PYTHON) -m pytest tests/gpu

bench-gpu:
	$(PYTHON) -m benchmarks.gpu

bench-compile: $(VENV)/.test
	$(BIN)/python -m benchmarks.import_time
	$(BIN)/python -m benchmarks.planning
	$(BIN)/python -m benchmarks.compile_time

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.examples: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable '.[examples]'
	touch $@

$(VENV)/.benchmark: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable '.[benchmark]'
	touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable '.[examples,test]'
	$(PIP) --no-deps timm  # without torchvision: see tests/zoo/torchvision_stand_in.py
	touch $@
