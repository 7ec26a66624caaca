# make demo        the whole main job on the embedded network: no download, no GPU
# make test        the tests: six minutes on two cores
# make test-full   the slow ones: faults, fuzzing, Ray, a browser, Triton, wheels, every variant
# make triton      of these, the packages that a real Triton server is given
# make check       style, types, layers, spelling; and known vulnerabilities of the pins
PYTHON ?= python3
BIN := .venv/bin
CONSTRAINTS ?=
INSTALL := $(BIN)/python -m pip install $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))

# ONNX Runtime comes in two packages that hold the same module: the one for GPUs
# is taken where an NVIDIA driver answers, and the other one is removed first.
RUNTIME := $(if $(shell nvidia-smi -L 2>/dev/null),gpu,cpu)
OTHER_ONNXRUNTIME := onnxruntime$(if $(filter cpu,$(RUNTIME)),-gpu)

# What a target needs is installed once; an empty file in .venv says that it was.
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

# A part of test-full: packages in a real tritonserver (of a wheel, so without a container).
triton: $(TESTED)
	$(BIN)/python -m pytest tests/serve/test_real_triton.py

# The lowest versions pyproject.toml allows, in an environment of their own: the main job.
test-min:
	rm -rf .venv-min build && $(PYTHON) -m venv .venv-min
	.venv-min/bin/python -m pip install --constraint constraints-min.txt '.[cpu,serve,sign]'
	supply_chain/smoke.sh .venv-min/bin

# The main job in an environment of every Python from 3.10 to 3.13 that is here.
test-pythons:
	supply_chain/pythons.sh

# Lines and branches that all tests together run: a table, and coverage.json.
coverage: $(READY)-full
	$(PYTEST) --cov=van_deploy --cov-branch --cov-report=term --cov-report=json

# Sixty small faults put into the code one by one: which test notices each?
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

# AUDIT=--allow-offline: a service that does not answer is said, and is no failure.
audit: $(READY)-audit
	$(BIN)/python -m supply_chain.audit $(AUDIT)

check: lint audit

# After the tests have passed: what they passed with, and the bill of materials.
pins: $(READY)-full $(READY)-lint $(READY)-audit
	$(BIN)/python -m supply_chain.pins

bench: $(TESTED)
	$(BIN)/python -m benchmarks

# What a GPU does, command by command; on a host with none, on the CPU what runs there. PART=a
# PyTorch and this project's kernels, three minutes; PART=b every runtime, tests and gates, five.
PART ?= a
gpu-report: $(TESTED)
	$(BIN)/python benchmarks/gpu/report.py --part $(PART) --output gpu-report/$(PART)

fuzz: $(TESTED)
	$(BIN)/python -m reliability --only fuzz requests

faults: $(TESTED)
	$(BIN)/python -m reliability --only faults load

# On a host with a network; IMAGENET=FOLDER measures the published top-1, too. Not run against
# the real hub yet.
public-weights: setup
	$(BIN)/python -m training.public_weights $(if $(IMAGENET),--imagenet $(IMAGENET))

clean:
	rm -rf build dist gpu-report *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
