# make demo   the whole main job on the embedded network: no download, no GPU
# make test   the tests
PYTHON ?= python3
BIN := .venv/bin

# ONNX Runtime comes in two packages that hold the same module: the one for GPUs
# is taken where an NVIDIA driver answers, and the other one is removed first.
RUNTIME := $(if $(shell nvidia-smi -L 2>/dev/null),gpu,cpu)
OTHER_ONNXRUNTIME := onnxruntime$(if $(filter cpu,$(RUNTIME)),-gpu)
STAMP := .venv/.van-deploy-$(RUNTIME)

.PHONY: setup demo test test-gpu test-min test-pythons format check pins bench clean fuzz faults

setup: $(STAMP)

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip uninstall --yes --quiet $(OTHER_ONNXRUNTIME)
	$(BIN)/python -m pip install $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS)) --editable '.[dev,rtx,serve,openvino,ray,sign,$(RUNTIME)]'
	rm -f .venv/.van-deploy-* && touch $@

demo: setup
	$(BIN)/van-deploy export van_digits --output dist/van_digits

test: setup
	$(BIN)/python -m pytest -n auto

test-gpu: setup
	$(BIN)/python -m pytest -m gpu

# The lowest versions pyproject.toml allows, in an environment of their own: the main job.
test-min:
	rm -rf .venv-min build && $(PYTHON) -m venv .venv-min
	.venv-min/bin/python -m pip install --constraint constraints-min.txt '.[cpu,serve,sign]'
	supply_chain/smoke.sh .venv-min/bin

# The main job in an environment of every Python from 3.10 to 3.13 that is here.
test-pythons:
	supply_chain/pythons.sh

format: setup
	$(BIN)/ruff format . && $(BIN)/ruff check --fix .

check: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
	$(BIN)/python -m supply_chain.audit

# After the tests have passed: what they passed with, and the bill of materials.
pins: setup
	$(BIN)/python -m supply_chain.pins

bench: setup
	$(BIN)/python -m benchmarks

fuzz: setup
	$(BIN)/python -m reliability --only fuzz

faults: setup
	$(BIN)/python -m reliability --only faults,load

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
