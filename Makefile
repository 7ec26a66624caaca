# make demo        installs the package and exports the embedded network; needs no GPU
# make test        the fast tests: five minutes on two cores
# make test-full   the slow tests: faults, fuzzing, Ray, a browser, Triton, wheels, every variant
# make triton      of these, only the packages in a real Triton server
# make check       style, types, layers, spelling; and known vulnerabilities of the pins
PYTHON ?= python3
BIN := .venv/bin
CONSTRAINTS ?=
INSTALL := $(BIN)/python -m pip install $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))

# ONNX Runtime comes in two packages with the same module: the one for GPUs is installed if an
# NVIDIA driver answers, and the other one is removed first.
RUNTIME := $(if $(shell nvidia-smi -L 2>/dev/null),gpu,cpu)
OTHER_ONNXRUNTIME := onnxruntime$(if $(filter cpu,$(RUNTIME)),-gpu)

# The needs of a target are installed once; an empty file in .venv marks that.
READY := .venv/.van-deploy
TESTED := $(READY)-test-$(RUNTIME)
PYTEST := $(BIN)/python -m pytest -n auto --dist loadfile

.PHONY: setup demo test test-full test-gpu triton test-min test-pythons coverage mutate reference format lint audit check pins bench gpu-report fuzz faults public-weights clean

setup: $(TESTED)

$(READY)-pip:
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet 'pip>=25.1' # the first with --group
	touch $@

$(READY)-demo: pyproject.toml | $(READY)-pip
	$(INSTALL) --editable '.[$(if $(wildcard $(READY)-test-gpu),gpu,cpu)]'
	touch $@

$(TESTED): pyproject.toml | $(READY)-pip
	$(BIN)/python -m pip uninstall --yes --quiet $(OTHER_ONNXRUNTIME)
	rm -f $(READY)-test-*
	$(INSTALL) --editable '.[openvino,rtx,serve,sign,$(RUNTIME)]' --group test
	touch $(READY)-demo $@

$(READY)-full: $(TESTED)
	$(INSTALL) --editable '.[ray]' --group full
	touch $@

$(READY)-lint: $(TESTED)
	$(INSTALL) --group lint
	touch $@

$(READY)-audit: pyproject.toml | $(READY)-pip
	$(INSTALL) --group audit
	touch $@

demo: $(READY)-demo
	$(BIN)/van-deploy export van_digits --output dist/van_digits

test: $(TESTED)
	$(PYTEST) -m "not slow"

test-full: $(READY)-full
	$(PYTEST) -m slow

test-gpu: $(TESTED)
	$(BIN)/python -m pytest -m gpu

# A part of test-full: packages in a real tritonserver (from a wheel, without a container).
triton: $(TESTED)
	$(BIN)/python -m pytest tests/serve/test_real_triton.py

# The main job with the lowest versions that pyproject.toml allows, in a separate environment.
test-min:
	rm -rf .venv-min build && $(PYTHON) -m venv .venv-min
	.venv-min/bin/python -m pip install --constraint constraints-min.txt '.[cpu,serve,sign]'
	supply_chain/smoke.sh .venv-min/bin

# The main job with every installed Python from 3.10 to 3.13, each in its own environment.
test-pythons:
	supply_chain/pythons.sh

# Line and branch coverage of all tests: a table, and coverage.json.
coverage: $(READY)-full
	$(PYTEST) --cov=van_deploy --cov-branch --cov-report=term --cov-report=json

# Sixty small faults, one at a time: which test fails for each?
mutate: $(TESTED)
	$(BIN)/python -m reliability.mutate

# docs/schemas, the tables of docs/recipe.md and the types of keyword arguments, from the code.
reference: $(TESTED)
	$(BIN)/python -m supply_chain.reference

format: $(READY)-lint
	$(BIN)/ruff format . && $(BIN)/ruff check --fix .

lint: $(READY)-lint
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/lint-imports && $(BIN)/codespell && $(BIN)/mypy

# AUDIT=--allow-offline: a service that does not answer is reported and is not a failure.
audit: $(READY)-audit
	$(BIN)/python -m supply_chain.audit $(AUDIT)

check: lint audit

# After the tests have passed: the versions they passed with, and the bill of materials.
pins: $(READY)-full $(READY)-lint $(READY)-audit
	$(BIN)/python -m supply_chain.pins

# BENCH='checkpoint=FILE calib=FOLDER eval=FOLDER': with weights and images of your own.
bench: $(TESTED)
	$(BIN)/python -m benchmarks $(BENCH)

# A user's commands on a GPU; without a GPU, those that run on a CPU. PART=a: PyTorch and this
# project's kernels, 3 minutes on a GPU; PART=b: every runtime and the gates, 5 minutes; PART=c: the
# GPU tests, 8 minutes.
PART ?= a
gpu-report: $(TESTED)
	$(BIN)/python benchmarks/gpu/report.py --part $(PART) --output gpu-report/$(PART)

fuzz: $(TESTED)
	$(BIN)/python -m reliability --only fuzz,requests

faults: $(TESTED)
	$(BIN)/python -m reliability --only faults,load

# On a host with a network; IMAGENET=FOLDER measures the published top-1, too. Not run against
# the real hub yet.
public-weights: setup
	$(BIN)/python -m training.public_weights $(if $(IMAGENET),--imagenet $(IMAGENET))

clean:
	rm -rf build dist gpu-report *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
